// A chart: curves over tokens or over time, with what happened in a row below them.

const MARKED = new Set(["loss", "reward"]);

class Chart {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.picked = 0;  // the option shown
    this.frame = null;  // what was drawn last and where, for the pointer
    this.isTime = spec.x === "hours";
    // The field of a run with the marks to draw, if any.
    this.marksField = MARKED.has(spec.id) ? "marks" : this.isTime ? "clock" : null;
    addCaption(figure, spec, option => {
      this.picked = option;
      this.draw();
    });
    this.plot = figure.appendChild(node("div", "plot"));
    this.base = this.plot.appendChild(node("canvas"));
    this.over = this.plot.appendChild(node("canvas", "over"));
    this.keys = figure.appendChild(node("div", "keys"));
    this.base.setAttribute("role", "img");
    this.base.setAttribute("aria-label", `${spec.title}, ${spec.y}, over ${spec.x}`);
    this.pointer = new ChartPointer(this);
  }

  draw() {
    const width = this.plot.clientWidth;
    const height = this.figure.classList.contains("wide") ? 300 : 230;
    if (!width) return;
    const pen = prepare(this.base, width, height);
    const lines = this.shownLines(), limits = this.limits(lines);
    prepare(this.over, width, height);
    this.showKeys(lines);
    if (!limits) {
      pen.fillStyle = css("--soft");
      pen.fillText("nothing in this range", 60, 40);
      this.frame = null;
      return;
    }
    const bottom = height - (this.marksField ? 50 : 36);
    const area = {left: 62, right: width - 12, top: 16, bottom};
    const toPlace = scales(limits, area, this.spec.log);
    this.frame = {lines, limits, area, width, height, marks: [], ...toPlace};
    paintAxes(pen, this.spec, this.frame);
    this.paintLines(pen);
    if (this.marksField) this.paintMarks(pen);
  }

  // The lines to draw, with their style, their x, and their y after smoothing and stacking.
  // `own`: what the tooltip shows.
  shownLines() {
    const {spec} = this;
    const all = spec.options
      ? spec.options[this.picked].lines.map((l, i) => ({...l, color: i, dash: i >> 3}))
      : spec.lines;
    let below = null;
    return all.filter(isShown).filter(l => state.raw || !l.raw).map(line => {
      const xs = data.xs[line.x], ys = smooth(line.y, smoothingReach(line));
      if (!spec.stack) return {...line, xs, ys, own: ys, ...styleOf(line)};
      const under = below ?? ys.map(() => 0);
      below = ys.map((y, i) => (y ?? 0) + (under[i] ?? 0));
      return {...line, xs, ys: below, under, own: line.y, ...styleOf(line)};
    });
  }

  // The range of both axes, or null if there is nothing to draw.
  limits(lines) {
    const {spec} = this;
    const range = this.isTime ? null : state.range;
    let {x0, x1, values} = this.extent(lines, range);
    if (!values.length) return null;
    values.sort((a, b) => a - b);
    // A spike of one point in a thousand must not flatten the rest. Zooming in shows it whole.
    const cut = spec.stack || values.length < 100 ? 0 : 0.003;
    const y0 = values[Math.floor(cut * values.length)];
    const y1 = values[Math.ceil((1 - cut) * values.length) - 1];
    if (range) [x0, x1] = range;
    else if (x0 / x1 < 0.2) x0 = Math.min(x0, 0);  // so near to zero, the axis begins there
    if (x1 <= x0) x1 = x0 + (Math.abs(x0) || 1);
    if (spec.log) return {x0, x1, y0: y0 / 1.15, y1: y1 * 1.15};
    const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
    return {x0, x1, y0: spec.stack ? 0 : y0 - pad, y1: y1 + pad};
  }

  // The least and greatest x within the range, and all y that must fit on the axis.
  extent(lines, range) {
    const {spec} = this, values = [];
    let x0 = Infinity, x1 = -Infinity;
    for (const line of lines) {
      // Noise may reach beyond the chart. Otherwise it could flatten the curves it is drawn under.
      const hasSpread = line.lo && (line.band || (state.raw && !line.noise));
      const hasRaw = state.raw && !spec.stack && smoothingReach(line);
      line.xs.forEach((x, i) => {
        if (x === null || (range && (x < range[0] || x > range[1]))) return;
        x0 = Math.min(x0, x);
        x1 = Math.max(x1, x);
        const spread = hasSpread ? [line.lo[i], line.hi[i]] : [];
        for (const y of [line.ys[i], hasRaw ? line.y[i] : null, ...spread])
          if (y !== null && !(spec.log && y <= 0)) values.push(y);
      });
      if (spec.stack) values.push(0);
    }
    if (spec.zero) values.push(0);
    return {x0, x1, values};
  }

  paintLines(pen) {
    const {lines, area} = this.frame;
    const width = area.right - area.left + 6, height = area.bottom - area.top + 8;
    pen.save();
    pen.beginPath();
    pen.rect(area.left - 3, area.top - 4, width, height);
    pen.clip();
    for (const line of lines) paintArea(pen, this.spec, line, this.frame);
    for (const line of lines) paintLine(pen, this.spec, line, this.frame);
    pen.restore();
  }

  // Starts, checkpoints and what the guard saw, in a row below the curves.
  paintMarks(pen) {
    const {area, toX, limits, marks} = this.frame;
    const y = area.bottom + 26;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    data.runs.forEach((run, number) => {
      if (state.hidden.has(number)) return;
      for (const mark of run[this.marksField] ?? []) {
        if (mark.x < limits.x0 || mark.x > limits.x1) continue;
        const x = toX(mark.x);
        pen.fillStyle = color(run.color);
        pen.fillText(SIGNS[mark.kind] ?? OTHER_SIGN, x, y);
        marks.push({x, y, color: color(run.color), text: mark.text, run: run.label});
      }
    });
  }

  // The legend below the chart: names of lines that are no runs, and what the signs mean.
  showKeys(lines) {
    const hasNames = this.spec.options || lines.some(line => line.run === undefined);
    this.keys.replaceChildren();
    for (const line of hasNames ? lines.filter(l => !l.raw) : []) {
      const key = this.keys.appendChild(node("span"));
      const box = key.appendChild(node("span", "swatch"));
      box.style.background = line.color;
      if (line.noise) box.style.opacity = 0.4;
      key.append(node("span", "", line.name));
    }
    if (this.marksField && data.runs.some(run => run[this.marksField]?.length))
      this.keys.append(node("span", "", SIGNS_TEXT));
  }
}

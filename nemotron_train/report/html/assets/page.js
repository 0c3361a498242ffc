// Draws the charts of a report from the numbers in the page. Owns: axes, curves, heat maps, hover,
// zoom, smoothing. Does not own: which charts there are (page_data.py). Text from a run enters the
// document as text only.
"use strict";
(() => {
  const began = performance.now();
  const data = JSON.parse(document.getElementById("data").textContent);
  // Okabe and Ito's colours, which colour-blind people tell apart; lighter ones on a dark page.
  const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#c06a9b", "#9a7400", "#3d9bd1", "#6b4c9a", "#4d4d4d"];
  const DARK = ["#56b4e9", "#ff8c42", "#2fcb9b", "#e79ac4", "#f0c242", "#9ad0f5", "#b79ad6", "#c8c8c8"];
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2, 1, 2, 1, 2]];
  // Viridis, which is even in lightness and safe for colour-blind people, at nine places.
  const SCALE = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
    [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
  const MARKS = {start: "▲", checkpoint: "|", non_finite: "✕", spike: "✕", straggler: "◆"};
  const dark = matchMedia("(prefers-color-scheme: dark)");
  // The raw bands of many runs hide one another: there they wait to be asked for.
  const state = {hidden: new Set(), range: null, smooth: 3, raw: data.runs.length <= 6};
  const drawn = [];  // {draw, figure, visible}

  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const color = index => {
    const colors = dark.matches ? DARK : LIGHT;
    return index < 0 ? css("--soft") : colors[index % colors.length];
  };
  const node = (tag, cls, text) => {
    const made = document.createElement(tag);
    if (cls) made.className = cls;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const styleOf = line => line.run === undefined
    ? {color: color(line.color ?? 0), dash: DASHES[(line.dash ?? 0) % DASHES.length]}
    : {color: color(data.runs[line.run].color),
       dash: DASHES[(data.runs[line.run].dash + Math.floor(data.runs[line.run].color / 8)) % DASHES.length]};
  const isShown = line => line.run === undefined || !state.hidden.has(line.run);
  const nameOf = line => line.run === undefined ? line.name : data.runs[line.run].label;

  function short(value) {  // 512000 as 512K
    const size = Math.abs(value);
    for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
      if (size >= unit) return `${+(value / unit).toPrecision(4)}${letter}`;
    return size && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(4)}`;
  }
  const exact = value => value === null ? "–"
    : Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? short(value) : `${+value.toPrecision(5)}`;
  const clock = range => range > 72 ? [24, "d"] : range > 2 ? [1, "h"] : [1 / 60, "min"];
  const hours = (value, range) => `${+(value / clock(range)[0]).toPrecision(3)} ${clock(range)[1]}`;

  function ticks(low, high, count) {
    const span = high - low;
    if (!(span > 0)) return [low];
    const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough) ?? 10 * power;
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      found.push(+(i * step).toPrecision(12));
    return found;
  }
  function logTicks(low, high) {
    const found = [], wide = Math.log10(high / low) > 4;
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const m of wide ? [1] : [1, 2, 5])
        if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) found.push(m * 10 ** p);
    return found;
  }

  // The mean over 2k+1 buckets, k shrinking towards both ends alike: equal buckets, so it is exact.
  function smooth(values, k) {
    if (!k) return values;
    const sums = [0], counts = [0];
    values.forEach((v, i) => {
      sums.push(sums[i] + (v ?? 0));
      counts.push(counts[i] + (v === null ? 0 : 1));
    });
    return values.map((v, i) => {
      const r = Math.min(k, i, values.length - 1 - i), n = counts[i + r + 1] - counts[i - r];
      return n ? (sums[i + r + 1] - sums[i - r]) / n : null;
    });
  }
  const reach = line => line.fixed ? 0 : Math.round(line.y.length * state.smooth / 120);

  const tip = document.body.appendChild(node("div", "tip"));
  function showTip(event, title, entries) {
    tip.replaceChildren(node("b", "", title));
    for (const [swatch, name, value] of entries.slice(0, 14)) {
      const row = tip.appendChild(node("div"));
      const box = row.appendChild(node("span", "swatch"));
      box.style.background = swatch;
      row.append(node("span", "", name), node("span", "", value));
    }
    if (entries.length > 14) tip.append(node("div", "", `and ${entries.length - 14} more`));
    tip.style.display = "block";
    const left = event.clientX + 16 + tip.offsetWidth > innerWidth
      ? Math.max(4, event.clientX - tip.offsetWidth - 12) : event.clientX + 16;
    tip.style.left = `${left}px`;
    tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4)}px`;
  }
  const hideTip = () => { tip.style.display = "none"; };

  function prepare(canvas, width, height) {
    const ratio = Math.min(devicePixelRatio || 1, 2);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    return pen;
  }

  function caption(figure, spec, onPick) {
    const head = figure.appendChild(node("figcaption"));
    head.append(node("span", "", spec.title));
    if (spec.options && spec.options.length > 1) {
      const select = head.appendChild(node("select"));
      select.setAttribute("aria-label", "which run");
      spec.options.forEach((option, i) => {
        const entry = select.appendChild(node("option", "", option.label));
        entry.value = i;
      });
      select.addEventListener("change", () => onPick(+select.value));
    } else if (spec.options) head.append(node("span", "note", spec.options[0].label));
  }

  function chart(figure, spec) {
    let picked = 0, frame = null;
    caption(figure, spec, i => { picked = i; draw(); });
    const plot = figure.appendChild(node("div", "plot"));
    const base = plot.appendChild(node("canvas")), over = plot.appendChild(node("canvas", "over"));
    const keys = figure.appendChild(node("div", "keys"));
    const onTokens = spec.x === "tokens";
    base.setAttribute("role", "img");
    base.setAttribute("aria-label", `${spec.title}, ${spec.y}, over ${spec.x}`);

    const source = () => spec.options ? spec.options[picked].lines.map((l, i) => ({...l, color: i, dash: i >> 3})) : spec.lines;
    function prepared() {
      const lines = source().filter(isShown).filter(l => state.raw || !l.raw);
      let below = null;
      return lines.map(line => {
        const x = data.xs[line.x];
        let y = smooth(line.y, reach(line));
        if (spec.stack) {
          const under = below ?? y.map(() => 0);
          y = y.map((v, i) => (v ?? 0) + (under[i] ?? 0));
          below = y;
          return {...line, xs: x, ys: y, under, own: line.y, ...styleOf(line)};
        }
        return {...line, xs: x, ys: y, own: y, ...styleOf(line)};
      });
    }

    function limits(lines) {
      let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
      const range = onTokens ? state.range : null;
      const ends = [];
      for (const line of lines) {
        line.xs.forEach((x, i) => {
          if (x === null || (range && (x < range[0] || x > range[1]))) return;
          x0 = Math.min(x0, x); x1 = Math.max(x1, x);
          // The noise may reach beyond the picture: what is held against it should not lie flat.
          const spread = line.lo && (line.band || (state.raw && !line.noise)) ? [line.lo[i], line.hi[i]] : [];
          const raw = state.raw && !spec.stack && reach(line) ? line.y[i] : null;
          for (const y of [line.ys[i], raw, ...spread])
            if (y !== null && !(spec.log && y <= 0)) ends.push(y);
        });
        if (spec.stack) ends.push(0);
      }
      if (spec.zero) ends.push(0);
      if (!ends.length) return null;
      ends.sort((a, b) => a - b);
      // One spike in a thousand points does not press all others flat; zooming in shows it whole.
      const cut = spec.stack || ends.length < 100 ? 0 : 0.003;
      y0 = ends[Math.floor(cut * ends.length)];
      y1 = ends[Math.ceil((1 - cut) * ends.length) - 1];
      if (range) [x0, x1] = range;
      else if (onTokens || spec.x === "hours") x0 = Math.min(x0, x0 / x1 < 0.2 ? 0 : x0);
      if (x1 <= x0) x1 = x0 + (Math.abs(x0) || 1);
      if (spec.log) return {x0, x1, y0: y0 / 1.15, y1: y1 * 1.15};
      const pad = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
      return {x0, x1, y0: spec.stack ? 0 : y0 - pad, y1: y1 + pad};
    }

    function draw() {
      const width = plot.clientWidth, height = figure.classList.contains("wide") ? 300 : 230;
      if (!width) return;
      const pen = prepare(base, width, height), lines = prepared(), box = limits(lines);
      prepare(over, width, height);
      legend(lines);
      if (!box) {
        pen.fillStyle = css("--soft");
        pen.fillText("nothing in this range", 60, 40);
        frame = null;
        return;
      }
      const marks = onTokens && spec.id === "loss" ? "marks" : spec.x === "hours" ? "clock" : null;
      const area = {left: 62, right: width - 12, top: 16, bottom: height - (marks ? 50 : 36)};
      const sx = x => area.left + (x - box.x0) / (box.x1 - box.x0) * (area.right - area.left);
      const fy = spec.log ? y => Math.log(Math.max(y, 1e-300)) : y => y;
      const sy = y => area.bottom - (fy(y) - fy(box.y0)) / (fy(box.y1) - fy(box.y0)) * (area.bottom - area.top);
      frame = {lines, box, area, sx, sy};
      axes(pen, width, height);
      pen.save();
      pen.beginPath();
      pen.rect(area.left - 3, area.top - 4, area.right - area.left + 6, area.bottom - area.top + 8);
      pen.clip();
      for (const line of lines) shade(pen, line, sx, sy);
      for (const line of lines) stroke(pen, line, sx, sy);
      pen.restore();
      if (marks) happenings(pen, marks);
    }

    function axes(pen, width, height) {
      const {box, area, sx, sy} = frame;
      pen.strokeStyle = css("--line");
      pen.fillStyle = css("--soft");
      pen.lineWidth = 1;
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      for (const y of spec.log ? logTicks(box.y0, box.y1) : ticks(box.y0, box.y1, 5)) {
        pen.beginPath(); pen.moveTo(area.left, sy(y)); pen.lineTo(area.right, sy(y)); pen.stroke();
        pen.fillText(short(y), area.left - 6, sy(y));
      }
      pen.textAlign = "center";
      pen.textBaseline = "top";
      const unit = onTokens ? 1 : clock(box.x1)[0];
      for (const tick of ticks(box.x0 / unit, box.x1 / unit, Math.max(2, width / 110))) {
        const x = tick * unit;
        pen.beginPath(); pen.moveTo(sx(x), area.bottom); pen.lineTo(sx(x), area.bottom + 4); pen.stroke();
        pen.fillText(onTokens ? short(x) : hours(x, box.x1), sx(x), area.bottom + 6);
      }
      pen.fillText(onTokens ? "tokens" : "time since the first start", (area.left + area.right) / 2, height - 13);
      pen.textAlign = "left";
      pen.fillText(spec.y, 2, 0);
      if (spec.zero) {
        pen.strokeStyle = css("--soft");
        pen.beginPath(); pen.moveTo(area.left, sy(0)); pen.lineTo(area.right, sy(0)); pen.stroke();
      }
    }

    function polygon(pen, xs, low, high, sx, sy) {
      pen.beginPath();
      let open = false;
      xs.forEach((x, i) => {
        if (high[i] === null || low[i] === null) return;
        open ? pen.lineTo(sx(x), sy(high[i])) : pen.moveTo(sx(x), sy(high[i]));
        open = true;
      });
      for (let i = xs.length - 1; i >= 0; i--)
        if (high[i] !== null && low[i] !== null) pen.lineTo(sx(xs[i]), sy(low[i]));
      pen.closePath();
      pen.fill();
    }

    function shade(pen, line, sx, sy) {
      pen.fillStyle = line.color;
      pen.globalAlpha = spec.stack ? 0.75 : 0.17;
      if (spec.stack) polygon(pen, line.xs, line.under, line.ys, sx, sy);
      else if (line.lo && (line.band || line.noise || state.raw)) polygon(pen, line.xs, line.lo, line.hi, sx, sy);
      pen.globalAlpha = 1;
    }

    function stroke(pen, line, sx, sy) {
      if (line.noise || spec.stack) return;
      const path = ys => {
        pen.beginPath();
        let open = false;
        line.xs.forEach((x, i) => {
          const y = ys[i];
          if (y === null || x === null || (spec.log && y <= 0)) { open = false; return; }
          open ? pen.lineTo(sx(x), sy(y)) : pen.moveTo(sx(x), sy(y));
          open = true;
        });
        pen.stroke();
      };
      pen.strokeStyle = line.color;
      pen.lineJoin = "round";
      if (state.raw && reach(line) && !line.lo) {
        pen.globalAlpha = 0.3; pen.lineWidth = 0.8; pen.setLineDash([]);
        path(line.y);
      }
      pen.globalAlpha = line.raw ? 0.35 : 1;
      pen.lineWidth = line.raw ? 0.9 : 1.7;
      pen.setLineDash(line.raw ? [] : line.dash);
      path(line.ys);
      pen.setLineDash([]);
      if (line.dots && line.xs.length <= 60) {
        pen.fillStyle = line.color;
        line.xs.forEach((x, i) => {
          if (line.ys[i] === null) return;
          pen.beginPath(); pen.arc(sx(x), sy(line.ys[i]), 2.6, 0, 7); pen.fill();
        });
      }
      pen.globalAlpha = 1;
    }

    // Starts, checkpoints and what the guard saw, in a lane below the curves.
    function happenings(pen, field) {
      const {area, sx, box} = frame;
      frame.marks = [];
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      data.runs.forEach((run, number) => {
        if (state.hidden.has(number)) return;
        for (const mark of run[field] ?? []) {
          if (mark.x < box.x0 || mark.x > box.x1) continue;
          pen.fillStyle = color(run.color);
          const y = area.bottom + 26;
          pen.fillText(MARKS[mark.kind] ?? "◆", sx(mark.x), y);
          frame.marks.push({x: sx(mark.x), y, color: color(run.color), text: mark.text, run: run.label});
        }
      });
    }

    function legend(lines) {
      const own = spec.options || lines.some(line => line.run === undefined);
      const field = spec.id === "loss" ? "marks" : spec.x === "hours" ? "clock" : null;
      keys.replaceChildren();
      for (const line of own ? lines.filter(l => !l.raw) : []) {
        const key = keys.appendChild(node("span"));
        const box = key.appendChild(node("span", "swatch"));
        box.style.background = line.color;
        if (line.noise) box.style.opacity = 0.4;
        key.append(node("span", "", line.name));
      }
      if (field && data.runs.some(run => run[field]?.length))
        keys.append(node("span", "", "▲ start   | checkpoint   ✕ not finite, spike   ◆ other"));
    }

    const nearest = (xs, x) => {
      let low = 0, high = xs.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; xs[middle] < x ? low = middle : high = middle; }
      return x - xs[low] < xs[high] - x ? low : high;
    };
    let dragging = null;
    const place = event => event.clientX - over.getBoundingClientRect().left;
    const valueAt = pixel => {
      const {area, box} = frame;
      return box.x0 + (pixel - area.left) / (area.right - area.left) * (box.x1 - box.x0);
    };
    over.addEventListener("pointermove", event => {
      if (!frame) return;
      const {area, lines, sx, sy} = frame, pixel = place(event);
      const pen = prepare(over, plot.clientWidth, base.clientHeight);
      if (pixel < area.left || pixel > area.right) return hideTip();
      if (dragging !== null) {
        pen.fillStyle = css("--accent");
        pen.globalAlpha = 0.2;
        pen.fillRect(Math.min(dragging, pixel), area.top, Math.abs(pixel - dragging), area.bottom - area.top);
        return;
      }
      const top = over.getBoundingClientRect().top;
      const hit = (frame.marks ?? []).filter(m => Math.abs(m.x - pixel) < 6 && Math.abs(m.y - (event.clientY - top)) < 9);
      if (hit.length) return showTip(event, "what happened", hit.map(m => [m.color, `${m.run}: ${m.text}`, ""]));
      const x = valueAt(pixel);
      pen.strokeStyle = css("--soft");
      pen.beginPath(); pen.moveTo(pixel, area.top); pen.lineTo(pixel, area.bottom); pen.stroke();
      const entries = [];
      for (const line of lines.filter(l => !l.noise && l.xs.length)) {
        const i = nearest(line.xs, x);
        if (line.ys[i] === null) continue;
        pen.fillStyle = line.color;
        pen.beginPath(); pen.arc(sx(line.xs[i]), sy(line.ys[i]), 3, 0, 7); pen.fill();
        const spread = line.lo && line.lo[i] !== null ? ` (${exact(line.lo[i])} – ${exact(line.hi[i])})` : "";
        entries.push([line.color, nameOf(line), `${exact(line.own[i])}${spread}`, line.ys[i]]);
      }
      entries.sort((a, b) => b[3] - a[3]);
      showTip(event, onTokens ? `${short(x)} tokens` : hours(x, frame.box.x1), entries);
    });
    over.addEventListener("pointerleave", () => {
      dragging = null;
      hideTip();
      if (frame) prepare(over, plot.clientWidth, base.clientHeight);
    });
    over.addEventListener("pointerdown", event => { if (frame && onTokens && event.pointerType === "mouse") dragging = place(event); });
    over.addEventListener("pointerup", event => {
      if (dragging === null || !frame) return;
      const ends = [dragging, place(event)].sort((a, b) => a - b);
      dragging = null;
      if (ends[1] - ends[0] < 6) return;
      const full = state.range ?? [frame.box.x0, frame.box.x1];
      state.range = [Math.max(full[0], valueAt(ends[0])), Math.min(full[1], valueAt(ends[1]))];
      redraw();
    });
    over.addEventListener("dblclick", () => { state.range = null; redraw(); });
    return draw;
  }

  function heat(figure, spec) {
    let picked = 0, frame = null;
    caption(figure, spec, i => { picked = i; draw(); });
    const plot = figure.appendChild(node("div", "plot"));
    const base = plot.appendChild(node("canvas"));
    base.setAttribute("role", "img");
    base.setAttribute("aria-label", spec.title);
    const shade = t => {
      const place = Math.min(Math.max(t, 0), 1) * (SCALE.length - 1), i = Math.min(Math.floor(place), SCALE.length - 2);
      return SCALE[i].map((v, c) => Math.round(v + (place - i) * (SCALE[i + 1][c] - v)));
    };
    const column = value => spec.over === "tokens" ? short(+value.toPrecision(3)) : `${value}`;

    function draw() {
      const width = plot.clientWidth, {rows, columns, cells} = spec.options[picked];
      if (!width) return;
      const values = cells.flat().filter(v => v !== null && !(spec.log && v <= 0));
      const size = Math.min(22, Math.max(4, 900 / rows.length)), left = Math.min(150, width * 0.34);
      const turned = spec.over === "role" && (width - left - 64) / columns.length < 92;
      const bottom = turned ? 96 : 34, height = rows.length * size + bottom + 6;
      const pen = prepare(base, width, height);
      const f = spec.log ? Math.log : v => v;
      let low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0;
      let high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
      if (high <= low) high = low + (Math.abs(low) || 1);
      const at = v => (f(v) - f(low)) / (f(high) - f(low));
      const right = width - 64, wide = (right - left) / columns.length;
      frame = {left, right, wide, size, rows, columns, cells};
      cells.forEach((row, r) => row.forEach((v, c) => {
        const known = v !== null && !(spec.log && v <= 0);
        const rgb = known ? shade(at(v)) : null;
        pen.fillStyle = known ? `rgb(${rgb})` : css("--panel");
        pen.fillRect(left + c * wide, r * size, Math.ceil(wide), Math.ceil(size));
        if (known && wide >= 30 && size >= 14) {
          pen.fillStyle = at(v) > 0.6 ? "#111" : "#fff";
          pen.textAlign = "center"; pen.textBaseline = "middle";
          pen.fillText(`${+v.toPrecision(3)}`, left + (c + 0.5) * wide, (r + 0.5) * size);
        }
      }));
      pen.fillStyle = css("--soft");
      pen.textAlign = "right"; pen.textBaseline = "middle";
      const every = Math.max(1, Math.ceil(12 / size));
      rows.forEach((name, r) => { if (r % every === 0) pen.fillText(name, left - 6, (r + 0.5) * size, left - 8); });
      labels(pen, rows.length * size, turned, width, height);
      for (let i = 0; i < 60; i++) {  // the colours' key
        pen.fillStyle = `rgb(${shade(1 - i / 59)})`;
        pen.fillRect(right + 10, 10 + i * Math.min(2, (rows.length * size - 20) / 60), 10, 3);
      }
      const foot = 10 + 60 * Math.min(2, (rows.length * size - 20) / 60);
      pen.fillStyle = css("--soft");
      pen.textAlign = "left"; pen.textBaseline = "middle";
      pen.fillText(short(+high.toPrecision(3)), right + 23, 12);
      pen.fillText(short(+low.toPrecision(3)), right + 23, Math.max(foot, 24));
    }

    function labels(pen, y, turned, width, height) {
      const {left, right, wide, columns} = frame;
      pen.textBaseline = "top";
      const every = spec.over === "role" ? 1 : Math.max(1, Math.ceil(46 / wide));
      columns.forEach((name, c) => {
        if (c % every) return;
        const x = left + (c + 0.5) * wide;
        if (!turned) { pen.textAlign = "center"; return pen.fillText(column(name), x, y + 5); }
        pen.save();
        pen.translate(x - 4, y + 6); pen.rotate(Math.PI / 3);
        pen.textAlign = "left"; pen.fillText(column(name), 0, 0);
        pen.restore();
      });
      pen.textAlign = "center";
      if (spec.over !== "role") pen.fillText(spec.over, (left + right) / 2, height - 13);
    }

    base.addEventListener("pointermove", event => {
      if (!frame) return;
      const box = base.getBoundingClientRect();
      const r = Math.floor((event.clientY - box.top) / frame.size);
      const c = Math.floor((event.clientX - box.left - frame.left) / frame.wide);
      if (!(r >= 0 && r < frame.rows.length && c >= 0 && c < frame.cells[r].length)) return hideTip();
      const word = spec.over === "role" ? "" : `${spec.over} `;
      showTip(event, frame.rows[r], [[css("--accent"), `${word}${column(frame.columns[c])}`, exact(frame.cells[r][c])]]);
    });
    base.addEventListener("pointerleave", hideTip);
    return draw;
  }

  // Chips that show and hide runs ---------------------------------------------------------------

  function chips() {
    const legend = document.getElementById("legend");
    data.runs.forEach((run, number) => {
      const chip = legend.appendChild(node("button", "chip"));
      chip.type = "button";
      chip.title = run.label;
      chip.setAttribute("aria-pressed", "true");
      const sample = chip.appendChild(node("canvas"));
      sample.width = 22; sample.height = 10;
      chip.append(node("span", "", run.label));
      const paint = () => {
        const pen = sample.getContext("2d"), style = styleOf({run: number});
        pen.clearRect(0, 0, 22, 10);
        pen.strokeStyle = style.color; pen.lineWidth = 2.5; pen.setLineDash(style.dash);
        pen.beginPath(); pen.moveTo(0, 5); pen.lineTo(22, 5); pen.stroke();
      };
      drawn.push({draw: paint, always: true});
      chip.addEventListener("click", () => {
        state.hidden.has(number) ? state.hidden.delete(number) : state.hidden.add(number);
        chip.setAttribute("aria-pressed", String(!state.hidden.has(number)));
        redraw();
      });
      chip.addEventListener("dblclick", () => {  // this run alone, or all again
        const alone = state.hidden.size === data.runs.length - 1 && !state.hidden.has(number);
        state.hidden = new Set(alone ? [] : data.runs.map((_, i) => i).filter(i => i !== number));
        [...legend.children].forEach((c, i) => c.setAttribute("aria-pressed", String(!state.hidden.has(i))));
        redraw();
      });
    });
  }

  // What is out of sight is drawn when it comes into sight.
  let asked = false;
  function redraw() {
    for (const each of drawn) each.stale = true;
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; refresh(); });
  }
  function refresh() {
    for (const each of drawn) {
      const box = each.figure?.getBoundingClientRect();
      if (each.stale && (each.always || (box.bottom > -200 && box.top < innerHeight + 200))) {
        each.stale = false;
        each.draw();
      }
    }
  }

  const byId = list => Object.fromEntries(list.map(spec => [spec.id, spec]));
  const charts = byId(data.charts), heats = byId(data.heats);
  chips();
  for (const figure of document.querySelectorAll("figure[data-chart]"))
    drawn.push({figure, draw: chart(figure, charts[figure.dataset.chart])});
  for (const figure of document.querySelectorAll("figure[data-heat]"))
    drawn.push({figure, draw: heat(figure, heats[figure.dataset.heat])});
  document.getElementById("smoothing").addEventListener("input", event => { state.smooth = +event.target.value; redraw(); });
  document.getElementById("raw").checked = state.raw;
  document.getElementById("raw").addEventListener("change", event => { state.raw = event.target.checked; redraw(); });
  document.getElementById("reset").addEventListener("click", () => { state.range = null; redraw(); });
  addEventListener("resize", redraw);
  addEventListener("scroll", () => requestAnimationFrame(refresh), {passive: true});
  dark.addEventListener("change", redraw);
  for (const each of drawn) each.draw();
  document.documentElement.dataset.drawn = String(Math.round(performance.now() - began));
  document.documentElement.dataset.charts = String(drawn.filter(each => each.figure).length);
})();

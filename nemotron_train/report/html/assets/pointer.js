// What the pointer does over a chart: values below it, dragging to zoom in, a double click to
// zoom out.

class ChartPointer {
  constructor(chart) {
    this.chart = chart;
    this.canvas = chart.over;
    this.dragStart = null;  // in pixels, while a drag is going on
    const listen = (name, action) => this.canvas.addEventListener(name, action);
    listen("pointermove", event => this.move(event));
    listen("pointerleave", () => this.leave());
    listen("pointerdown", event => this.press(event));
    listen("pointerup", event => this.release(event));
    listen("dblclick", () => {
      state.range = null;
      redraw();
    });
  }

  emptyCanvas() {
    return prepare(this.canvas, this.chart.plot.clientWidth, this.chart.base.clientHeight);
  }

  pixelOf(event) {
    return event.clientX - this.canvas.getBoundingClientRect().left;
  }

  valueAt(pixel) {
    const {area, limits} = this.chart.frame;
    const share = (pixel - area.left) / (area.right - area.left);
    return limits.x0 + share * (limits.x1 - limits.x0);
  }

  move(event) {
    if (!this.chart.frame) return;
    const {area} = this.chart.frame, pixel = this.pixelOf(event);
    const pen = this.emptyCanvas();
    if (pixel < area.left || pixel > area.right) return hideTip();
    if (this.dragStart !== null) return this.paintDrag(pen, pixel);
    const marks = this.marksAt(event, pixel);
    if (marks.length) {
      const entries = marks.map(mark => [mark.color, `${mark.run}: ${mark.text}`, ""]);
      return showTip(event, "what happened", entries);
    }
    this.showValues(event, pen, pixel);
  }

  paintDrag(pen, pixel) {
    const {area} = this.chart.frame;
    const left = Math.min(this.dragStart, pixel), width = Math.abs(pixel - this.dragStart);
    pen.fillStyle = css("--accent");
    pen.globalAlpha = 0.2;
    pen.fillRect(left, area.top, width, area.bottom - area.top);
  }

  marksAt(event, pixel) {
    const y = event.clientY - this.canvas.getBoundingClientRect().top;
    const isNear = mark => Math.abs(mark.x - pixel) < 6 && Math.abs(mark.y - y) < 9;
    return this.chart.frame.marks.filter(isNear);
  }

  // A line at the pointer, a dot on each curve, and the curves' values from high to low.
  showValues(event, pen, pixel) {
    const {area, limits, lines, toX, toY} = this.chart.frame;
    const x = this.valueAt(pixel), entries = [];
    pen.strokeStyle = css("--soft");
    segment(pen, pixel, area.top, pixel, area.bottom);
    for (const line of lines.filter(l => !l.noise && l.xs.length)) {
      const i = nearest(line.xs, x);
      if (line.ys[i] === null) continue;
      pen.fillStyle = line.color;
      paintDot(pen, toX(line.xs[i]), toY(line.ys[i]), 3);
      const hasSpread = line.lo && line.lo[i] !== null;
      const spread = hasSpread ? ` (${exact(line.lo[i])} – ${exact(line.hi[i])})` : "";
      entries.push([line.color, nameOf(line), `${exact(line.own[i])}${spread}`, line.ys[i]]);
    }
    const {isTime, spec} = this.chart;
    const title = isTime ? time(x, limits.x1) : `${short(x)} ${spec.x}`;
    entries.sort((a, b) => b[3] - a[3]);
    showTip(event, title, entries);
  }

  leave() {
    this.dragStart = null;
    hideTip();
    if (this.chart.frame) this.emptyCanvas();
  }

  press(event) {
    const canZoom = this.chart.frame && !this.chart.isTime;
    if (canZoom && event.pointerType === "mouse") this.dragStart = this.pixelOf(event);
  }

  release(event) {
    if (this.dragStart === null || !this.chart.frame) return;
    const [left, right] = [this.dragStart, this.pixelOf(event)].sort((a, b) => a - b);
    this.dragStart = null;
    if (right - left < 6) return;
    const {x0, x1} = this.chart.frame.limits, [low, high] = state.range ?? [x0, x1];
    state.range = [Math.max(low, this.valueAt(left)), Math.min(high, this.valueAt(right))];
    redraw();
  }
}

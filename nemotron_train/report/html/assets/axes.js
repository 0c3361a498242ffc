// Axes: where the ticks are, how values map to the canvas, and the drawing of both axes.

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
  const found = [], isWide = Math.log10(high / low) > 4;
  for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
    for (const m of isWide ? [1] : [1, 2, 5])
      if (m * 10 ** p >= low * 0.999 && m * 10 ** p <= high * 1.001) found.push(m * 10 ** p);
  return found;
}

// Functions from a value to its place on the canvas, along x and along y.
function scales(limits, area, isLog) {
  const {x0, x1, y0, y1} = limits;
  const f = isLog ? y => Math.log(Math.max(y, 1e-300)) : y => y;
  return {
    toX: x => area.left + (x - x0) / (x1 - x0) * (area.right - area.left),
    toY: y => area.bottom - (f(y) - f(y0)) / (f(y1) - f(y0)) * (area.bottom - area.top),
  };
}

function segment(pen, x0, y0, x1, y1) {
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
}

function paintAxes(pen, spec, frame) {
  const {area, toY} = frame;
  pen.strokeStyle = css("--line");
  pen.fillStyle = css("--soft");
  pen.lineWidth = 1;
  paintYAxis(pen, spec, frame);
  paintXAxis(pen, spec, frame);
  pen.textAlign = "left";
  pen.fillText(spec.y, 2, 0);
  if (spec.zero) {
    pen.strokeStyle = css("--soft");
    segment(pen, area.left, toY(0), area.right, toY(0));
  }
}

function paintYAxis(pen, spec, {limits, area, toY}) {
  pen.textAlign = "right";
  pen.textBaseline = "middle";
  const {y0, y1} = limits;
  for (const y of spec.log ? logTicks(y0, y1) : ticks(y0, y1, 5)) {
    segment(pen, area.left, toY(y), area.right, toY(y));
    pen.fillText(short(y), area.left - 6, toY(y));
  }
}

function paintXAxis(pen, spec, {limits, area, toX, width, height}) {
  pen.textAlign = "center";
  pen.textBaseline = "top";
  const {x0, x1} = limits, isTime = spec.x === "hours";
  const unit = isTime ? timeUnit(x1)[0] : 1;
  for (const tick of ticks(x0 / unit, x1 / unit, Math.max(2, width / 110))) {
    const x = tick * unit;
    segment(pen, toX(x), area.bottom, toX(x), area.bottom + 4);
    pen.fillText(isTime ? time(x, x1) : short(x), toX(x), area.bottom + 6);
  }
  const title = isTime ? "time since the first start" : spec.x;
  pen.fillText(title, (area.left + area.right) / 2, height - 13);
}

// Curves: their smoothing, and the drawing of lines, bands and stacked areas.

// The mean over 2k+1 buckets, of which k on either side. Near an end both sides are shortened
// alike. Buckets are equally wide, so the mean is exact.
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

// How many buckets on either side a line is smoothed over.
function smoothingReach(line) {
  return line.fixed ? 0 : Math.round(line.y.length * state.smooth / 120);
}

// The place of the value nearest to `x` in sorted values.
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    xs[middle] < x ? low = middle : high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
}

function paintDot(pen, x, y, radius) {
  pen.beginPath();
  pen.arc(x, y, radius, 0, 7);
  pen.fill();
}

function paintPolygon(pen, xs, low, high, {toX, toY}) {
  pen.beginPath();
  let isOpen = false;
  xs.forEach((x, i) => {
    if (high[i] === null || low[i] === null) return;
    isOpen ? pen.lineTo(toX(x), toY(high[i])) : pen.moveTo(toX(x), toY(high[i]));
    isOpen = true;
  });
  for (let i = xs.length - 1; i >= 0; i--)
    if (high[i] !== null && low[i] !== null) pen.lineTo(toX(xs[i]), toY(low[i]));
  pen.closePath();
  pen.fill();
}

// The area of a stacked line, or the band around a line.
function paintArea(pen, spec, line, frame) {
  pen.fillStyle = line.color;
  pen.globalAlpha = spec.stack ? 0.75 : 0.17;
  const hasBand = line.lo && (line.band || line.noise || state.raw);
  if (spec.stack) paintPolygon(pen, line.xs, line.under, line.ys, frame);
  else if (hasBand) paintPolygon(pen, line.xs, line.lo, line.hi, frame);
  pen.globalAlpha = 1;
}

function paintPath(pen, spec, xs, ys, {toX, toY}) {
  pen.beginPath();
  let isOpen = false;
  xs.forEach((x, i) => {
    const y = ys[i];
    if (y === null || x === null || (spec.log && y <= 0)) {
      isOpen = false;
      return;
    }
    isOpen ? pen.lineTo(toX(x), toY(y)) : pen.moveTo(toX(x), toY(y));
    isOpen = true;
  });
  pen.stroke();
}

// A smoothed line over its raw values, which are thin and pale, and dots where points are few.
function paintLine(pen, spec, line, frame) {
  if (line.noise || spec.stack) return;
  pen.strokeStyle = line.color;
  pen.lineJoin = "round";
  if (state.raw && smoothingReach(line) && !line.lo) {
    pen.globalAlpha = 0.3;
    pen.lineWidth = 0.8;
    pen.setLineDash([]);
    paintPath(pen, spec, line.xs, line.y, frame);
  }
  pen.globalAlpha = line.raw ? 0.35 : 1;
  pen.lineWidth = line.raw ? 0.9 : 1.7;
  pen.setLineDash(line.raw ? [] : line.dash);
  paintPath(pen, spec, line.xs, line.ys, frame);
  pen.setLineDash([]);
  if (line.dots && line.xs.length <= 60) {
    pen.fillStyle = line.color;
    line.xs.forEach((x, i) => {
      if (line.ys[i] !== null) paintDot(pen, frame.toX(x), frame.toY(line.ys[i]), 2.6);
    });
  }
  pen.globalAlpha = 1;
}

// Colours, dashes and signs, and numbers as text.

// The colours of Okabe and Ito, which colour-blind people can tell apart. Lighter on a dark page.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#c06a9b", "#9a7400", "#3d9bd1", "#6b4c9a",
  "#4d4d4d"];
const DARK = ["#56b4e9", "#ff8c42", "#2fcb9b", "#e79ac4", "#f0c242", "#9ad0f5", "#b79ad6",
  "#c8c8c8"];
const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2, 1, 2, 1, 2]];
// Nine colours of Viridis, which is even in lightness and safe for colour-blind people.
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141],
  [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
const SIGNS = {start: "▲", checkpoint: "|", non_finite: "✕", spike: "✕", straggler: "◆"};
const OTHER_SIGN = "◆";
const SIGNS_TEXT = "▲ start   | checkpoint   ✕ not finite, spike   ◆ other";

const dark = matchMedia("(prefers-color-scheme: dark)");

// The value of a variable of page.css.
function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function color(index) {
  const colors = dark.matches ? DARK : LIGHT;
  return index < 0 ? css("--soft") : colors[index % colors.length];
}

// Colour and dash of a line: those of its run, or its own if it belongs to no run.
function styleOf(line) {
  if (line.run === undefined)
    return {color: color(line.color ?? 0), dash: DASHES[(line.dash ?? 0) % DASHES.length]};
  const run = data.runs[line.run];
  const dash = run.dash + Math.floor(run.color / 8);
  return {color: color(run.color), dash: DASHES[dash % DASHES.length]};
}

// The colour of a share between 0 and 1, as [red, green, blue].
function viridis(share) {
  const last = VIRIDIS.length - 1, place = Math.min(Math.max(share, 0), 1) * last;
  const i = Math.min(Math.floor(place), last - 1);
  return VIRIDIS[i].map((v, c) => Math.round(v + (place - i) * (VIRIDIS[i + 1][c] - v)));
}

// A number with four digits and a unit: 512K for 512000.
function short(value) {
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
    if (size >= unit) return `${+(value / unit).toPrecision(4)}${letter}`;
  return size && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(4)}`;
}

// A number with five digits, for the tooltip.
function exact(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  return size >= 1e5 || (value && size < 1e-3) ? short(value) : `${+value.toPrecision(5)}`;
}

// The unit for an axis that ends at `range` hours, as [its length in hours, its name].
function timeUnit(range) {
  return range > 72 ? [24, "d"] : range > 2 ? [1, "h"] : [1 / 60, "min"];
}

// A time in hours as text, in the unit of its axis.
function time(value, range) {
  const [unit, name] = timeUnit(range);
  return `${+(value / unit).toPrecision(3)} ${name}`;
}

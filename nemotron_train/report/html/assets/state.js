// What the page shows: the numbers in it, the reader's choices, and when things are drawn again.
// Does not own: which charts there are (data.py), how they look (the other scripts).
const began = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);

// `range`: the tokens or steps zoomed in on, or null for all. `smooth`: where the slider stands, 0 to
// 10.
// The raw values of many runs hide one another, so with more than six runs they start off.
const state = {hidden: new Set(), range: null, smooth: 3, raw: data.runs.length <= 6};

// Everything that is drawn: objects with draw(). They have a `figure`, and wait while it is out of
// sight, or `always` is true.
const drawn = [];
let isAsked = false;

const isShown = line => line.run === undefined || !state.hidden.has(line.run);
const nameOf = line => line.run === undefined ? line.name : data.runs[line.run].label;

// Draws everything again in the next frame. What is out of sight waits until it is scrolled to.
function redraw() {
  for (const each of drawn) each.stale = true;
  if (isAsked) return;
  isAsked = true;
  requestAnimationFrame(() => {
    isAsked = false;
    refresh();
  });
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

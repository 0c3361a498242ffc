// Puts the page together: a button for each run, the charts and heat maps, and the controls.

class RunButton {
  constructor(run, number) {
    this.number = number;
    this.always = true;
    this.button = node("button", "chip");
    this.button.type = "button";
    this.button.title = run.label;
    this.sample = this.button.appendChild(node("canvas"));
    this.sample.width = 22;
    this.sample.height = 10;
    this.button.append(node("span", "", run.label));
    this.showState();
  }

  showState() {
    this.button.setAttribute("aria-pressed", String(!state.hidden.has(this.number)));
  }

  draw() {
    const pen = this.sample.getContext("2d"), style = styleOf({run: this.number});
    pen.clearRect(0, 0, 22, 10);
    pen.strokeStyle = style.color;
    pen.lineWidth = 2.5;
    pen.setLineDash(style.dash);
    segment(pen, 0, 5, 22, 5);
  }

  toggle() {
    const {hidden} = state;
    hidden.has(this.number) ? hidden.delete(this.number) : hidden.add(this.number);
  }

  // Shows this run alone, or all runs if it is alone already.
  toggleAlone() {
    const {hidden} = state, numbers = data.runs.map((_, i) => i);
    const isAlone = hidden.size === numbers.length - 1 && !hidden.has(this.number);
    state.hidden = new Set(isAlone ? [] : numbers.filter(i => i !== this.number));
  }
}

function addRunButtons() {
  const legend = document.getElementById("legend");
  const all = data.runs.map((run, number) => new RunButton(run, number));
  const showStates = () => {
    for (const each of all) each.showState();
    redraw();
  };
  for (const each of all) {
    legend.append(each.button);
    drawn.push(each);
    each.button.addEventListener("click", () => {
      each.toggle();
      showStates();
    });
    each.button.addEventListener("dblclick", () => {
      each.toggleAlone();
      showStates();
    });
  }
}

function addFigures() {
  const byId = list => Object.fromEntries(list.map(spec => [spec.id, spec]));
  const charts = byId(data.charts), heats = byId(data.heats);
  for (const figure of document.querySelectorAll("figure[data-chart]"))
    drawn.push(new Chart(figure, charts[figure.dataset.chart]));
  for (const figure of document.querySelectorAll("figure[data-heat]"))
    drawn.push(new HeatMap(figure, heats[figure.dataset.heat]));
}

function connectControls() {
  const smoothing = document.getElementById("smoothing"), raw = document.getElementById("raw");
  smoothing.addEventListener("input", () => {
    state.smooth = +smoothing.value;
    redraw();
  });
  raw.checked = state.raw;
  raw.addEventListener("change", () => {
    state.raw = raw.checked;
    redraw();
  });
  document.getElementById("reset").addEventListener("click", () => {
    state.range = null;
    redraw();
  });
  addEventListener("resize", redraw);
  addEventListener("scroll", () => requestAnimationFrame(refresh), {passive: true});
  dark.addEventListener("change", redraw);
}

addRunButtons();
addFigures();
connectControls();
for (const each of drawn) each.draw();
// How long it took, and how many charts there are, for the tests in a browser.
document.documentElement.dataset.drawn = String(Math.round(performance.now() - began));
document.documentElement.dataset.charts = String(drawn.filter(each => each.figure).length);

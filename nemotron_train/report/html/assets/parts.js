// Parts of the document that charts and heat maps share: elements, canvases, captions, the
// tooltip. Text from a run enters the document as text only.

function node(tag, cls, text) {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Empties a canvas and returns a pen that counts in CSS pixels.
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

// The title, and a menu if there are several options. `onPick` gets the number of an option.
function addCaption(figure, spec, onPick) {
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

const tip = document.body.appendChild(node("div", "tip"));

// Shows the tooltip at the pointer. `entries`: [colour, name, value], of which 14 are shown.
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
  const isTooFarRight = event.clientX + 16 + tip.offsetWidth > innerWidth;
  const left = isTooFarRight
    ? Math.max(4, event.clientX - tip.offsetWidth - 12) : event.clientX + 16;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 4)}px`;
}

function hideTip() {
  tip.style.display = "none";
}

// A heat map: a coloured cell for each row and column, with the value in it where it fits.

class HeatMap {
  constructor(figure, spec) {
    this.figure = figure;
    this.spec = spec;
    this.picked = 0;  // the option shown
    this.frame = null;  // what was drawn last and where, for the pointer
    this.isRoles = spec.over === "role";
    addCaption(figure, spec, option => {
      this.picked = option;
      this.draw();
    });
    this.plot = figure.appendChild(node("div", "plot"));
    this.canvas = this.plot.appendChild(node("canvas"));
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", spec.title);
    this.canvas.addEventListener("pointermove", event => this.move(event));
    this.canvas.addEventListener("pointerleave", hideTip);
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    this.frame = this.layOut(width);
    const pen = prepare(this.canvas, width, this.frame.height);
    const colors = this.colorScale();
    this.paintCells(pen, colors);
    this.paintRowNames(pen);
    this.paintColumnNames(pen);
    this.paintColorKey(pen, colors);
  }

  layOut(width) {
    const {rows, columns, cells} = this.spec.options[this.picked];
    const cellHeight = Math.min(22, Math.max(4, 900 / rows.length));
    const left = Math.min(150, width * 0.34), right = width - 64;
    const cellWidth = (right - left) / columns.length;
    const isTurned = this.isRoles && cellWidth < 92;  // the columns' names
    const bottom = rows.length * cellHeight;
    const height = bottom + (isTurned ? 96 : 34) + 6;
    return {rows, columns, cells, left, right, bottom, height, cellWidth, cellHeight, isTurned};
  }

  isKnown(value) {
    return value !== null && !(this.spec.log && value <= 0);
  }

  // The least and greatest value, and the share of the way between them of any value.
  colorScale() {
    const values = this.frame.cells.flat().filter(v => this.isKnown(v));
    const f = this.spec.log ? Math.log : v => v;
    const low = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0;
    let high = values.length ? values.reduce((a, b) => Math.max(a, b)) : 1;
    if (high <= low) high = low + (Math.abs(low) || 1);
    return {low, high, share: v => (f(v) - f(low)) / (f(high) - f(low))};
  }

  paintCells(pen, {share}) {
    const {cells, left, cellWidth, cellHeight} = this.frame;
    const hasRoom = cellWidth >= 30 && cellHeight >= 14;
    cells.forEach((row, r) => row.forEach((value, c) => {
      const isKnown = this.isKnown(value);
      const x = left + c * cellWidth, y = r * cellHeight;
      pen.fillStyle = isKnown ? `rgb(${viridis(share(value))})` : css("--panel");
      pen.fillRect(x, y, Math.ceil(cellWidth), Math.ceil(cellHeight));
      if (!isKnown || !hasRoom) return;
      pen.fillStyle = share(value) > 0.6 ? "#111" : "#fff";
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      const text = `${+value.toPrecision(3)}`;
      pen.fillText(text, left + (c + 0.5) * cellWidth, (r + 0.5) * cellHeight);
    }));
  }

  paintRowNames(pen) {
    const {rows, left, cellHeight} = this.frame;
    const every = Math.max(1, Math.ceil(12 / cellHeight));
    pen.fillStyle = css("--soft");
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    rows.forEach((name, r) => {
      if (r % every === 0) pen.fillText(name, left - 6, (r + 0.5) * cellHeight, left - 8);
    });
  }

  paintColumnNames(pen) {
    const {columns, left, right, bottom, height, cellWidth, isTurned} = this.frame;
    const every = this.isRoles ? 1 : Math.max(1, Math.ceil(46 / cellWidth));
    pen.textBaseline = "top";
    pen.textAlign = isTurned ? "left" : "center";
    columns.forEach((name, c) => {
      if (c % every) return;
      const x = left + (c + 0.5) * cellWidth;
      if (!isTurned) return pen.fillText(this.columnName(name), x, bottom + 5);
      pen.save();
      pen.translate(x - 4, bottom + 6);
      pen.rotate(Math.PI / 3);
      pen.fillText(this.columnName(name), 0, 0);
      pen.restore();
    });
    pen.textAlign = "center";
    if (!this.isRoles) pen.fillText(this.spec.over, (left + right) / 2, height - 13);
  }

  columnName(value) {
    return ["tokens", "steps"].includes(this.spec.over) ? short(+value.toPrecision(3)) : `${value}`;
  }

  // A strip of all colours on the right, with the greatest value on top and the least below.
  paintColorKey(pen, {low, high}) {
    const {right, bottom} = this.frame;
    const step = Math.min(2, (bottom - 20) / 60);
    for (let i = 0; i < 60; i++) {
      pen.fillStyle = `rgb(${viridis(1 - i / 59)})`;
      pen.fillRect(right + 10, 10 + i * step, 10, 3);
    }
    pen.fillStyle = css("--soft");
    pen.textAlign = "left";
    pen.textBaseline = "middle";
    pen.fillText(short(+high.toPrecision(3)), right + 23, 12);
    pen.fillText(short(+low.toPrecision(3)), right + 23, Math.max(10 + 60 * step, 24));
  }

  move(event) {
    if (!this.frame) return;
    const {rows, columns, cells, left, cellWidth, cellHeight} = this.frame;
    const box = this.canvas.getBoundingClientRect();
    const r = Math.floor((event.clientY - box.top) / cellHeight);
    const c = Math.floor((event.clientX - box.left - left) / cellWidth);
    const isInside = r >= 0 && r < rows.length && c >= 0 && c < cells[r].length;
    if (!isInside) return hideTip();
    const word = this.isRoles ? "" : `${this.spec.over} `;
    const name = `${word}${this.columnName(columns[c])}`;
    showTip(event, rows[r], [[css("--accent"), name, exact(cells[r][c])]]);
  }
}

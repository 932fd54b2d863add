// Heat maps: a number for every expert (columns) of every layer (rows), to point at, order and compare.

const RAMPS = {
  light: ["#f7f9e8", "#e4f2b4", "#c0e6b5", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58"],
  dark: ["#2d1543", "#45287b", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"],
};
const DIVERGING = {
  light: ["#1d5fa8", "#4393c3", "#92c5de", "#d1e5f0", "#f5f5f4", "#fddbc7", "#f4a582", "#d6604d", "#b2182b"],
  dark: ["#8cc8ff", "#4d97e0", "#2a639c", "#213a59", "#23272e", "#552c29", "#96403a", "#da6053", "#ff9f8f"],
};

/** 256 colours between the stops. */
function ramp(stops) {
  const rgb = stops.map((s) => [1, 3, 5].map((i) => parseInt(s.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const x = (i / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(x), stops.length - 2);
    return `rgb(${rgb[low].map((v, c) => Math.round(v + (rgb[low + 1][c] - v) * (x - low))).join()})`;
  });
}

const mean = (list) => list.reduce((sum, v) => sum + v, 0) / list.length;
const numbers = (list) => list.filter((v) => v !== null);

/** Ranks from 1 (lowest), ties sharing their mean; nothing where there is nothing. */
function ranks(list) {
  const order = list.map((_, i) => i).filter((i) => list[i] !== null).sort((a, b) => list[a] - list[b]);
  const out = list.map(() => null);
  for (let i = 0; i < order.length;) {
    let j = i;
    while (j < order.length && list[order[j]] === list[order[i]]) j++;
    for (let k = i; k < j; k++) out[order[k]] = (i + j + 1) / 2;
    i = j;
  }
  return out;
}

/** Share of the layer's experts that are below, ties counting half: 0 to 1. */
function percentiles(row) {
  const n = numbers(row).length;
  return ranks(row).map((r) => (r === null ? null : n < 2 ? 0.5 : (r - 1) / (n - 1)));
}

/** Pearson's correlation of pairs; null without variation. */
function pearson(x, y) {
  const [mx, my] = [mean(x), mean(y)];
  let [xy, xx, yy] = [0, 0, 0];
  x.forEach((v, i) => {
    xy += (v - mx) * (y[i] - my);
    xx += (v - mx) ** 2;
    yy += (y[i] - my) ** 2;
  });
  return xx > 0 && yy > 0 ? xy / Math.sqrt(xx * yy) : null;
}
const spearman = (x, y) => pearson(ranks(x), ranks(y));

/** How values become colours. `kind`: as they are, clipped at the 1st and 99th hundredth, or the rank within the layer. */
function scaleOf(map, kind) {
  const all = numbers(map.values.flat()).sort((a, b) => a - b);
  const at = (q) => all[Math.round(q * (all.length - 1))] ?? 0;
  if (kind === "rank") {
    return { values: map.values.map(percentiles), low: 0, high: 1, ends: ["lowest of its layer", "", "highest"], diverging: false };
  }
  let [low, high] = kind === "clip" ? [at(0.01), at(0.99)] : [at(0), at(1)];
  if (map.diverging) {
    high = Math.max(Math.abs(low), Math.abs(high));
    low = -high;
  }
  const cut = kind === "clip" ? ["≤ ", "≥ "] : ["", ""];
  const ends = [cut[0] + show(low), map.diverging ? "0" : "", cut[1] + show(high)];
  return { values: map.values, low, high, ends, diverging: map.diverging };
}
const place = (scale, v) => (scale.high > scale.low ? Math.min(1, Math.max(0, (v - scale.low) / (scale.high - scale.low))) : 0.5);
const colours = (scale) => ramp((scale.diverging ? DIVERGING : RAMPS)[isDark() ? "dark" : "light"]);
const tokenOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** In which order experts and layers stand: `rows[r]` is a layer's index, `columns[r]` its experts from left to right. */
function orderBy(map, experts, layers) {
  const rows = map.values.map((_, i) => i);
  const rowMean = map.values.map((row) => mean(numbers(row)));
  if (layers === "mean") rows.sort((a, b) => rowMean[b] - rowMean[a]);
  const width = Math.max(...map.values.map((row) => row.length));
  const ids = Array.from({ length: width }, (_, e) => e);
  const columnMean = ids.map((e) => mean(numbers(map.values.map((row) => row[e] ?? null))));
  const down = (list) => (a, b) => (list[b] ?? -Infinity) - (list[a] ?? -Infinity);
  const columns = rows.map((r) => {
    const own = ids.filter((e) => e < map.values[r].length);
    if (experts === "value") own.sort(down(map.values[r]));
    if (experts === "mean") own.sort(down(columnMean));
    return own;
  });
  return { rows, columns, width };
}

/** A drawn map. `update(map, options)` draws it anew. */
class Heat {
  constructor(onscroll) {
    this.canvas = el("canvas", { tabindex: 0, role: "img" });
    this.labels = el("canvas", { "aria-hidden": true });
    this.box = el("div", { class: "box" });
    this.pin = el("div", { class: "box pin" });
    this.cells = el("div", { class: "cells", onscroll: () => onscroll(this) }, this.canvas, this.box, this.pin);
    this.caption = el("p", { class: "caption" });
    this.rampCanvas = el("canvas", { width: 220, height: 12 });
    this.tick = el("i");
    this.legend = el("div", { class: "legend" });
    this.root = el("div", {}, this.caption, el("div", { class: "heat" }, this.labels, this.cells), this.legend);
    this.canvas.addEventListener("pointermove", (event) => {
      const cell = this.cellAt(event);
      point(cell);
      showTip(cell, event.clientX, event.clientY);
    });
    this.canvas.addEventListener("pointerleave", () => {
      point(null);
      tip.hidden = true;
    });
    this.canvas.addEventListener("click", (event) => choose(this.cellAt(event), Boolean(report.cards)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    cells.listeners.push(() => this.mark());
  }

  update(map, { order, kind, cell }) {
    this.map = map;
    this.order = order;
    this.scale = scaleOf(map, kind);
    this.place = order.columns.map((row) => {
      const at = [];
      row.forEach((e, c) => (at[e] = c));
      return at;
    });
    this.rowAt = [];
    order.rows.forEach((r, i) => (this.rowAt[r] = i));
    const dots = devicePixelRatio || 1;
    this.w = Math.max(1, Math.round(cell.w * dots)) / dots;
    this.h = Math.max(1, Math.round(cell.h * dots)) / dots;
    this.caption.replaceChildren(map.name, el("span", { class: "about" }, map.about));
    this.canvas.setAttribute("aria-label", `${map.name}: heat map of ${order.rows.length} layers and ${order.width} experts; `
      + "arrow keys move, Enter chooses");
    this.draw(dots);
    this.drawLabels(dots);
    this.drawLegend();
    this.mark();
  }

  draw(dots) {
    const { order, scale } = this;
    const context = sized(this.canvas, order.width * this.w, order.rows.length * this.h, dots);
    const [w, h] = [Math.round(this.w * dots), Math.round(this.h * dots)];
    const gap = Math.min(w, h) >= 7 ? 1 : 0;
    const table = colours(scale);
    const empty = hatch(context);
    context.setTransform(1, 0, 0, 1, 0, 0);
    order.rows.forEach((r, i) => order.columns[i].forEach((e, c) => {
      const v = scale.values[r][e];
      context.fillStyle = v === null ? empty : table[Math.round(255 * place(scale, v))];
      context.fillRect(c * w, i * h, w - gap, h - gap);
    }));
  }

  drawLabels(dots) {
    const context = sized(this.labels, 44, this.order.rows.length * this.h, dots);
    context.font = `${Math.min(12, Math.max(8, this.h - 1))}px system-ui, sans-serif`;
    context.fillStyle = tokenOf("--soft");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(9 / this.h);
    this.order.rows.forEach((r, i) => {
      if (i % every === 0) context.fillText(`L${this.map.layers[r]}`, 38, Math.max(5, (i + 0.5) * this.h));
    });
  }

  drawLegend() {
    const context = this.rampCanvas.getContext("2d");
    colours(this.scale).forEach((colour, i) => {
      context.fillStyle = colour;
      context.fillRect((i / 256) * 220, 0, 2, 12);
    });
    const [low, middle, high] = this.scale.ends;
    const ramp = el("div", { class: "ramp" }, this.rampCanvas, this.tick);
    const none = this.map.values.some((row) => row.includes(null)) ? [el("span", { class: "none" }), "no value"] : [];
    this.legend.replaceChildren(low, ramp, high, middle && el("span", {}, `(${middle} in the middle)`), ...none);
  }

  /** The expert under the pointer. */
  cellAt(event) {
    const rect = this.canvas.getBoundingClientRect();
    const i = Math.floor((event.clientY - rect.top) / this.h);
    const expert = this.order.columns[i]?.[Math.floor((event.clientX - rect.left) / this.w)];
    return expert === undefined ? null : { row: this.order.rows[i], expert };
  }

  mark() {
    this.put(this.box, cells.at);
    this.put(this.pin, cells.chosen);
    const v = cells.at && this.scale?.values[cells.at.row]?.[cells.at.expert];
    this.tick.style.display = v === null || v === undefined ? "none" : "block";
    if (v !== null && v !== undefined) this.tick.style.left = `${100 * place(this.scale, v)}%`;
  }

  put(box, cell) {
    const at = cell && this.map && this.rowAt[cell.row];
    const c = cell && this.place?.[at]?.[cell.expert];
    box.style.display = c === undefined || c === null ? "none" : "block";
    if (c === undefined || c === null) return;
    const grow = Math.max(0, (8 - this.w) / 2);
    box.style.left = `${Math.max(0, c * this.w - 2 - grow)}px`;
    box.style.top = `${Math.max(0, at * this.h - 2)}px`;
    box.style.width = `${this.w + 3 + 2 * grow}px`;
    box.style.height = `${this.h + 3}px`;
  }

  key(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const from = cells.at || cells.chosen || { row: this.order.rows[0], expert: this.order.columns[0][0] };
    if (event.key === "Enter") choose(from, true);
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const i = Math.min(this.order.rows.length - 1, Math.max(0, this.rowAt[from.row] + step[0]));
    const row = this.order.columns[i];
    const c = Math.min(row.length - 1, Math.max(0, this.place[this.rowAt[from.row]][from.expert] + step[1]));
    const cell = { row: this.order.rows[i], expert: row[c] };
    point(cell);
    const left = c * this.w;
    if (left < this.cells.scrollLeft) this.cells.scrollLeft = left;
    if (left + this.w > this.cells.scrollLeft + this.cells.clientWidth) this.cells.scrollLeft = left + this.w - this.cells.clientWidth;
    const rect = this.canvas.getBoundingClientRect();
    showTip(cell, rect.left + left - this.cells.scrollLeft, rect.top + i * this.h);
  }
}

/** Gives a canvas a size in CSS pixels, sharp on this screen. */
function sized(canvas, width, height, dots) {
  canvas.width = Math.max(1, Math.round(width * dots));
  canvas.height = Math.max(1, Math.round(height * dots));
  canvas.style.width = `${canvas.width / dots}px`;
  canvas.style.height = `${canvas.height / dots}px`;
  const context = canvas.getContext("2d");
  context.setTransform(dots, 0, 0, dots, 0, 0);
  return context;
}

/** The pattern of a cell without a value. */
function hatch(context) {
  const tile = el("canvas", { width: 6, height: 6 });
  const c = tile.getContext("2d");
  c.fillStyle = tokenOf("--fill");
  c.fillRect(0, 0, 6, 6);
  c.strokeStyle = tokenOf("--line");
  c.beginPath();
  [[0, 6, 6, 0], [-3, 3, 3, -3], [3, 9, 9, 3]].forEach(([a, b, x, y]) => (c.moveTo(a, b), c.lineTo(x, y)));
  c.stroke();
  return context.createPattern(tile, "repeat");
}

/** "3 of 32": place of a cell's value in its layer, highest first. */
function rankOf(map, cell) {
  const row = map.values[cell.row];
  const v = row?.[cell.expert];
  if (v === null || v === undefined) return null;
  const above = row.filter((x) => x !== null && x > v).length;
  return { value: v, rank: above + 1, of: numbers(row).length };
}

let shownMaps = [];
function showTip(cell, x, y) {
  tip.hidden = !cell;
  if (!cell) return;
  const line = (map) => {
    const r = rankOf(map, cell);
    return el("div", {}, `${map.name}: ${r ? `${show(r.value)} (rank ${r.rank} of ${r.of} in the layer)` : "no value"}`);
  };
  tip.replaceChildren(el("b", {}, `layer ${cells.layers[cell.row]}, expert ${cell.expert}`), ...shownMaps.map(line));
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  tip.style.left = `${Math.max(4, Math.min(x + 16, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 18 + height > innerHeight ? y - height - 12 : y + 18}px`;
}

// The section of the maps: choosing one or two, their order and scale, their difference and scatter.

/** Maps by their groups: "task: arithmetic" belongs to the group "task". */
function mapOptions(first) {
  const groups = new Map();
  const options = first ? [first] : [];
  report.maps.forEach((map, i) => {
    const [, group, name] = /^([^:]+): (.+)$/.exec(map.name) || [];
    if (!group) return options.push([i, map.name]);
    if (!groups.has(group)) options.push([group, groups.set(group, []).get(group)]);
    groups.get(group).push([i, name]);
  });
  return options;
}

function differenceOf(a, b, byRank) {
  const of = (map) => (byRank ? map.values.map(percentiles) : map.values);
  const [x, y] = [of(a), of(b)];
  const minus = (v, w) => (v === null || w === null || v === undefined || w === undefined ? null : v - w);
  const what = byRank ? "difference of the ranks within each layer, as shares (-1 to 1)" : "difference of the values";
  return {
    name: `${a.name} − ${b.name}`, about: what, layers: a.layers, diverging: true,
    values: x.map((row, r) => row.map((v, e) => minus(v, y[r]?.[e]))),
  };
}

/** The scatter of two maps: a point for each expert, and how they correlate. */
class Scatter {
  constructor() {
    this.canvas = el("canvas", { role: "img" });
    this.text = el("p", { class: "soft" });
    this.root = el("div", {}, this.text, this.canvas);
    this.canvas.addEventListener("pointermove", (event) => {
      const cell = this.nearest(event);
      point(cell);
      showTip(cell, event.clientX, event.clientY);
    });
    this.canvas.addEventListener("pointerleave", () => {
      point(null);
      tip.hidden = true;
    });
    this.canvas.addEventListener("click", (event) => choose(this.nearest(event), Boolean(report.cards)));
    cells.listeners.push(() => this.root.isConnected && this.draw());
  }

  update(a, b) {
    [this.a, this.b] = [a, b];
    const points = a.values.flatMap((row, r) => row.map((x, expert) => ({ x, y: b.values[r]?.[expert] ?? null, row: r, expert })));
    this.points = points.filter((p) => p.x !== null && p.y !== null);
    const [x, y] = [this.points.map((p) => p.x), this.points.map((p) => p.y)];
    const inLayer = a.values.map((_, r) => {
      const own = this.points.filter((p) => p.row === r);
      return own.length > 1 ? spearman(own.map((p) => p.x), own.map((p) => p.y)) : null;
    });
    const within = numbers(inLayer);
    this.text.textContent = this.points.length < 2 ? "too few experts have both values"
      : `${this.points.length} experts; Pearson ${show(pearson(x, y))}, Spearman ${show(spearman(x, y))}, `
        + `mean of the layers' own Spearman ${show(within.length ? mean(within) : null)}`;
    this.canvas.setAttribute("aria-label", `scatter of ${b.name} against ${a.name}; ${this.text.textContent}`);
    const range = (list) => {
      const [low, high] = [list.reduce((m, v) => Math.min(m, v), Infinity), list.reduce((m, v) => Math.max(m, v), -Infinity)];
      return high > low ? [low, high] : [low - 1, high + 1];
    };
    [this.rangeX, this.rangeY] = [range(x), range(y)];
    this.draw();
  }

  spot(p) {
    const along = (v, [low, high], from, to) => from + ((v - low) / (high - low)) * (to - from);
    return [along(p.x, this.rangeX, 76, this.width - 16), along(p.y, this.rangeY, this.height - 46, 14)];
  }

  draw() {
    [this.width, this.height] = [Math.min(720, Math.max(320, main.clientWidth - 60)), 440];
    const context = sized(this.canvas, this.width, this.height, devicePixelRatio || 1);
    if (!this.points.length) return;
    const table = ramp(RAMPS[isDark() ? "dark" : "light"]);
    const size = this.points.length > 3000 ? 1.6 : 3.2;
    context.strokeStyle = tokenOf("--line");
    context.strokeRect(64.5, 8.5, this.width - 72, this.height - 48);
    for (const p of this.points) {
      const [x, y] = this.spot(p);
      context.fillStyle = table[60 + Math.round((195 * p.row) / Math.max(1, this.a.layers.length - 1))];
      context.beginPath();
      context.arc(x, y, size, 0, 7);
      context.fill();
    }
    for (const [cell, colour] of [[cells.chosen, "--pin"], [cells.at, "--hover"]]) {
      const p = cell && this.points.find((q) => same(q, cell));
      if (!p) continue;
      context.strokeStyle = tokenOf(colour);
      context.lineWidth = 2;
      context.beginPath();
      context.arc(...this.spot(p), 6, 0, 7);
      context.stroke();
    }
    this.axes(context);
  }

  axes(context) {
    context.fillStyle = tokenOf("--soft");
    context.font = "12px system-ui, sans-serif";
    const [bottom, right] = [this.height - 24, this.width - 8];
    context.textAlign = "left";
    context.fillText(show(this.rangeX[0]), 64, bottom);
    context.textAlign = "right";
    context.fillText(show(this.rangeX[1]), right, bottom);
    context.fillText(show(this.rangeY[0]), 58, this.height - 42);
    context.fillText(show(this.rangeY[1]), 58, 18);
    context.textAlign = "center";
    context.fillText(this.a.name, (64 + right) / 2, bottom + 16);
    context.save();
    context.translate(14, this.height / 2 - 20);
    context.rotate(-Math.PI / 2);
    context.fillText(`${this.b.name} (darker or brighter: later layers)`, 0, 0);
    context.restore();
  }

  nearest(event) {
    const rect = this.canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - rect.left, event.clientY - rect.top];
    let [best, distance] = [null, 15 * 15];
    for (const p of this.points) {
      const [px, py] = this.spot(p);
      const d = (px - x) ** 2 + (py - y) ** 2;
      if (d < distance) [best, distance] = [p, d];
    }
    return best && { row: best.row, expert: best.expert };
  }
}

/** A small picture of every map, drawn when it comes into view; a click chooses it. */
function gallery(state, redraw) {
  const root = el("div", { class: "gallery", role: "group", "aria-label": "all maps" });
  const draw = (button) => {
    const map = report.maps[button.dataset.map];
    const [scale, canvas] = [scaleOf(map, "clip"), button.querySelector("canvas")];
    const width = Math.max(...map.values.map((row) => row.length));
    [canvas.width, canvas.height] = [width, map.values.length];
    const [context, table] = [canvas.getContext("2d"), colours(scale)];
    map.values.forEach((row, r) => row.forEach((v, e) => {
      if (v === null) return;
      context.fillStyle = table[Math.round(255 * place(scale, v))];
      context.fillRect(e, r, 1, 1);
    }));
  };
  const seen = new IntersectionObserver((entries) => entries.filter((e) => e.isIntersecting).forEach((e) => {
    draw(e.target);
    seen.unobserve(e.target);
  }), { root });
  report.maps.forEach((map, i) => {
    const pick = () => {
      state.a = i;
      redraw();
    };
    root.append(el("button", { "data-map": i, title: map.about, onclick: pick },
      el("span", {}, map.name), el("span", { class: "small" }, el("canvas", { "aria-hidden": true }), el("i"))));
  });
  const observe = () => root.childNodes.forEach((button) => seen.observe(button));
  observe();
  theme.listeners.push(observe);
  cells.listeners.push(() => root.querySelectorAll("i").forEach((dot, i) => {
    const [cell, values] = [cells.at || cells.chosen, report.maps[i].values];
    dot.style.display = cell ? "block" : "none";
    if (!cell) return;
    const width = Math.max(...values.map((row) => row.length));
    dot.style.left = `${(100 * cell.expert) / width}%`;
    dot.style.top = `${(46 * cell.row) / values.length}px`;
    dot.style.width = `${100 / width}%`;
    dot.style.height = `${46 / values.length}px`;
  }));
  return root;
}

function drawMaps() {
  const state = { a: 0, b: "", view: "pair", experts: "id", layers: "id", kind: "value", zoom: 0 };
  const follow = (heat) => heats.filter((h) => h !== heat && h.cells.scrollLeft !== heat.cells.scrollLeft)
    .forEach((h) => (h.cells.scrollLeft = heat.cells.scrollLeft));
  const heats = [new Heat(follow), new Heat(follow)];
  const scatter = new Scatter();
  const panels = el("div", { class: "panels" });
  const set = (name) => (value) => {
    state[name] = value;
    redraw();
  };
  const zoom = (by) => () => {
    state.zoom = by === 0 ? 0 : Math.max(-3, Math.min(6, state.zoom + by));
    redraw();
  };
  const views = [["pair", "side by side"], ["difference", "difference"], ["ranks", "difference of ranks"], ["scatter", "scatter"]];
  const bar = () => el("div", { class: "bar" },
    choice("map", mapOptions(), state.a, set("a")),
    choice("compare with", mapOptions(["", "none"]), state.b, set("b")),
    state.b === "" ? null : choice("as", views, state.view, set("view")),
    choice("experts", [["id", "by number"], ["value", "by value in each layer"], ["mean", "by mean over layers"]], state.experts, set("experts")),
    choice("layers", [["id", "by number"], ["mean", "by mean"]], state.layers, set("layers")),
    choice("colours", [["value", "values"], ["clip", "values, extremes clipped"], ["rank", "rank in the layer"]], state.kind, set("kind")),
    el("span", {}, el("button", { onclick: zoom(-1), "aria-label": "smaller cells" }, "−"), " ",
      el("button", { onclick: zoom(0) }, "fit"), " ", el("button", { onclick: zoom(1), "aria-label": "larger cells" }, "+")));
  const holder = el("div");
  const small = report.maps.length > 2 ? gallery(state, () => redraw()) : null;

  const redraw = () => {
    const [a, b] = [report.maps[state.a], state.b === "" ? null : report.maps[state.b]];
    const focus = document.activeElement?.closest?.(".bar label, .bar button");
    const index = focus ? [...holder.querySelectorAll("label, button")].indexOf(focus) : -1;
    holder.replaceChildren(bar());
    if (index >= 0) [...holder.querySelectorAll("label, button")][index]?.closest("label, button").querySelector("select")?.focus();
    small?.childNodes.forEach((button, i) => button.setAttribute("aria-pressed", String(i === Number(state.a))));
    const order = orderBy(a, state.experts, state.layers);
    const pair = b && state.view === "pair";
    const space = main.clientWidth - 56 - 48;
    const beside = pair && order.width * 9 * 2 < space;
    const fit = Math.floor((beside ? space / 2 - 56 : space) / order.width);
    const w = Math.round(Math.min(34, Math.max(4, fit)) * 1.35 ** state.zoom);
    const cell = { w: Math.max(2, w), h: Math.max(8, Math.min(24, w)) };
    panels.className = beside ? "panels two" : "panels";
    shownMaps = b ? [a, b] : [a];
    const options = { order, kind: state.kind, cell };
    if (b && state.view === "scatter") {
      panels.replaceChildren(scatter.root);
      scatter.update(a, b);
    } else if (b && state.view !== "pair") {
      const map = differenceOf(a, b, state.view === "ranks");
      shownMaps = [map, a, b];
      panels.replaceChildren(heats[0].root);
      heats[0].update(map, { ...options, kind: state.kind === "rank" ? "value" : state.kind });
    } else {
      panels.replaceChildren(heats[0].root, ...(pair ? [heats[1].root] : []));
      heats[0].update(a, options);
      if (pair) heats[1].update(b, options);
    }
  };
  main.append(el("section", { id: "maps" }, el("h2", {}, "Every expert"), small, holder, el("div", { style: "height: 8px" }), panels));
  redraw();
  theme.listeners.push(redraw);
  let wait = 0;
  addEventListener("resize", () => {
    clearTimeout(wait);
    wait = setTimeout(redraw, 120);
  });
}

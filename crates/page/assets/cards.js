// Cards: what is known of each expert, found by search, by flags, by order, or by a click in a map.

const ROW = 46;

/** What of a card is searched, in lower case; made when it is first needed. */
function searchable(card) {
  card.text ??= [`${card.layer}:${card.expert}`, ...card.flags, ...card.lists.flat(2).map((v) => (typeof v === "string" ? v : ""))]
    .join("\n").toLowerCase();
  return card.text;
}

const cellOfCard = (card) => ({ row: cells.layers.indexOf(card.layer), expert: card.expert });
/** Maps that are no part of a group: the numbers on a card. */
const plainMaps = () => report.maps.filter((map) => !/^[^:]+: /.test(map.name));

function drawCards() {
  const { about, lists, flags, cards } = report.cards;
  const state = { text: "", layer: "", flag: "", order: "id", shown: cards };
  const space = el("div");
  const list = el("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "experts" }, space);
  const detail = el("article", { class: "card", id: "card", "aria-live": "polite" });
  const count = el("span", { class: "soft" });

  const row = (card, i) => {
    const cell = cellOfCard(card);
    const names = card.lists.slice(0, 2).map((rows) => rows.slice(0, 4).map((r) => r[0]).join("  ")).filter(Boolean);
    return el("div", { class: "row", role: "option", style: `top: ${i * ROW}px`, "aria-selected": String(same(cell, cells.chosen)),
      onclick: () => choose(cell), onpointerenter: () => point(cell), onpointerleave: () => point(null) },
      el("div", {}, el("b", {}, `${card.layer}:${card.expert}`), card.flags.map((flag) => el("span", { class: "chip" }, flag))),
      el("div", { class: "soft" }, names.join("  ·  ")));
  };
  const fill = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(state.shown.length, first + Math.ceil(list.clientHeight / ROW) + 9);
    space.style.height = `${state.shown.length * ROW}px`;
    space.replaceChildren(...state.shown.slice(first, last).map((card, i) => row(card, first + i)));
  };
  const filter = () => {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = (card) => (state.layer === "" || card.layer === Number(state.layer))
      && (state.flag === "" || card.flags.includes(state.flag)) && words.every((word) => searchable(card).includes(word));
    state.shown = cards.filter(wanted);
    if (state.order !== "id") {
      const values = report.maps[Math.abs(state.order) - 1].values;
      const value = (card) => values[cells.layers.indexOf(card.layer)][card.expert];
      state.shown.sort((a, b) => compareCells(value(a), value(b), -Math.sign(state.order)));
    }
    count.textContent = `${state.shown.length} of ${cards.length} experts`;
    list.scrollTop = 0;
    fill();
  };
  const set = (name) => (value) => {
    state[name] = value;
    filter();
  };
  const step = (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10 }[event.key];
    if (!by || !state.shown.length) return;
    event.preventDefault();
    const now = state.shown.findIndex((card) => same(cellOfCard(card), cells.chosen));
    const next = Math.min(state.shown.length - 1, Math.max(0, now + by));
    choose(cellOfCard(state.shown[next]));
  };
  list.addEventListener("scroll", fill);
  list.addEventListener("keydown", step);

  let open = null;
  cells.listeners.push(() => {
    if (same(open, cells.chosen)) return;
    open = cells.chosen;
    const card = open && cards.find((c) => same(cellOfCard(c), open));
    if (card) detail.replaceChildren(...cardParts(card, lists, flags));
    const i = card ? state.shown.indexOf(card) : -1;
    if (i >= 0 && (i * ROW < list.scrollTop || (i + 1) * ROW > list.scrollTop + list.clientHeight)) {
      list.scrollTop = i * ROW - list.clientHeight / 2;
    }
    fill();
  });

  const orders = [["id", "by number"], ...plainMaps().flatMap((map) => {
    const i = report.maps.indexOf(map) + 1;
    return [[i, `${map.name}, high first`], [-i, `${map.name}, low first`]];
  })];
  const layers = [["", "all"], ...cells.layers.map((layer) => [layer, String(layer)])];
  const search = el("input", { type: "search", size: 26, placeholder: "token, task, flag or LAYER:EXPERT", "aria-label": "search experts",
    oninput: (event) => set("text")(event.target.value) });
  const bar = el("div", { class: "bar" }, search, choice("layer", layers, "", set("layer")),
    flags.length ? choice("flag", [["", "any or none"], ...flags.map((f) => [f.name, f.name])], "", set("flag")) : null,
    choice("order", orders, "id", set("order")), count);
  main.append(el("section", { id: "cards" }, el("h2", {}, "Cards"), el("p", { class: "about" }, about), bar,
    el("div", { class: "cards" }, list, detail)));
  filter();
}

/** The parts of an expert's card: flags, numbers with their rank in the layer, lists. */
function cardParts(card, lists, flags) {
  const cell = cellOfCard(card);
  const chip = (flag) => el("span", { class: "chip", title: flags.find((f) => f.name === flag)?.about }, flag);
  const fact = (map) => {
    const r = rankOf(map, cell);
    const width = r ? (100 * (r.of - r.rank)) / Math.max(1, r.of - 1) : 0;
    return el("div", { title: `${map.about}${r ? `; rank ${r.rank} of ${r.of} in the layer` : ""}` },
      el("span", { class: "soft" }, map.name), el("span", {}, r ? show(r.value) : "–"),
      el("span", { class: "rank" }, el("i", { style: `width: ${width}%` })));
  };
  const parts = [
    el("h3", {}, `Layer ${card.layer}, expert ${card.expert}`, card.flags.map(chip)),
    el("div", { class: "facts" }, plainMaps().map(fact)),
  ];
  lists.forEach((list, i) => {
    const rows = card.lists[i] || [];
    parts.push(el("h4", {}, `${list.name} `, el("span", {}, list.about)));
    if (!rows.length) return parts.push(el("p", { class: "soft" }, "none"));
    const share = list.columns.map((_, c) => list.columns[c].startsWith("share"));
    const meter = (v) => el("span", { class: "meter" }, el("i", { style: `width: ${100 * Math.min(1, Math.max(0, v))}%` }));
    const cellView = (v, c) => {
      const number = typeof v === "number";
      return el("td", { class: number ? "n" : c === 0 ? "mono" : null }, content(v), number && share[c] ? meter(v) : null);
    };
    const head = list.columns.map((name, c) => el("th", { class: typeof rows[0][c] === "number" ? "n" : null }, name));
    parts.push(el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, head)),
      el("tbody", {}, rows.map((r) => el("tr", {}, r.map(cellView)))))));
  });
  return parts;
}

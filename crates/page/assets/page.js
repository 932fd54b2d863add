// What all parts of the page share, and its head, numbers and tables. Text enters the page as text nodes only.

const report = JSON.parse(document.getElementById("report").textContent);
const main = document.getElementById("main");
const tip = document.getElementById("tip");

/** An element. Attributes that begin with "on" are listeners; children are elements or text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return made;
}

/** A labelled choice; `options` are [value, text] or [group, [[value, text]..]]. */
function choice(label, options, value, change) {
  const option = ([v, text]) => el("option", { value: v, selected: String(v) === String(value) }, text);
  const one = (o) => (Array.isArray(o[1]) ? el("optgroup", { label: o[0] }, o[1].map(option)) : option(o));
  const select = el("select", { onchange: (event) => change(event.target.value) }, options.map(one));
  return el("label", {}, label, select);
}

/** A number with four significant digits; a whole number in full. */
function show(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return typeof value === "object" ? JSON.stringify(value) : String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value)) return value.toLocaleString("en").replaceAll(",", "\u2009");
  if (size >= 1e-3 && size < 1e6) return value.toPrecision(Math.max(4, Math.ceil(Math.log10(size)))).replace("-", "\u2212");
  return value.toExponential(3).replace("-", "\u2212");
}

// --- The cell that is pointed at and the one that is chosen; every part listens.

const cells = { layers: report.maps.length ? report.maps[0].layers : [], at: null, chosen: null, listeners: [] };

/** The cell of an expert by its name LAYER:EXPERT, if the maps have it. */
function cellOf(name) {
  const [layer, expert] = name.split(":").map(Number);
  const row = cells.layers.indexOf(layer);
  return row >= 0 && expert < report.maps[0].values[row].length ? { row, expert } : null;
}
const nameOf = (cell) => `${cells.layers[cell.row]}:${cell.expert}`;
const same = (a, b) => a === b || (a && b && a.row === b.row && a.expert === b.expert);
const tell = () => cells.listeners.forEach((listener) => listener());

function point(cell) {
  if (same(cells.at, cell)) return;
  cells.at = cell;
  tell();
}
/** Chooses an expert: marks it in the maps, opens its card, and puts it into the address. */
function choose(cell, scroll = false) {
  cells.chosen = cell;
  tell();
  if (!cell) return;
  history.replaceState(null, "", `#${nameOf(cell)}`);
  const target = scroll && (document.getElementById("card") || document.getElementById("maps"));
  if (target) target.scrollIntoView({ block: "nearest" });
}

/** Text in which names of experts lead to them, if it consists of nothing else. */
function linked(text) {
  if (!/^\d+:\d+( \d+:\d+)*$/.test(text)) return text;
  return text.split(" ").flatMap((name, i) => {
    const cell = cellOf(name);
    const link = { class: "link", title: "show this expert", onclick: () => choose(cell, true) };
    return [i ? " " : "", cell ? el("button", link, name) : name];
  });
}

/** The content of a cell of a table: a value, or passages [before, marked, after]. */
function content(value) {
  if (Array.isArray(value)) {
    const line = (text) => text.replaceAll("\n", "\u23ce");
    const passage = (parts) => {
      const [before, marked, after] = parts.map(line);
      return el("span", { class: "context mono" }, before, el("mark", {}, marked), after);
    };
    return value.map(passage);
  }
  return typeof value === "string" ? linked(value) : show(value);
}

// --- Light and dark.

const theme = { wanted: "auto", system: matchMedia("(prefers-color-scheme: dark)"), printing: false, listeners: [] };
const isDark = () => !theme.printing && (theme.wanted === "auto" ? theme.system.matches : theme.wanted === "dark");
function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  theme.listeners.forEach((listener) => listener());
}
theme.system.addEventListener("change", applyTheme);
for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
  addEventListener(event, () => {
    theme.printing = printing;
    applyTheme();
  });
}

// --- Head, numbers, tables.

function drawHead() {
  const themes = [["auto", "as the system"], ["light", "light"], ["dark", "dark"]];
  const save = () => {
    const blob = new Blob([document.getElementById("report").textContent], { type: "application/json" });
    const link = el("a", { href: URL.createObjectURL(blob), download: `${report.method}.json` });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  const setTheme = (value) => {
    theme.wanted = value;
    applyTheme();
  };
  const bar = el("div", { class: "bar" },
    choice("theme", themes, theme.wanted, setTheme),
    el("button", { onclick: save }, "save as JSON"));
  const heading = el("div", {},
    el("h1", {}, report.title),
    el("p", { class: "soft" }, el("code", {}, `quorate ${report.method}`),
      report.paper ? ` · ${report.paper}` : "", report.model ? ` · ${report.model}` : "",
      report.fingerprint ? ` · model ${report.fingerprint}` : ""));
  document.getElementById("head").append(el("div", { class: "top" }, heading, bar));
}

/** A headline value: a number or text large, parts of an object by name. */
function headlineValue(value) {
  if (value && typeof value === "object" && !Array.isArray(value)) {
    const parts = Object.entries(value).map(([name, v]) => `${name.replaceAll("_", " ")} ${show(v)}`);
    return el("dd", { class: "long" }, parts.join(" · "));
  }
  const text = Array.isArray(value) ? value.map(show).join(", ") : value;
  const long = typeof text === "string" && text.length > 22;
  return el("dd", { class: long ? "long" : null }, content(text));
}

function drawHeadline() {
  const entries = Object.entries(report.headline);
  if (entries.length) {
    const one = ([name, value]) => el("div", {}, el("dt", {}, name.replaceAll("_", " ")), headlineValue(value));
    main.append(el("dl", { class: "numbers" }, entries.map(one)));
  }
  if (report.notes.length) main.append(el("ul", { class: "notes" }, report.notes.map((note) => el("li", {}, note))));
  const parameters = Object.entries(report.params || {});
  if (parameters.length) {
    const list = parameters.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { class: "mono" }, show(value))]);
    main.append(el("details", {}, el("summary", {}, "parameters"), el("dl", {}, list)));
  }
}

/** Order of two cells: numbers by size, text by alphabet, nothing last whatever the direction. */
function compareCells(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return direction * (a - b);
  return direction * String(a).localeCompare(String(b), "en", { numeric: true });
}

const ROWS_FIRST = 100;

function drawTable(table) {
  const numeric = table.columns.map((_, c) => table.rows.length > 0
    && table.rows.every((row) => row[c] === null || typeof row[c] === "number"));
  const state = { column: -1, direction: 1, text: "", most: ROWS_FIRST };
  const body = el("tbody");
  const more = el("button", { class: "more", onclick: () => { state.most = Infinity; fill(); } });
  const heads = table.columns.map((name, c) => el("th", { class: numeric[c] ? "n" : null, scope: "col", "aria-sort": "none" },
    el("button", { onclick: () => sortBy(c) }, name)));
  const sortBy = (c) => {
    state.direction = state.column === c ? -state.direction : numeric[c] ? -1 : 1;
    state.column = c;
    heads.forEach((h, i) => h.setAttribute("aria-sort", i !== c ? "none" : state.direction > 0 ? "ascending" : "descending"));
    fill();
  };
  const fill = () => {
    const wanted = (row) => !state.text || row.some((v) => v !== null && show(v).toLowerCase().includes(state.text));
    const rows = table.rows.filter(wanted);
    if (state.column >= 0) rows.sort((a, b) => compareCells(a[state.column], b[state.column], state.direction));
    const line = (row) => el("tr", {}, row.map((v, c) => el("td", { class: numeric[c] ? "n" : null }, content(v))));
    body.replaceChildren(...rows.slice(0, state.most).map(line));
    more.textContent = `all ${rows.length} rows`;
    more.hidden = rows.length <= state.most;
  };
  const find = el("input", { type: "search", placeholder: "search", "aria-label": `search in ${table.name}`,
    oninput: (event) => { state.text = event.target.value.toLowerCase(); fill(); } });
  fill();
  main.append(el("section", {},
    el("h2", {}, table.name), el("p", { class: "about" }, table.about),
    table.rows.length > 12 ? el("div", { class: "bar" }, find) : null,
    el("div", { class: "wide" }, el("table", {}, el("thead", {}, el("tr", {}, heads)), body)), more));
}

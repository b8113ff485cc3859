// The page of a cluster. It asks /api/overview and /api/parts again and again, and changes what differs.

const EVERY_MS = 1000; // between two questions, or ten times as long as an answer took
const BEATS = 60; // of the small curves
const COLORS = 10;
const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) element.setAttribute(name, value);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const h = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Children of `parent`, one for each item: kept by their keys, so that focus and place stay.
function keep(parent, items, keyOf, make, change) {
  const known = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    let child = known.get(key);
    if (!child) {
      child = make(item);
      child.dataset.key = key;
    }
    known.delete(key);
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
    change?.(child, item);
  });
  known.forEach((child) => child.remove());
}

// A row of a table whose cells have the labels of its head, for narrow screens.
function tableRow(labels) {
  const cells = labels.map(([label, kind], index) =>
    index ? h("td", { role: "cell", "data-label": label, class: kind }) : h("th", { role: "rowheader", scope: "row" }),
  );
  return h("tr", { role: "row" }, cells);
}

// Numbers

const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en");
function bytes(count) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (count < 1024 || unit === "GiB") return unit === "B" ? `${count} B` : `${count.toFixed(count < 10 ? 2 : 1)} ${unit}`;
    count /= 1024;
  }
}
function seconds(value) {
  if (!value) return "–";
  return value < 1 ? `${+(value * 1000).toPrecision(2)} ms` : `${+value.toPrecision(2)} s`;
}
const sum = (items, of) => items.reduce((total, item) => total + of(item), 0);
const percent = (share) => `${(100 * share).toFixed(share < 0.1 && share > 0 ? 1 : 0)} %`;
const range = (first, last) => (first === last ? whole.format(first) : `${whole.format(first)} to ${whole.format(last)}`);

function bar(share, label, kind = share > 0.95 ? "hot" : "is") {
  return s("svg", { class: "bar", viewBox: "0 0 100 4", preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("rect", { class: "of", width: 100, height: 4 }),
    s("rect", { class: kind, width: Math.min(100, 100 * share), height: 4 }));
}
const swatch = (kind) => s("svg", { class: "swatch", "aria-hidden": "true" }, s("rect", { class: kind }));
const colorOf = (index) => `s${index % COLORS}`;

// Questions

let token = sessionStorage.getItem("token") ?? "";
class Refused extends Error {}

async function ask(path, question) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  if (question) headers["Content-Type"] = "application/json";
  const body = question && JSON.stringify(question);
  const answer = await fetch(path, { method: question ? "POST" : "GET", headers, body, cache: "no-store" });
  const found = await answer.json();
  if (answer.ok) return found;
  throw answer.status === 401 || answer.status === 403 ? new Refused(found.error) : new Error(found.error);
}

// The cluster

let overview = null;
let parts = null;
const beats = new Map();

function showOverview(now) {
  overview = now;
  for (const shard of now.shards) shard.stats ??= {};
  const problems = now.problems.length;
  const state = $("state");
  state.className = `state ${problems ? "bad" : "good"}`;
  say(state, problems ? (problems === 1 ? "1 problem" : `${problems} problems`) : "All is served");
  document.title = problems ? `(${problems}) Embedding service` : "Embedding service";
  $("problems").hidden = !problems;
  keep($("problem-list"), now.problems, (problem) => `${problem.kind} ${problem.message}`,
    (problem) => h("li", {}, h("strong", {}, problem.message), problem.remedy));
  showTiles(now);
  showShards(now);
  showModels(now.models);
  showBranches(now.branches);
  showForms(now);
  say($("about"), `Store ${now.store}. Routing: term ${now.term}, epoch ${now.epoch}.`);
}

function showTiles({ shards, models, epoch, copies }) {
  const held = sum(shards, (shard) => shard.stats.held_bytes);
  const limit = sum(shards, (shard) => shard.memory_limit);
  const wired = sum(shards, (shard) => shard.stats.rows_per_second);
  const near = sum(shards, (shard) => shard.stats.near_rows_per_second);
  const leaving = shards.filter((shard) => shard.draining).length;
  const slowest = Math.max(0, ...shards.map((shard) => shard.stats.p99_seconds));
  const tiles = [
    ["Shards", whole.format(shards.length), leaving ? `${leaving} leaving` : `${copies} ${copies === 1 ? "copy" : "copies"} of each part`],
    ["Rows a second", compact.format(wired + near), `${compact.format(wired)} wired, ${compact.format(near)} near`],
    ["99 % within", seconds(slowest), "at the slowest shard"],
    ["Memory", bytes(held), `of ${bytes(limit)}, ${percent(held / (limit || 1))}`],
    ["Models", `${models.filter((model) => model.serving).length} of ${models.length}`, "served"],
    ["Lookups", compact.format(sum(shards, (shard) => shard.stats.lookups)), `routing epoch ${epoch}`],
  ];
  keep($("tiles"), tiles, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd", {}, h("span"), h("small"))),
    (tile, [, value, more]) => {
      say(tile.querySelector("span"), value);
      say(tile.querySelector("small"), more);
    });
}

const SHARD_COLUMNS = [["Shard"], ["Memory"], ["Parts", "number"], ["Rows/s wired", "number"], ["Rows/s near", "number"],
  ["Last minute"], ["Half / 99 % within", "number"], ["Heat", "number"]];

function showShards({ shards }) {
  const heats = heatOfShards();
  const all = sum([...heats.values()], (heat) => heat);
  keep($("shard-rows"), shards, (shard) => shard.shard_id, () => tableRow(SHARD_COLUMNS), (row, shard) => {
    const { stats } = shard;
    const history = beats.get(shard.shard_id) ?? [];
    beats.set(shard.shard_id, [...history, [stats.rows_per_second, stats.near_rows_per_second]].slice(-BEATS));
    const [name, memory, count, wired, near, curve, times, heat] = row.cells;
    const index = shards.indexOf(shard);
    const about = [`${shard.device} ${shard.tier}`, shard.address, shard.topology].filter(Boolean).join(", ");
    const words = shard.draining ? "leaving" : shard.connected ? "" : "not connected";
    const share = stats.held_bytes / (shard.memory_limit || 1);
    const full = `${bytes(stats.held_bytes)} of ${bytes(shard.memory_limit)}`;
    redraw(name, [index, about, words], () => [
      h("span", { class: "name" }, swatch(colorOf(index)), shard.shard_id, words ? h("span", { class: "bad-text" }, words) : null),
      h("small", {}, about),
    ]);
    redraw(memory, [full], () => [bar(share, `${percent(share)} of its memory`), h("small", {}, full)]);
    say(count, whole.format(shard.parts) + (shard.parts_missing ? ` (+${whole.format(shard.parts_missing)})` : ""));
    say(wired, compact.format(stats.rows_per_second));
    say(near, compact.format(stats.near_rows_per_second));
    curve.replaceChildren(spark(beats.get(shard.shard_id)));
    say(times, `${seconds(stats.p50_seconds)} / ${seconds(stats.p99_seconds)}`);
    say(heat, all ? percent((heats.get(shard.shard_id) ?? 0) / all) : "–");
  });
  for (const name of beats.keys()) if (!shards.some((shard) => shard.shard_id === name)) beats.delete(name);
}

// Replaces the content of a cell when what it tells has changed.
function redraw(cell, told, make) {
  const key = JSON.stringify(told);
  if (cell.dataset.told === key) return;
  cell.dataset.told = key;
  cell.replaceChildren(...make());
}

function spark(history) {
  const most = Math.max(1, ...history.map(([wired, near]) => Math.max(wired, near)));
  const points = (which) => history.map((beat, index) => `${index + BEATS - history.length},${20 - (19 * beat[which]) / most}`).join(" ");
  return s("svg", { class: "spark", viewBox: `0 0 ${BEATS - 1} 21`, preserveAspectRatio: "none", "aria-hidden": "true" },
    s("line", { x1: 0, x2: BEATS - 1, y1: 20.5, y2: 20.5 }),
    s("polyline", { points: points(0) }), s("polyline", { class: "near", points: points(1) }));
}

function heatOfShards() {
  const heats = new Map();
  for (const table of parts?.tables ?? []) {
    for (const cell of table.cells) {
      for (const index of cell.held) {
        const name = parts.shards[index];
        heats.set(name, (heats.get(name) ?? 0) + cell.heat / cell.held.length);
      }
    }
  }
  return heats;
}

const MODEL_COLUMNS = [["Model"], ["Tables"], ["Size", "number"], ["Parts ready"], ["State"]];

function showModels(models) {
  keep($("model-rows"), models, ({ model }) => `${model.name}@${model.version}`, () => tableRow(MODEL_COLUMNS), (row, each) => {
    const { model } = each;
    const [name, tables, size, ready, state] = row.cells;
    const own = sum(model.tables, (table) => table.replaced_rows * (8 + table.row_bytes));
    const about = [model.family, model.base && `over ${model.base}`].filter(Boolean).join(", ");
    redraw(name, [about], () => [h("span", { class: "name" }, `${model.name}@${model.version}`), h("small", {}, about)]);
    redraw(tables, model.tables, () => model.tables.map((table) =>
      h("div", {}, table.name, h("small", {}, `${whole.format(table.rows)} × ${table.dim} ${table.dtype}`))));
    say(size, model.base ? `${bytes(own)} of its own` : bytes(each.bytes));
    const share = each.parts_ready / (each.parts || 1);
    const told = `${whole.format(each.parts_ready)} of ${whole.format(each.parts)}`;
    redraw(ready, [told], () => [bar(share, `${percent(share)} of its parts`, share < 1 ? "is" : "done"), h("small", {}, told)]);
    const kind = !each.serving ? "warn" : share < 1 ? "bad" : "good";
    state.className = `${kind}-text`;
    say(state, !each.serving ? "loading" : share < 1 ? "served, parts lost" : "served");
  });
}

const BRANCH_COLUMNS = [["Branch"], ["From"], ["Step", "number"], ["On disk", "number"], ["Shares"], ["Losses"]];

function showBranches(branches) {
  $("branches").hidden = !branches.length;
  keep($("branch-rows"), branches, (branch) => branch.name, () => tableRow(BRANCH_COLUMNS), (row, branch) => {
    const [name, from, step, durable, shares, losses] = row.cells;
    redraw(name, [branch.name], () => [h("span", { class: "name" }, branch.name)]);
    say(from, branch.base);
    say(step, whole.format(branch.applied));
    say(durable, whole.format(branch.durable));
    const away = branch.shares - branch.led;
    const copies = `${branch.copies} ${branch.copies === 1 ? "copy" : "copies"}`;
    say(shares, away ? `${away} of ${branch.shares} away: training waits` : `${branch.shares}, ${copies} of each`);
    shares.className = away ? "bad-text" : "";
    say(losses, branch.losses ? `${whole.format(branch.losses)} times` : "none");
    losses.className = branch.losses ? "bad-text" : "";
  });
}

// The map of parts

let only = null; // the shard that is shown alone
const colorBy = () => document.querySelector("input[name=color]:checked").value;

function showParts(now) {
  parts = now;
  const names = now.shards;
  if (only !== null && !names.includes(only)) only = null;
  keep($("legend"), colorBy() === "shard" ? names : [], (name) => name,
    (name) => {
      const button = h("button", { type: "button", class: "plain", "aria-pressed": "false" }, name);
      button.addEventListener("click", () => {
        only = only === name ? null : name;
        showParts(parts);
      });
      return h("li", {}, swatch(""), button);
    },
    (item, name) => {
      item.querySelector("rect").setAttribute("class", colorOf(names.indexOf(name)));
      item.querySelector("button").setAttribute("aria-pressed", String(only === name));
    });
  keep($("maps"), now.tables, (table) => `${table.model}/${table.table}`, makeMap, (map, table) => {
    const told = JSON.stringify([table, colorBy(), only, names, map.clientWidth]);
    map.classList.toggle("large", table.cells.length > 10);
    if (map.told !== told) {
      map.told = told;
      drawMap(map, table);
    }
  });
}

function makeMap(table) {
  const name = `${table.model}/${table.table}`;
  const svg = s("svg", { role: "listbox", tabindex: 0, "aria-label": `Parts of ${name}`, "aria-orientation": "horizontal" });
  const map = h("div", { class: "map" }, h("h3", {}, name, " ", h("span")), svg);
  const at = (event) => event.target.closest("[role=option]");
  svg.addEventListener("pointermove", (event) => at(event) && point(map, Number(at(event).dataset.index)));
  svg.addEventListener("focus", () => point(map, map.now ?? 0));
  svg.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: map.columns, ArrowUp: -map.columns, Home: -Infinity, End: Infinity };
    if (!(event.key in steps)) return;
    event.preventDefault();
    point(map, Math.min(map.table.cells.length - 1, Math.max(0, (map.now ?? 0) + steps[event.key])));
  });
  return map;
}

function point(map, index) {
  if (index >= map.table.cells.length) index = map.table.cells.length - 1;
  map.now = index;
  const svg = map.querySelector("svg");
  svg.querySelector(".now")?.classList.remove("now");
  svg.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
  const option = svg.children[index];
  option.setAttribute("aria-selected", "true");
  option.firstChild.classList.add("now");
  svg.setAttribute("aria-activedescendant", option.id);
  say($("cell"), `${map.table.model}/${map.table.table}, ${describe(map.table, index)}`);
}

function describe(table, index) {
  const cell = table.cells[index];
  const first = index * table.span;
  const last = Math.min(first + table.span, table.parts) - 1;
  const rows = range(first * table.rows_per_part, Math.min((last + 1) * table.rows_per_part, table.rows) - 1);
  const on = cell.held.map((number) => parts.shards[number]).join(", ");
  const coming = cell.to_come.map((number) => parts.shards[number]).join(", ");
  return [
    `part ${range(first, last)}`, `rows ${rows}`,
    cell.lost ? (table.span > 1 ? `${cell.lost} lost: nobody holds them` : "lost: nobody holds it") : `on ${on}`,
    coming && `coming to ${coming}`, `${compact.format(cell.heat)} rows read`,
  ].filter(Boolean).join("; ");
}

function drawMap(map, table) {
  map.table = table;
  const count = table.cells.length;
  const size = count > 256 ? 13 : count > 64 ? 19 : 28;
  const width = map.clientWidth || 600;
  map.columns = Math.max(1, Math.floor(width / size));
  const lines = Math.ceil(count / map.columns);
  const svg = map.querySelector("svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${lines * size}`);
  const bad = { lost: sum(table.cells, (cell) => cell.lost), moving: table.cells.filter((cell) => cell.state === "moving").length };
  say(map.querySelector("h3 span"), [
    `${whole.format(table.parts)} parts`, table.span > 1 && `a cell is ${table.span}`,
    bad.lost && `${whole.format(bad.lost)} lost`, bad.moving && `${whole.format(bad.moving)} on their way`,
  ].filter(Boolean).join(", "));
  const most = Math.max(1, ...parts.tables.flatMap((each) => each.cells.map((cell) => cell.heat)));
  const id = `${map.dataset.key}-`.replace(/[^\w-]/g, "_");
  svg.replaceChildren(...table.cells.map((cell, index) => drawCell(table, cell, index, most, {
    id: `${id}${index}`, x: (index % map.columns) * size, y: Math.floor(index / map.columns) * size, size: size - 3,
  })));
  if (map.now !== undefined && document.activeElement === svg) point(map, map.now);
}

function drawCell(table, cell, index, most, { id, x, y, size }) {
  const group = s("g", { role: "option", id, "data-index": index, "aria-selected": "false", "aria-label": describe(table, index) });
  const shape = { x: x + 1, y: y + 1, height: size, rx: Math.min(4, size / 4) };
  const dim = only !== null && !cell.held.some((number) => parts.shards[number] === only) ? " dim" : "";
  if (!cell.held.length) {
    group.append(s("rect", { ...shape, width: size, class: "part lost" }));
  } else if (colorBy() === "heat") {
    const level = cell.heat ? 1 + Math.floor((3.999 * Math.log1p(cell.heat)) / Math.log1p(most)) : 0;
    group.append(s("rect", { ...shape, width: size, class: `part h${Math.min(4, level)}${dim}` }));
  } else {
    const wide = size / cell.held.length;
    cell.held.forEach((number, place) => group.append(
      s("rect", { ...shape, x: shape.x + place * wide, width: wide, class: `part ${colorOf(number)}${dim}` })));
  }
  if (cell.lost && cell.held.length) group.append(s("rect", { ...shape, width: size, class: "part lost" }));
  if (cell.to_come.length) {
    group.append(s("rect", { ...shape, x: shape.x + 3, y: shape.y + 3, width: size - 6, height: size - 6, class: "coming" }));
  }
  return group;
}

// Forms

function showForms({ models, shards, copies }) {
  const served = models.filter((each) => each.serving);
  const tables = served.flatMap(({ model }) => model.tables.map((table) => `${model.name}/${table.name}`));
  const hashed = served.filter(({ model }) => model.family);
  const option = (name) => h("option", {}, name);
  keep($("lookup").elements.table, tables, (name) => name, option);
  keep($("ngrams").elements.model, hashed.map(({ model }) => model.name), (name) => name, option);
  $("ngrams").hidden = !hashed.length;
  const chosen = hashed.find(({ model }) => model.name === $("ngrams").elements.model.value);
  say($("ngrams").querySelector(".what"), chosen?.text ? "Text, or token ids" : "Token ids");
  const { memory, replicas } = $("plan").elements;
  const largest = Math.max(0, ...shards.map((shard) => shard.memory_limit));
  if (!memory.value && largest) memory.value = +(largest / 2 ** 30).toPrecision(4);
  if (!replicas.value) replicas.value = copies || 1;
  keep($("lose"), shards, (shard) => shard.shard_id,
    (shard) => h("label", {}, h("input", { type: "checkbox", name: "lose", value: shard.shard_id }), ` ${shard.shard_id}`));
}

function numbers(text, what) {
  return text.split(/[\s,]+/).filter(Boolean).map((word) => {
    const number = Number(word);
    if (!Number.isSafeInteger(number)) throw new Error(`${what} are whole numbers, and “${word}” is none`);
    return number;
  });
}

function form(id, question, show, path) {
  const element = $(id);
  element.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = element.querySelector("button");
    const place = element.querySelector(".answer");
    button.disabled = true;
    try {
      const began = performance.now();
      const answer = await ask(path, question(element.elements));
      place.replaceChildren(...show(answer, performance.now() - began));
    } catch (error) {
      place.replaceChildren(h("p", { class: "bad-text" }, error.message));
    } finally {
      button.disabled = false;
    }
  });
}

function drawValues(values, label) {
  const most = Math.max(1e-12, ...values.map(Math.abs));
  const zero = values.some((value) => value < 0) ? 10 : 20; // the height of the line that bars stand on
  return s("svg", { class: "values", viewBox: `0 0 ${values.length} 20`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    s("line", { x1: 0, x2: values.length, y1: zero, y2: zero, "vector-effect": "non-scaling-stroke" }),
    values.map((value, index) => {
      const height = Math.max(0.2, (zero * Math.abs(value)) / (zero > 10 ? most * 1.05 : most));
      return s("rect", { x: index + 0.1, width: 0.8, y: value < 0 ? zero : zero - height, height, class: value < 0 ? "minus" : undefined });
    }));
}

const head = (...names) => h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name))));

form("lookup", ({ table, ids }) => ({ table: table.value, ids: numbers(ids.value, "Row ids") }), (answer, took) => [
  h("p", { class: "quiet" }, `Version ${answer.version}, by ${answer.shard}, in ${took.toFixed(0)} ms with the way to here.`),
  h("table", {}, head("Row", `First of ${answer.dim} values`, "Norm"), h("tbody", {}, answer.rows.map((row) => h("tr", {},
    h("td", {}, String(row.id)),
    h("td", {}, drawValues(row.values, `Values of row ${row.id}`), h("small", {}, row.values.slice(0, 6).join("  "), row.values.length > 6 ? " …" : "")),
    h("td", { class: "number" }, row.norm.toPrecision(4)))))),
], "api/lookup");

form("ngrams", ({ model, tokens }) => {
  const ids = /^[\d\s,-]+$/.test(tokens.value);
  return { model: model.value, ...(ids ? { tokens: numbers(tokens.value, "Token ids") } : { text: tokens.value }) };
}, (answer, took) => [
  h("p", { class: "quiet" }, `Version ${answer.version}, by ${answer.shard}, ${answer.tokens.length} tokens × ${answer.tables.length} tables × ${answer.heads} heads in ${took.toFixed(0)} ms with the way to here.`),
  h("table", {}, head("Token", ...answer.tables.map((name) => `Rows of ${name}`)), h("tbody", {}, answer.tokens.map((each) => h("tr", {},
    h("td", {}, each.text ? h("span", { class: "name" }, each.text) : null, h("small", {}, String(each.id))),
    each.rows.map((heads, index) => h("td", {},
      drawValues(heads.map((row) => row.norm), `Norms of the rows of ${answer.tables[index]}`),
      h("small", {}, heads.map((row) => row.id).join("  ")))))))),
], "api/ngrams");

form("plan", ({ add, memory, replicas }) => ({
  add: Number(add.value), memory: Math.round(Number(memory.value) * 2 ** 30), replicas: Number(replicas.value),
  lose: [...document.querySelectorAll("input[name=lose]:checked")].map((box) => box.value),
}), (answer) => {
  const held = sum(answer.shards, (shard) => shard.bytes);
  const moved = sum(answer.shards, (shard) => shard.moved);
  const few = answer.copies < answer.wanted_copies ? ` Only ${answer.copies} of ${answer.wanted_copies} copies find a shard.` : "";
  return [
    h("p", {}, h("strong", {}, "It fits. "), `${bytes(moved)} are loaded, ${percent(moved / (held || 1))} of what is held.${few}`),
    h("table", {}, head("Shard", "Holds", "Parts", "Loads"), h("tbody", {}, answer.shards.map((shard) => h("tr", {},
      h("td", {}, shard.id, shard.new ? h("small", {}, "new") : null),
      h("td", {}, bar(shard.bytes / shard.limit, `${percent(shard.bytes / shard.limit)} of its memory`), h("small", {}, `${bytes(shard.bytes)} of ${bytes(shard.limit)}`)),
      h("td", {}, whole.format(shard.parts)), h("td", {}, bytes(shard.moved)))))),
  ];
}, "api/what-if");

$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("token", token);
  look();
});

for (const choice of document.querySelectorAll("input[name=color]")) choice.addEventListener("change", () => parts && showParts(parts));
new ResizeObserver(() => parts && showParts(parts)).observe($("maps"));

const THEMES = { "light dark": "as the system", light: "light", dark: "dark" };
function paint(theme) {
  document.documentElement.style.colorScheme = theme;
  const words = `Colors: ${THEMES[theme]}`;
  say($("theme"), words);
  $("theme").setAttribute("aria-label", words);
  localStorage.setItem("theme", theme);
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  paint(names[(names.indexOf(localStorage.getItem("theme")) + 1) % names.length]);
});
paint(localStorage.getItem("theme") in THEMES ? localStorage.getItem("theme") : "light dark");

// Again and again

let timer = 0;
let looking = false;

async function look() {
  if (looking) return;
  looking = true;
  clearTimeout(timer);
  const began = performance.now();
  try {
    const [now, where] = await Promise.all([ask("api/overview"), ask("api/parts")]);
    parts = where;
    $("cluster").hidden = false;
    $("sign-in").hidden = true;
    showOverview(now);
    showParts(where);
  } catch (error) {
    $("state").className = "state bad";
    if (error instanceof Refused) {
      $("cluster").hidden = true;
      if (token) say($("sign-in-why"), error.message);
      $("sign-in").hidden = false;
      say($("state"), "Who are you?");
      return;
    }
    say($("state"), error instanceof TypeError ? "The controller does not answer: trying again" : error.message);
  } finally {
    looking = false;
  }
  if (!document.hidden) timer = setTimeout(look, Math.max(EVERY_MS, 10 * (performance.now() - began)));
}
document.addEventListener("visibilitychange", () => document.hidden || look());
look();

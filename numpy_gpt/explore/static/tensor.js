/** Zoom 2, the tensor: its heat map with tokens and heads on the axes, its numbers at large, and what makes it. */

import { store } from "explore/store.js";
import { announce, choose, go, ui } from "explore/main.js";
import { headsSection } from "explore/map.js";
import { DECAY } from "explore/number.js";
import { bar, looksAt, special } from "explore/panels.js";
import { computation, showListing, showMark } from "explore/listing.js";
import { HeatMap, divergingFor, histogram, legend, sequential, thumbnail } from "explore/heat.js";
import { axes, changeOf, decimal, el, groupOf, isParameter, isPattern, keepingFocus, label, likelihood, link, mostOften, number, part, percent, perElement, piece, pieceAt, pieceOf, quoted, split, targetAt, title, tokenOf } from "explore/text.js";

const COMPLETE = 4 << 20; // bytes: larger arrays are fetched by the rows of their window
const IDLE = "Point at a cell to read it, click it to see how it is computed.";
let view = null; // what is on screen: {key, route, maps, element, onToken}
let beside = []; // what follows the chosen token in the panel beside the tensor

const operations = () => store.summary.operations;
const shapeOf = (name) => (store.summary.arrays.values[name] ?? store.summary.arrays.params?.[name])?.shape ?? [];
const isProbability = (name, gradient) => !gradient && name.endsWith("att.probs");

export function forget() {
  view = null;
}

/** What is shown of the tensor: "value", "gradient", "both" or "update". */
function showing(route) {
  if (ui.show === "both" || (ui.show === "update" && isParameter(route.name))) return ui.show;
  if (ui.show === null && isPattern(route.name)) return "both";
  return route.gradient ? "gradient" : "value";
}

export async function render(element, route) {
  if (route.name === "loss") return renderLoss(element, route);
  const show = showing(route);
  const head = headOf(route);
  const key = [route.name, show, isPattern(route.name) ? head : "", show === "update" ? ui.lr : ""].join(" ");
  if (view?.key === key && element.contains(view.element)) {
    view.route = route;
    return pick(route);
  }
  ui.head = head;
  view = { key, route, maps: [], element: el("div", { class: "tensor" }), onToken: [] };
  await build(element, route, show, head);
}

function headOf(route) {
  if (route.index && shapeOf(route.name).length === 4) return route.index[1];
  if (route.head !== null) return Math.min(route.head, store.summary.config.n_heads - 1);
  return Math.min(ui.head, store.summary.config.n_heads - 1);
}

async function pick(route) {
  for (const map of view.maps) {
    if (!route.index) {
      map.picked = null;
      map.overlay();
    } else await map.pick(...map.axes.cell(route.index));
  }
  if (!route.index) return;
  const t = tokenOf(route.name, route.index);
  if (t !== null) follow(t);
}

/** Let everything that follows the chosen token show this one. */
function follow(t) {
  for (const show of [...view.onToken, ...beside]) show(t);
}

/** Another token was chosen in the strip above. */
export function tokenChosen() {
  if (view?.element.isConnected && ui.token !== null) follow(ui.token);
}

export function key(event, route) {
  if (route.view !== "tensor") return false;
  const to = { v: "value", g: "gradient", b: "both", u: "update" }[event.key];
  if (to && route.name !== "loss" && (to !== "update" || isParameter(route.name))) return change(to, route);
  if (event.key === "[" || event.key === "]") return neighbour(route, event.key === "]" ? 1 : -1);
  if (/^\d$/.test(event.key)) return chooseHead(Number(event.key), route);
  if (event.key === "h" || event.key === "H") return chooseHead((ui.head + (event.key === "h" ? 1 : store.summary.config.n_heads - 1)) % store.summary.config.n_heads, route);
  if (event.key === "s") {
    showListing(view.element, ui.listing === "plain" ? "ops" : "plain");
    return true;
  }
  if (/^Arrow/.test(event.key) && view?.maps.length && !event.target.closest?.("button, a, input, select, table")) {
    view.maps[0].canvas.focus();
    view.maps[0].key(event);
    return true;
  }
  return false;
}

function change(to, route) {
  ui.show = to === "value" || to === "gradient" ? "one" : to;
  if (to === "both" || to === "update") return renderNow();
  if (route.gradient === (to === "gradient")) return renderNow();
  location.hash = link(route.name, route.index, to === "gradient");
  return true;
}

function renderNow() {
  render(document.getElementById("view"), view.route);
  return true;
}

function chooseHead(head, route) {
  if (head >= store.summary.config.n_heads) return false;
  if (!isPattern(route.name)) return toHead(head);
  if (route.index) {
    const index = [...route.index];
    index[1] = head;
    go(route.name, index, route.gradient);
  } else location.hash = `#${route.gradient ? "grad:" : ""}${route.name}?head=${head}`;
  return true;
}

/** Move the window of a matrix that lies head by head to one of them. */
function toHead(head) {
  const [map] = view?.maps ?? [];
  if (!map?.groups && !map?.rowGroups) return false;
  ui.head = head;
  map.moveTo(map.rowGroups ? head * map.rowGroups : map.r0, map.groups ? head * map.groups : map.c0);
  return true;
}

/** The tensor before or after this one, in order of computation, or among the parameters. */
function neighbour(route, by) {
  const { values, params } = store.summary.arrays;
  const names = isParameter(route.name) ? Object.keys(params) : [...Object.keys(values), "loss"];
  const next = names[names.indexOf(route.name) + by];
  if (next) go(next, null, route.gradient && next !== "loss");
  return true;
}

// Where a tensor's cells lie in the picture

function axesOf(name, head) {
  const shape = shapeOf(name);
  const named = axes(name);
  const { rest } = split(name);
  const HS = store.summary.config.emb_dim / store.summary.config.n_heads;
  const trimmed = (text) => (text.trim() === "" ? text : text.trim());
  const token = (t) => `${t} ${piece(trimmed(pieceAt(t)))}`;
  const feature = (c) => String(c);
  const ofHead = (g) => `head ${g}`;
  if (isPattern(name)) {
    const query = (t) => `${token(t)} → ${piece(trimmed(targetAt(t)))}`;
    return { rows: shape[2], cols: shape[3], index: (r, c) => [0, head, r, c], cell: ([, , r, c]) => [r, c], rowLabel: query, colLabel: token, everyColumn: true, square: true,
      colTitle: "looked at (key)", note: "Rows are queries: the token that looks → the next token, which it is to predict. Hatched cells are the future." };
  }
  if (shape.length === 4) {
    return { rows: shape[2], cols: shape[1] * HS, index: (r, c) => [0, Math.floor(c / HS), r, c % HS], cell: ([, h, t, d]) => [t, h * HS + d],
      rowLabel: token, colLabel: (c) => feature(c % HS), groups: HS, groupLabel: ofHead };
  }
  if (shape.length === 3) {
    const heads = rest === "att.heads" ? { groups: HS, groupLabel: ofHead, colLabel: (c) => feature(c % HS) } : {};
    const column = named[2] === "id" ? (c) => (pieceOf(c) === undefined ? String(c) : `${c} ${piece(trimmed(pieceOf(c)))}`) : feature;
    return { rows: shape[1], cols: shape[2], index: (r, c) => [0, r, c], cell: ([, r, c]) => [r, c], rowLabel: token, colLabel: column,
      everyColumn: named[2] === "id", labelRoom: named[2] === "id" ? 74 : 0, colTitle: named[2] === "id" ? "token id" : heads.groups ? "" : "feature", ...heads };
  }
  if (shape.length === 2) {
    const row = named[0] === "token" ? token : named[0] === "id" ? (r) => (pieceOf(r) === undefined ? `id ${r}` : `${r} ${piece(trimmed(pieceOf(r)))}`) : (r) => `${named[0]} ${r}`;
    const byHead = /W_(query|key|value)\.weight$/.test(name);
    return { rows: shape[0], cols: shape[1], index: (r, c) => [r, c], cell: ([r, c]) => [r, c], rowLabel: byHead ? (r) => (r % 8 ? String(r) : part(name, "output", r)) : row, colLabel: feature,
      rowRoom: named[0] === "id" ? 104 : 0, rowGroups: byHead ? HS : 0, groups: /out_proj\.weight$/.test(name) ? HS : 0, groupLabel: ofHead, colTitle: named[1] === "input" ? "input feature" : "feature" };
  }
  const wide = Math.min(32, shape[0]);
  return { rows: Math.ceil(shape[0] / wide), cols: wide, index: (r, c) => [r * wide + c], cell: ([i]) => [Math.floor(i / wide), i % wide],
    rowLabel: (r) => `${named[0]} ${r * wide}`, colLabel: (c) => `+${c}`, outside: (r, c) => r * wide + c >= shape[0] };
}

/** The numbers behind a picture: {load(r0, nr), value(r, c), data}, data null where only the window's rows are here. */
async function numbers(name, group, at, head) {
  const facts = store.summary.arrays[group][name];
  const inside = at.outside ? (r, c) => !at.outside(r, c) : () => true;
  if (isPattern(name)) {
    const { data } = await store.slice(group, name, [0, head, null, null]);
    return { data, load: null, value: (r, c) => data[r * at.cols + c] };
  }
  if (store.bytes(group, name) <= COMPLETE || facts.shape.length === 4) { // queries, keys and values, not a matrix by rows
    const { data, shape } = await store.array(group, name);
    const flat = shape.length === 4 ? (r, c) => {
      const [, h, t, d] = at.index(r, c);
      return (h * shape[2] + t) * shape[3] + d;
    } : (r, c) => r * at.cols + c;
    return { data, load: null, value: (r, c) => (inside(r, c) ? data[flat(r, c)] : undefined) };
  }
  const rows = new Map();
  const load = async (r0, nr) => {
    const missing = Array.from({ length: nr }, (_, i) => r0 + i).filter((r) => !rows.has(r));
    if (!missing.length) return;
    const [from, to] = [missing[0], missing.at(-1) + 1];
    const { data } = await store.slice(group, name, [...at.index(0, 0).slice(0, -2), [from, to], null]);
    for (let r = from; r < to; r += 1) rows.set(r, data.subarray((r - from) * at.cols, (r - from + 1) * at.cols));
  };
  return { data: null, load, value: (r, c) => rows.get(r)?.[c] };
}

/** AdamW's first step, −lr · (ĝ / (√(ĝ²) + 1e-8) + decay · w), of numbers as above. */
async function updates(name, at) {
  const [w, g] = await Promise.all([numbers(name, "params", at), numbers(name, "grads", at)]);
  const { lr } = ui;
  const step = (x, dx) => (x === undefined ? x : -lr * (dx / (Math.abs(dx) + 1e-8) + DECAY * x));
  const load = w.load && (async (...rows) => {
    await w.load(...rows);
    await g.load(...rows);
  });
  return { data: w.data && w.data.map((x, i) => step(x, g.data[i])), load, value: (r, c) => step(w.value(r, c), g.value(r, c)) };
}

// The view

async function build(element, route, show, head) {
  const mine = view;
  const { name } = route;
  const at = axesOf(name, head);
  const kinds = show === "both" ? ["value", "gradient"] : [show];
  const sources = await Promise.all(kinds.map((kind) => (kind === "update" ? updates(name, at) : numbers(name, groupOf(name, kind === "gradient"), at, head))));
  if (view !== mine) return; // the reader has gone on
  const room = Math.max(420, element.clientWidth - 48);
  const readout = el("p", { class: "readout num quiet", "aria-hidden": "true" }, IDLE);
  const figures = el("div", { class: "figures" });
  const pair = kinds.length === 2;
  const sideBySide = pair && (at.square || (at.cols * 3 + 120) * 2 <= room);
  figures.classList.toggle("beside", sideBySide);
  const size = { width: sideBySide ? (room - 24) / 2 : room, height: pair && !sideBySide ? 250 : at.square ? 470 : 400 };
  const spread = [];
  for (const [i, kind] of kinds.entries()) {
    const map = heat(route, at, kind, sources[i], size, readout);
    begin(map, name, route);
    await map.load?.(map.r0, map.nr, map.c0, map.nc);
    const data = sources[i].data ?? shownNumbers(map);
    map.scale = isProbability(name, kind === "gradient") ? sequential(data.reduce((a, b) => (b > a ? b : a), 0)) : divergingFor(data);
    const facts = store.summary.arrays[groupOf(name, kind === "gradient")][name];
    if (!sources[i].data && kind !== "update") map.scale.largest = Math.max(Math.abs(facts.min), Math.abs(facts.max));
    mine.maps.push(map);
    spread.push({ kind, data, scale: map.scale, complete: Boolean(sources[i].data) });
    figures.append(el("figure", {}, el("figcaption", { class: "figure-head" }, el("b", {}, kindTitle(kind)), legend(map.scale, "")), map.element, map.windowed ? windowControls(map, name, kind) : null));
  }
  if (axes(name).includes("token")) view.onToken.push((t) => view.maps.forEach((map) => map.markRow(t)));
  view.maps.forEach((map) => { map.others = view.maps.filter((other) => other !== map); });
  const chooser = isPattern(name) ? await headChooser(route, head) : "";
  const own = await special(route, mine.onToken);
  if (view !== mine) return;
  mine.element.append(
    heading(route, show, head),
    chooser,
    readout, figures,
    at.note ? el("p", { class: "quiet note" }, at.note) : "",
    el("div", { class: "sections" }, own, statistics(name, spread), computation(route, kinds), ...(/\.att\./.test(name) ? [headsSection()] : [])));
  keepingFocus(element, () => element.replaceChildren(view.element));
  await Promise.all(view.maps.map((map) => map.draw()));
  view.element.querySelectorAll(".listing").forEach(showMark);
  await pick(route);
  if (ui.token !== null && !route.index) tokenChosen();
  if (ui.goal) view.element.querySelector(ui.goal)?.scrollIntoView({ block: "center" });
  ui.goal = null;
}

/** Where the window of a large matrix begins: at what this text touches, or at the picked cell. */
function begin(map, name, route) {
  const middle = (r, c) => {
    map.r0 = Math.max(0, Math.min(map.rows - map.nr, r - Math.floor(map.nr / 2)));
    map.c0 = Math.max(0, Math.min(map.cols - map.nc, c - Math.floor(map.nc / 2)));
  };
  if (!map.windowed) return;
  if (route.index) return middle(...map.axes.cell(route.index));
  const ids = store.summary.tokens[0];
  if (axes(name)[0] === "id") middle(mostOften(ids).id, 0);
  if (name === "logits") middle(0, store.summary.predictions[ids.length - 1][0].id);
}

const kindTitle = (kind) => ({ value: "Value", gradient: "Gradient of the loss", update: `AdamW's first update, lr ${ui.lr}` })[kind];

function shownNumbers(map) {
  const found = [];
  for (let r = map.r0; r < map.r0 + map.nr; r += 1) for (let c = map.c0; c < map.c0 + map.nc; c += 1) found.push(map.value(r, c) ?? NaN);
  return found;
}

function heat(route, at, kind, source, size, readout) {
  const { name } = route;
  const gradient = kind !== "value";
  const say = (cell) => {
    if (!view) return; // the focus leaves a map that is gone
    for (const map of view.maps) if (map !== made) map.mark(cell);
    if (!cell) return void (readout.textContent = IDLE);
    const words = label(name, at.index(...cell)).replace(/^[^·]+· (block \d+ · )?/, "");
    const parts = view.maps.map((map) => `${map.kind} ${number(map.value(...cell), 6)}`);
    const future = isPattern(name) && cell[1] > cell[0] ? `the future: masked, so ${name.endsWith("probs") ? "p = 0; softmax's backward multiplies this gradient by it" : "the gradient is exactly 0"} · ` : "";
    readout.replaceChildren(el("span", { class: "where" }, words), " ", future, ...parts.map((text) => el("b", {}, text)).flatMap((each, i) => (i ? [" · ", each] : [each])));
    if (document.activeElement === made.canvas) announce(readout.textContent);
    const t = tokenOf(name, at.index(...cell));
    if (t !== null && isPattern(name)) follow(t);
  };
  const made = new HeatMap({ ...at, ...size, kind, title: `${kind} of ${name}`, smallest: 3, largest: at.square ? 36 : 24, value: source.value, load: source.load, axes: at,
    masked: isPattern(name) ? (r, c) => c > r : null, onhover: say, onpick: (r, c) => go(name, at.index(r, c), gradient) });
  return made;
}

function heading(route, show, head) {
  const { name, gradient } = route;
  const { block, rest } = split(name);
  const parameter = isParameter(name);
  const maker = operations().find((operation) => operation.output === name);
  const readers = operations().filter((operation) => operation.inputs.includes(name) || operation.parameters.includes(name));
  const chip = (other) => (other === "tokens" || other === "targets" ? el("span", { class: "chip" }, other) : el("a", { class: "chip", href: link(other, null, gradient) }, split(other).block === block ? split(other).rest : other));
  const shape = shapeOf(name).map((n, i) => `${n} ${axes(name)[i]}${n === 1 ? "" : "s"}`).join(" × ");
  const button = (to, text, hotkey) => el("button", { type: "button", "aria-pressed": String(show === to), title: `key ${hotkey}`, "data-keep": to, onclick: () => change(to, view.route) }, text);
  return el("header", { class: "heading" },
    el("div", { class: "title-line" },
      el("a", { href: "#map", class: "crumb", title: "Back to the map (Esc)", onclick: (event) => {
        event.preventDefault();
        go("map");
      } }, "map"), el("span", { class: "crumb-sep" }, "›"),
      el("h1", {}, rest, block === null ? null : el("span", { class: "quiet" }, ` block ${block}`), isPattern(name) ? el("span", { class: "quiet" }, ` head ${head}`) : null),
      el("span", { class: "grow" }),
      el("div", { class: "choice", role: "group", "aria-label": "What is shown" }, button("value", "Value", "v"), button("gradient", "Gradient", "g"), button("both", "Both", "b"), parameter ? button("update", "Update", "u") : null),
      el("span", { class: "pager" }, el("button", { type: "button", class: "icon", "aria-label": "Previous tensor", "data-keep": "previous", title: "Previous tensor ([)", onclick: () => neighbour(view.route, -1) }, "‹"),
        el("button", { type: "button", class: "icon", "aria-label": "Next tensor", "data-keep": "next", title: "Next tensor (])", onclick: () => neighbour(view.route, 1) }, "›"))),
    el("p", { class: "flow-line" }, el("span", { class: "shape" }, shape), " · ",
      maker ? [maker.inputs.length ? ["from ", maker.inputs.map(chip)] : "", maker.parameters.length ? [" with ", maker.parameters.map(chip)] : "", " by ", el("a", { href: `#map/${operations().indexOf(maker)}` }, title(maker))] : "a parameter: read from the checkpoint",
      readers.length ? [maker ? ", read by " : ", used for ", readers.map((operation) => (operation.output === "loss" ? el("a", { class: "chip", href: "#loss/" }, "loss") : chip(operation.output)))] : ""));
}

/** A picture of every head to choose from, with the change of the loss when it is zeroed. */
async function headChooser(route, head) {
  const { n_heads: n } = store.summary.config;
  const { block } = split(route.name);
  const { heads } = store.summary;
  const T = store.summary.pieces.length;
  const button = async (h) => {
    const made = el("a", { class: "head-choice", href: `#${route.gradient ? "grad:" : ""}${route.name}?head=${h}`, "aria-current": h === head ? "true" : null, "data-keep": `head-${h}`, title: `Head ${h} (key ${h})` });
    if (T <= 128 && n <= 16) made.append(await headPicture(route.name, h, T));
    made.append(el("span", {}, `head ${h}`));
    if (heads) made.append(el("span", { class: "num quiet", title: "Change of the loss when this head is zeroed" }, changeOf(heads.loss, heads.zeroed[block][h], 2)));
    return made;
  };
  return el("nav", { class: n > 8 ? "head-chooser many" : "head-chooser", "aria-label": "Heads" }, await Promise.all(Array.from({ length: n }, (_, h) => button(h))),
    heads ? el("span", { class: "quiet note" }, "below each head: the change of the loss when it is zeroed") : null);
}

async function headPicture(name, head, T) {
  const { data } = await store.slice("values", name, [0, head, null, null]);
  const canvas = el("canvas", { width: T, height: T, class: "head-picture", "aria-hidden": "true" });
  const scale = isProbability(name, false) ? sequential(data.reduce((a, b) => (b > a ? b : a), 0)) : divergingFor(data);
  const context = canvas.getContext("2d");
  const image = context.createImageData(T, T);
  data.forEach((x, i) => {
    if (i % T <= Math.floor(i / T) && !Number.isNaN(x)) image.data.set([...scale.colour(x), 255], i * 4);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** For a matrix too large to show: its thumbnail with the window in it, and a place to go to. */
function windowControls(map, name, kind) {
  const thumbs = store.summary.thumbs[groupOf(name, kind !== "value")] ?? {};
  const frame = el("span", { class: "window-frame" });
  const over = el("div", { class: "overview", title: "Drag to move the window" }, thumbnail(thumbs[name], false, "overview-picture"), frame);
  const where = el("span", { class: "num quiet" });
  const place = () => {
    const percentOf = (x, n) => `${(100 * x) / n}%`;
    Object.assign(frame.style, { left: percentOf(map.c0, map.cols), width: percentOf(map.nc, map.cols), top: percentOf(map.r0, map.rows), height: percentOf(map.nr, map.rows) });
    where.textContent = `rows ${map.r0}–${map.r0 + map.nr - 1} of ${map.rows}, columns ${map.c0}–${map.c0 + map.nc - 1} of ${map.cols}`;
  };
  const move = (r0, c0) => map.moveTo(r0, c0);
  map.onmove = () => {
    place();
    for (const other of map.others ?? []) if (other.r0 !== map.r0 || other.c0 !== map.c0) other.moveTo(map.r0, map.c0);
  };
  const drag = (event) => {
    const box = over.getBoundingClientRect();
    move(((event.clientY - box.top) / box.height) * map.rows - map.nr / 2, ((event.clientX - box.left) / box.width) * map.cols - map.nc / 2);
  };
  over.addEventListener("pointerdown", (event) => {
    over.setPointerCapture(event.pointerId);
    drag(event);
  });
  over.addEventListener("pointermove", (event) => {
    if (over.hasPointerCapture(event.pointerId)) drag(event);
  });
  const to = (aria, value) => el("input", { type: "number", min: "0", "aria-label": aria, placeholder: aria, value, size: "6" });
  const [row, column] = [to("row"), to("column")];
  const form = el("form", { class: "goto", onsubmit: (event) => {
    event.preventDefault();
    move(row.value === "" ? map.r0 : Number(row.value), column.value === "" ? map.c0 : Number(column.value));
  } }, map.rows > map.nr ? row : null, map.cols > map.nc ? column : null, el("button", { class: "plain" }, "Go"));
  const byHead = (map.groups && map.nc < map.cols) || (map.rowGroups && map.nr < map.rows);
  const heads = byHead ? el("p", { class: "to-heads" }, "head ", [...Array(store.summary.config.n_heads).keys()].map((h) => el("button", { type: "button", class: "link num", onclick: () => toHead(h) }, String(h)))) : null;
  place();
  return el("div", { class: "window" }, over, el("div", {}, where, heads, form));
}

// Numbers at large

function statistics(name, spread) {
  const row = (group, text) => {
    const facts = store.summary.arrays[group]?.[name];
    if (!facts) return null;
    return el("tr", {}, el("th", { scope: "row" }, text), ["min", "max", "mean", "norm"].map((key) => el("td", { class: "num" }, number(facts[key], 3))), el("td", { class: "num" }, number(perElement(facts), 3)));
  };
  return el("section", { class: "statistics" }, el("h2", {}, "Spread"),
    el("table", {}, el("thead", {}, el("tr", {}, el("th"), ["min", "max", "mean", "norm"].map((text) => el("th", {}, text)), el("th", { title: "norm divided by the square root of the number of elements, those that are finite" }, "per element"))),
      el("tbody", {}, row(isParameter(name) ? "params" : "values", "value"), row("grads", "gradient"))),
    el("div", { class: "histograms" }, spread.map((each) => el("div", {}, el("p", { class: "quiet" }, each.kind, isPattern(name) ? `, head ${ui.head}` : each.complete ? "" : ", of the cells shown"), histogram(each.data, each.scale, `${each.kind} of ${name}`)))));
}

// Beside a tensor of which no number is chosen

export async function hint(aside, route) {
  aside.replaceChildren();
  beside = [];
  if (route.name === "loss") return;
  const gradient = route.gradient;
  const box = el("div", { class: "hint-box" },
    el("h2", {}, "A number"),
    el("p", {}, "Click a cell, or move to it with the arrow keys and press ", el("kbd", {}, "Enter"), ": how it is computed, the terms it is the sum of, and what follows from changing it."));
  aside.append(box);
  if (isPattern(route.name)) return box.append(await looksAt(route, headOf(route), beside));
  const group = groupOf(route.name, gradient);
  const facts = store.summary.arrays[group][route.name];
  if (store.bytes(group, route.name) > COMPLETE) return;
  const { data, shape } = await store.array(group, route.name);
  const best = largest(data, 10);
  const indexOf = (flat) => {
    const index = [];
    for (let axis = shape.length - 1; axis >= 0; axis -= 1) {
      index.unshift(flat % shape[axis]);
      flat = Math.floor(flat / shape[axis]);
    }
    return index;
  };
  const words = (index) => axes(route.name).map((axis, i) => (axis === "text" ? null : part(route.name, axis, index[i]))).filter(Boolean).join(" · ");
  box.append(el("h3", {}, gradient ? "Its largest gradients" : "Its largest numbers"),
    el("table", { class: "largest" }, el("tbody", {}, best.map((flat) => el("tr", {}, el("td", {}, el("a", { href: link(route.name, indexOf(flat), gradient) }, el("bdi", {}, words(indexOf(flat))))), el("td", { class: "num" }, number(data[flat], 4)))))));
}

/** Flat indices of the n finite numbers that are largest in size. */
function largest(data, n) {
  const best = [];
  let least = -1;
  for (let i = 0; i < data.length; i += 1) {
    const size = Math.abs(data[i]);
    if (size <= least || !Number.isFinite(size)) continue;
    best.push(i);
    best.sort((a, b) => Math.abs(data[b]) - Math.abs(data[a]));
    if (best.length > n) best.pop();
    if (best.length === n) least = Math.abs(data[best[n - 1]]);
  }
  return best;
}

// The loss: a scalar, and what it is the mean of

function renderLoss(element, route) {
  const { tokenLosses, loss, targets, pieces } = store.summary;
  view = { key: "loss", route, maps: [], element: el("div", { class: "tensor" }), onToken: [] };
  const most = Math.max(...tokenLosses);
  const rows = tokenLosses.map((each, t) => el("tr", {},
    el("th", { scope: "row" }, el("button", { type: "button", class: "link", onclick: () => choose(t) }, `${t} `, el("bdi", {}, quoted(pieces[t])))),
    el("td", {}, el("bdi", {}, quoted(targetAt(t)))), el("td", { class: "num" }, el("a", { href: link("logits", [0, t, targets[0][t]], true) }, percent(likelihood(each)))),
    el("td", { class: "num" }, decimal(each, 4)), el("td", { class: "wide-cell" }, bar((each ?? 0) / most))));
  view.onToken.push((t) => rows.forEach((row, at) => row.classList.toggle("chosen", at === t)));
  view.element.append(
    el("header", { class: "heading" }, el("div", { class: "title-line" }, el("a", { href: "#map", class: "crumb" }, "map"), el("span", { class: "crumb-sep" }, "›"), el("h1", {}, "loss"), el("span", { class: "num big" }, decimal(loss, 7)), el("span", { class: "quiet" }, `nats per token; perplexity ${loss === null ? "nan" : number(Math.exp(loss), 4)}`)),
      el("p", { class: "flow-line" }, "from ", el("a", { class: "chip", href: "#logits" }, "logits"), " and the targets: the mean of the tokens' losses")),
    el("div", { class: "sections" }, el("section", {}, el("h2", {}, "Loss of each token"), el("div", { class: "tall" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "after"), el("th", {}, "true next"), el("th", {}, "p(true)"), el("th", {}, "−log p"), el("th"))), el("tbody", {}, rows)))), computation(route, ["value"])));
  element.replaceChildren(view.element);
  view.element.querySelectorAll(".listing").forEach(showMark);
}

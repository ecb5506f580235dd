/** Zoom 1, the map: the pass as a flow of tensors, forward down and backward up, to be walked one operation at a time. */

import { store } from "explore/store.js";
import { announce, go, ui } from "explore/main.js";
import { sequential, legend, svg, thumbnail, diverging } from "explore/heat.js";
import { changeOf, count, decimal, el, formula as formulaLines, formulaOf, keepingFocus, label, link, mostOften, number, perElement, percent, quoted, shapeText, short, split, title } from "explore/text.js";

const [W, H, PITCH, LEFT, GAP] = [186, 58, 78, 14, 12];

/** What an operation is called where there is little room. */
const BRIEF = { embedding: "Embedding", position: "Position", sum: "Sum", same: "Copy", layernorm: "LayerNorm", linear: "Linear", scores: "q @ kᵀ", softmax: "Softmax", mix: "p @ v", gelu: "GELU", residual: "Sum", cross_entropy: "Cross-entropy" };
const column = (c) => LEFT + (c === 0 ? 0 : W + 40 + (c - 1) * (W + GAP));

/** Row and column of a block's tensors in the unfolded block. */
const PLACES = {
  resid_pre: [0, 0], norm1: [0, 2], "att.q": [1, 1], "att.k": [1, 2], "att.v": [1, 3], "att.scores": [2, 1.5],
  "att.probs": [3, 1.5], "att.heads": [4, 2], "att.out": [5, 2], resid_mid: [5, 0],
  norm2: [6, 2], "ff.pre": [7, 2], "ff.act": [8, 2], "ff.out": [9, 2], resid_post: [9, 0],
};
const BLOCK_ROWS = 10;

let drawn = null; // {key, nodes, edges, panel, scroller}
let last = "#map";

const operations = () => store.summary.operations;
const steps = () => operations().length * 2;

/** The operation of a step, and whether it is its backward pass. */
export function stepOf(step) {
  const n = operations().length;
  return step < n ? { operation: operations()[step], at: step, backward: false } : { operation: operations()[2 * n - 1 - step], at: 2 * n - 1 - step, backward: true };
}

/** Draw again from nothing next time: the pass or the theme is another. */
export function forget() {
  drawn = null;
}

/** Where Escape from a tensor leads: the map as it was left. */
export function back() {
  location.hash = last;
}

export function render(element, route) {
  const { step } = route;
  if (step !== null && step >= steps()) return go("map");
  last = step === null ? "#map" : `#map/${step}`;
  const current = step === null ? null : stepOf(step);
  if (current) {
    const { output, inputs } = current.operation;
    const block = [output, ...inputs].map((name) => split(name).block).find((each) => each !== null);
    if (block !== undefined) ui.open = block;
    ui.colour = current.backward ? "grads" : "values";
  }
  const key = `${ui.open} ${ui.colour}`;
  if (!drawn || drawn.key !== key || !element.contains(drawn.scroller)) build(element, key);
  mark(step, current);
  keepingFocus(drawn.panel, () => drawn.panel.replaceChildren(current ? operationPanel(step, current) : welcome(), headsSection(), lensSection()));
  if (current) announce(`Step ${step + 1} of ${steps()}, ${current.backward ? "backward" : "forward"}: ${title(current.operation)}, ${current.operation.output}`);
}

/** Another token was chosen: the panel's tables follow. */
export function tokenChosen() {
  if (!drawn?.panel.isConnected) return;
  const old = drawn.panel.querySelector(".lens-section");
  old?.replaceWith(lensSection());
}

/** A key on the map; true if it was one. */
export function key(event, route) {
  const onControl = event.target.closest?.("a, button, summary");
  const forth = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (forth) return walk(route.step, forth);
  if (event.key === "Home") return walk(null, 1);
  if (event.key === "End") return walk(steps(), -1);
  if (event.key === "Enter" && !onControl && route.step !== null) {
    const { operation, backward } = stepOf(route.step);
    go(operation.output, null, backward);
    return true;
  }
  if (event.key === "c") return colour(ui.colour === "values" ? "grads" : "values");
  return false;
}

function walk(step, by) {
  const to = step === null ? (by > 0 ? 0 : steps() - 1) : step + by;
  if (to >= 0 && to < steps()) location.hash = `#map/${to}`;
  return true;
}

function colour(by) {
  ui.colour = by;
  if (location.hash.startsWith("#map/")) go("map");
  else redraw();
  return true;
}

function redraw() {
  forget();
  render(document.getElementById("view"), { view: "map", step: null });
}

// The picture

const rms = (group, name) => {
  const facts = store.summary.arrays[group]?.[name];
  return facts ? perElement(facts) : 0;
};

/** Names, places and the rows of the complete map. */
function layout() {
  const places = new Map();
  const frames = [];
  let row = 0.35;
  places.set("tok_emb", [row, 0]);
  places.set("pos_emb", [row, 1]);
  places.set("emb", [row + 1, 0]);
  row += 2;
  for (let block = 0; block < store.summary.config.n_layers; block += 1) {
    const open = block === ui.open;
    frames.push({ block, row, open });
    if (open) for (const [name, [down, across]] of Object.entries(PLACES)) places.set(`trf_blocks.${block}.${name}`, [row + 0.42 + down, across]);
    row += open ? BLOCK_ROWS + 0.5 : 0.74;
  }
  row += 0.1;
  ["final_norm", "logits", "loss"].forEach((name, i) => {
    places.set(name, [row + i, 0]);
  });
  return { places, frames, rows: row + 3 };
}

function build(element, key) {
  const { places, frames, rows } = layout();
  const group = ui.colour;
  const sizes = Object.keys(store.summary.arrays[group]).filter((name) => store.summary.arrays.values[name]).map((name) => rms(group, name)).filter((x) => x > 0);
  const [least, most] = sizes.length ? [Math.min(...sizes), Math.max(...sizes)] : [1, 1];
  const scale = sequential(Math.log10(most), Math.log10(least) - 0.3);
  const box = (name) => {
    const [r, c] = places.get(name);
    return { x: column(0) + (c === 0 ? 0 : column(1) - column(0) + (c - 1) * (W + GAP)), y: r * PITCH };
  };
  const nodes = new Map();
  const canvas = el("div", { class: "flow" });
  canvas.style.height = `${rows * PITCH + 20}px`;
  canvas.style.width = `${column(4) + 4}px`;
  const picture = svg("svg", { class: "edges", width: column(4) + 4, height: rows * PITCH + 20, "aria-hidden": "true" });
  picture.append(arrowheads());
  for (const frame of frames) canvas.append(frameOf(frame));
  const edges = drawEdges(picture, places, frames, box);
  canvas.append(picture);
  operations().forEach((operation, at) => {
    if (!places.has(operation.output)) return;
    const { x, y } = box(operation.output);
    const made = node(operation, at, group, scale);
    made.style.left = `${x}px`;
    made.style.top = `${y}px`;
    nodes.set(operation.output, made);
    canvas.append(made);
  });
  const panel = el("section", { class: "panel", "aria-label": "The operation" });
  const scroller = el("div", { class: "scroller", tabindex: "-1" }, canvas);
  const bounds = { low: 10 ** scale.low, high: 10 ** scale.high };
  keepingFocus(element, () => element.replaceChildren(el("div", { class: "map" }, el("div", { class: "map-left" }, toolbar(bounds, scale), scroller), panel)));
  drawn = { key, nodes, edges, panel, scroller, box, places };
}

function toolbar(bounds, scale) {
  const choice = (by, text) => el("button", { type: "button", "aria-pressed": String(ui.colour === by), "data-keep": `colour-${by}`, onclick: () => colour(by) }, text);
  const shownScale = legend(scale, "size per element");
  const ticks = [bounds.low, Math.sqrt(bounds.low * bounds.high), bounds.high].map((x) => el("span", {}, number(x, 2)));
  shownScale.querySelector(".legend-ticks").replaceChildren(...ticks);
  shownScale.title = "Norm divided by the square root of the number of elements; logarithmic";
  return el("div", { class: "bar" },
    el("div", { class: "choice", role: "group", "aria-label": "Colour and thumbnails" }, choice("values", "Activations ↓"), choice("grads", "Gradients ↑")),
    shownScale,
    el("span", { class: "grow" }),
    el("span", { class: "quiet hint" }, el("kbd", {}, "←"), " ", el("kbd", {}, "→"), " step through the pass"));
}

function frameOf({ block, row, open }) {
  const prefix = `trf_blocks.${block}.`;
  const frame = el("div", { class: open ? "frame open" : "frame" });
  frame.style.top = `${row * PITCH - 4}px`;
  frame.style.height = `${(open ? BLOCK_ROWS + 0.36 : 0.6) * PITCH}px`;
  const fold = el("button", { type: "button", class: "fold", "aria-expanded": String(open), "data-keep": `fold-${block}`, onclick: () => {
    ui.open = open ? -1 : block;
    if (location.hash.startsWith("#map/")) go("map");
    else redraw();
  } }, open ? `▾ block ${block}` : `▸ block ${block}`);
  const shown = ["resid_pre", "att.probs", "att.out", "resid_mid", "ff.act", "resid_post"];
  const links = shown.map((name) => el("a", { href: link(prefix + name, null, ui.colour === "grads"), title: label(prefix + name, null) }, thumbnail(store.summary.thumbs[ui.colour]?.[prefix + name], isProbability(name), "thumb tiny"), name));
  frame.append(fold, ...(open ? [] : [el("span", { class: "folded" }, links)]));
  return frame;
}

const isProbability = (name) => ui.colour === "values" && name.endsWith("att.probs");

/** A tensor on the map, with the operation that makes it. */
function node(operation, at, group, scale) {
  const name = operation.output;
  const gradient = group === "grads";
  const scalar = name === "loss";
  const shape = scalar ? [] : store.summary.arrays.values[name].shape;
  const size = scalar ? (gradient ? 1 : store.summary.loss) : rms(group, name);
  const made = el("div", { class: "node", dataset: { name } });
  const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
  if (!scalar && size > 0) swatch.style.backgroundColor = scale.css(Math.log10(size));
  const facts = scalar ? number(size, 5) : `${shapeText(shape)}`;
  const parameters = operation.parameters.map((parameter) => el("a", { class: "parameter", href: link(parameter, null, gradient), title: `${parameter} ${shapeText(store.summary.arrays.params[parameter].shape)}` }, parameterText(parameter, operation)));
  const step = gradient ? 2 * operations().length - 1 - at : at;
  made.append(swatch,
    el("a", { class: "node-main", href: link(name, null, gradient && !scalar), title: `${gradient ? "gradient of " : ""}${name}: ${shapeText(shape)}, ${number(size, 3)} per element`, "aria-label": `${name}, made by ${title(operation)}, shape ${shapeText(shape)}` },
      scalar ? null : el("span", { class: "node-picture" }, thumbnail(store.summary.thumbs[group]?.[name], isProbability(name)), el("span", { class: "quiet num size" }, number(size, 2))),
      el("span", { class: "node-text" }, el("b", {}, gradient ? el("i", {}, "d ") : null, split(name).rest), el("span", { class: scalar ? "num" : "quiet" }, facts))),
    el("a", { class: "kind", href: `#map/${step}`, title: `Step ${step + 1}: ${title(operation)}, ${gradient ? "backward" : "forward"}` }, BRIEF[operation.kind] ?? title(operation)),
    parameters.length ? el("span", { class: "parameters" }, parameters) : "");
  return made;
}

const parameterText = (parameter, operation) => (operation.kind === "linear" || operation.kind === "layernorm" ? short(parameter).split(".").slice(operation.kind === "layernorm" ? -1 : 0).join(".").replace(/^ff\.layers\.(\d)(.*)$/, (_, n, rest) => rest ? "bias" : `layers.${n}`).replace(/^out_proj\.bias$/, "bias") : parameter.replace(".weight", ""));

function arrowheads() {
  const head = (id) => svg("marker", { id, viewBox: "0 0 8 8", refX: 6.5, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", class: id },
    svg("path", { d: "M1 1 L7 4 L1 7 Z" }));
  return svg("defs", {}, head("down"), head("up"), head("on"));
}

/** Two lanes for each input of each operation: the value goes down, its gradient comes up. */
function drawEdges(picture, places, frames, box) {
  const edges = [];
  const anchor = (name) => {
    if (places.has(name)) return { ...box(name), w: W, h: H };
    const { block } = split(name);
    const frame = frames.find((each) => each.block === block);
    return frame ? { x: column(0), y: frame.row * PITCH - 4, w: W, h: 0.6 * PITCH, frame: block } : null;
  };
  const seen = new Set();
  operations().forEach((operation, at) => {
    const to = anchor(operation.output);
    if (!to) return;
    operation.inputs.forEach((input, position) => {
      const from = anchor(input);
      const inside = from && to && from.frame !== undefined && from.frame === to.frame;
      if (!from || inside) return;
      const once = `${from.x},${from.y} ${to.x},${to.y}`;
      if (seen.has(once)) return;
      seen.add(once);
      for (const [lane, aside] of [["down", -4], ["up", 4]]) {
        const path = svg("path", { d: route(from, to, aside, lane === "up", position), class: `edge ${lane} ${ui.colour === "values" ? (lane === "down" ? "strong" : "") : lane === "up" ? "strong" : ""}`, "marker-end": `url(#${lane})` });
        picture.append(path);
        edges.push({ path, at, input, lane });
      }
    });
  });
  return edges;
}

/** The path between two boxes; the lane of gradients is the same way, the other way round. */
function route(from, to, aside, reverse, position) {
  let points;
  const level = Math.abs(from.y - to.y) < 2;
  if (level) {
    const right = from.x < to.x;
    const y = from.y + from.h / 2 + aside;
    points = [[right ? from.x + from.w + 2 : from.x - 2, y], [right ? to.x - 2 : to.x + to.w + 2, y]];
  } else {
    const many = to.x !== from.x;
    const spread = many ? Math.max(-50, Math.min(18, (from.x - to.x) * 0.22)) : 0;
    const leave = many ? Math.max(-45, Math.min(45, (to.x - from.x) * 0.2)) : 0;
    const [a, b] = [from.x + from.w / 2 + aside + leave, to.x + to.w / 2 + aside + spread];
    const bottom = from.y + from.h + 2;
    const top = to.y - 2;
    const turn = Math.max(bottom + 4, top - 11 + (a < b ? -aside : aside) * 0.9);
    points = a === b ? [[a, bottom], [a, top]] : [[a, bottom], [a, turn], [b, turn], [b, top]];
  }
  if (reverse) points.reverse();
  return points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join(" ");
}

/** Which values are computed after a step, and how many readers have contributed to each gradient. */
function progress(step) {
  const n = operations().length;
  const done = { values: new Set(), part: new Map() };
  operations().forEach((operation, at) => {
    if (at <= step) done.values.add(operation.output);
    if (2 * n - 1 - at <= step) for (const input of [...operation.inputs, ...operation.parameters]) done.part.set(input, (done.part.get(input) ?? 0) + 1);
  });
  return done;
}

const readers = (name) => operations().filter((operation) => operation.inputs.includes(name) || operation.parameters.includes(name));

function mark(step, current) {
  const done = current ? progress(step) : null;
  for (const [name, made] of drawn.nodes) {
    const state = made.classList;
    state.remove("now", "source", "later", "partly");
    if (!current) continue;
    const { operation, backward } = current;
    if (name === operation.output) state.add(backward ? "source" : "now");
    else if (operation.inputs.includes(name)) state.add(backward ? "now" : "source");
    else if (!backward && !done.values.has(name)) state.add("later");
    else if (backward && name !== "loss") {
      const parts = done.part.get(name) ?? 0;
      if (parts === 0) state.add("later");
      else if (parts < readers(name).length) state.add("partly");
    }
  }
  for (const { path, at, lane } of drawn.edges) path.classList.toggle("on", Boolean(current) && at === current.at && lane === (current.backward ? "up" : "down"));
  for (const { path } of drawn.edges) path.setAttribute("marker-end", `url(#${path.classList.contains("on") ? "on" : path.classList.contains("up") ? "up" : "down"})`);
  if (!current) return;
  const focus = drawn.nodes.get(current.operation.output);
  if (focus) {
    const room = drawn.scroller;
    const y = focus.offsetTop;
    if (y < room.scrollTop + PITCH || y > room.scrollTop + room.clientHeight - 2 * PITCH) room.scrollTop = y - room.clientHeight / 2;
  }
}

// The side panel

function welcome() {
  const n = operations().length;
  return el("div", { class: "welcome" },
    el("h1", {}, "One pass, every number"),
    el("p", {}, `The model read ${store.summary.pieces.length} tokens. Each box is a tensor of that pass, with the operation that made it: values flow down, gradients come back up.`),
    el("ol", { class: "ways" },
      el("li", {}, "Step through it: ", el("a", { href: "#map/0" }, "first operation"), ", ", el("a", { href: `#map/${n}` }, "first step backward"), "."),
      el("li", {}, "Open a box: its heat map, its formula, its source."),
      el("li", {}, "Click a cell there: the terms that the number is the sum of.")),
    beginnings());
}

/** Links for a first look. */
function beginnings() {
  const last = `trf_blocks.${store.summary.config.n_layers - 1}.`;
  const often = mostOften(store.summary.tokens[0]);
  const places = [
    ["where each head looks", link(`${last}att.probs`)],
    ["where the gradient of a token's key comes from", link(`${last}att.k`, null, true), ".pulls"],
    ["a weight's gradient, one term for each token", link(`${last}att.W_value.weight`, [0, 0], true)],
    [often.times > 1 ? "where a repeated token's gradients add up" : "where a token's gradient arrives", link("tok_emb.weight", [often.id, 0], true)],
  ];
  return el("p", { class: "places" }, "Or begin at: ", places.map(([text, href, goal], i) => [i ? " · " : "", el("a", { href, onclick: () => { ui.goal = goal ?? null; } }, text)]), ".");
}

function operationPanel(step, { operation, backward, at }) {
  const formula = formulaOf(operation);
  const n = operations().length;
  const button = (to, text, name) => el("a", { class: "step", href: `#map/${Math.max(0, Math.min(steps() - 1, to))}`, "aria-label": name, "data-keep": name, "aria-disabled": String(to < 0 || to >= steps()) }, text);
  const gauge = el("progress", { max: steps() - 1, value: step, "aria-hidden": "true" });
  return el("div", { class: "operation" },
    el("div", { class: "stepper" }, button(step - 1, "←", "Previous step"), el("span", { class: "num" }, `step ${step + 1} of ${steps()}`), button(step + 1, "→", "Next step"),
      el("span", { class: "grow" }), el("a", { href: `#map/${backward ? at : 2 * n - 1 - at}`, class: "quiet", "data-keep": "other-way" }, backward ? "its forward ↓" : "its backward ↑")),
    gauge,
    el("h1", {}, title(operation), el("span", { class: backward ? "way back" : "way" }, backward ? "backward" : "forward")),
    el("p", { class: "says" }, backward ? formula.saysBackward : formula.says),
    formulaLines(backward ? formula.backward : formula.forward),
    backward ? backwardTable(operation, step) : forwardTable(operation));
}

const tensorLine = (role, name, gradient, note) => {
  const raw = name === "tokens" || name === "targets";
  const facts = raw ? null : store.summary.arrays[gradient ? "grads" : store.summary.arrays.params?.[name] ? "params" : "values"]?.[name];
  const shape = raw ? [1, store.summary.pieces.length] : (facts?.shape ?? []);
  const { block, rest } = split(name);
  const words = [gradient ? el("i", {}, "d ") : null, el("b", {}, rest), block === null ? null : el("span", { class: "quiet" }, ` block ${block}`)];
  return el("tr", {}, el("th", { scope: "row" }, role),
    el("td", {}, raw ? words : el("a", { href: link(name, null, gradient && name !== "loss") }, words), note ? el("span", { class: "quiet note" }, note) : null),
    el("td", { class: "num quiet" }, shapeText(shape)),
    el("td", { class: "num" }, facts ? number(perElement(facts), 2) : ""));
};

const tensorTable = (rows) => el("table", { class: "io" }, el("thead", {}, el("tr", {}, el("th"), el("th"), el("th", {}, "shape"), el("th", { title: "norm per element" }, "size"))), el("tbody", {}, rows));

function forwardTable(operation) {
  return tensorTable([
    ...operation.inputs.map((name) => tensorLine("reads", name, false)),
    ...operation.parameters.map((name) => tensorLine("with", name, false)),
    tensorLine("makes", operation.output, false)]);
}

/** What an operation's backward needs of the forward pass. */
function kept({ kind, inputs, output, parameters }) {
  if (kind === "softmax") return [output];
  if (kind === "linear" || kind === "layernorm") return [...inputs, parameters[0]];
  return ["scores", "mix", "gelu", "embedding", "cross_entropy"].includes(kind) ? inputs : [];
}

function backwardTable(operation, step) {
  const parts = progress(step).part;
  const part = (name) => {
    const many = readers(name).length;
    if (many < 2) return null;
    const nth = parts.get(name) ?? 1;
    return nth < many ? `part ${nth} of ${many}: the rest comes from its other readers` : `part ${many} of ${many}: now it is complete`;
  };
  const known = (name) => name !== "tokens" && name !== "targets";
  return tensorTable([
    tensorLine("reads", operation.output, true),
    ...kept(operation).map((name) => tensorLine("reads", name, false, " kept from the forward pass")),
    ...operation.inputs.filter(known).map((name) => tensorLine("makes", name, true, part(name))),
    ...operation.parameters.map((name) => tensorLine("makes", name, true, part(name)))]);
}

// Tables that the tensor view shows too

/** How much the loss grows when a head is zeroed; each cell leads to the head's pattern. */
export function headsSection() {
  const box = el("section", { class: "heads-section" }, el("h2", {}, "Which head matters?"));
  const { heads } = store.summary;
  if (!heads) return askForHeads(box);
  const changes = heads.zeroed.map((row) => row.map((loss) => (loss === null || heads.loss === null ? NaN : loss - heads.loss)));
  const known = changes.flat().filter((change) => !Number.isNaN(change));
  const most = Math.max(...known);
  const scale = diverging(Math.max(...known.map(Math.abs), 1e-12));
  const cell = (change, block, head) => {
    const made = el("td", { class: change === most ? "most" : null }, el("a", { class: "num", href: `#trf_blocks.${block}.att.probs?head=${head}`, title: `Without head ${head} of block ${block} the loss is ${decimal(heads.zeroed[block][head], 6)}: open its pattern` }, changeOf(heads.loss, heads.zeroed[block][head], 2)));
    if (!Number.isNaN(change)) made.style.backgroundColor = scale.css(change * 0.6);
    return made;
  };
  const n = store.summary.config.n_heads;
  box.append(
    el("p", { class: "quiet" }, "Change of the loss when a head's part of ", el("b", {}, "att.heads"), " is set to 0. A click opens its pattern."),
    el("div", { class: "wide" }, el("table", { class: "heads" },
      el("thead", {}, el("tr", {}, el("th"), Array.from({ length: n }, (_, h) => el("th", { scope: "col" }, n > 6 ? String(h) : `head ${h}`)))),
      el("tbody", {}, changes.map((row, block) => el("tr", {}, el("th", { scope: "row" }, `block ${block}`), row.map((change, head) => cell(change, block, head))))))));
  return box;
}

function askForHeads(box) {
  const { n_layers: L, n_heads: NH } = store.summary.config;
  const button = el("button", { type: "button", class: "plain", disabled: measuring !== null, onclick: measureHeads }, measuring ?? `Zero each of the ${L * NH} heads in turn`);
  box.append(el("p", { class: "quiet" }, `Takes ${count(L * NH)} forward passes.`), button, unmeasured ? el("p", { class: "error" }, unmeasured) : "");
  return box;
}

let measuring = null; // what the button says meanwhile
let unmeasured = null; // why the last attempt failed

async function measureHeads() {
  const show = () => document.querySelectorAll(".heads-section").forEach((box) => box.replaceWith(headsSection()));
  [measuring, unmeasured] = ["Measuring …", null];
  show();
  const watch = setInterval(async () => {
    const { done, of } = await store.progress().catch(() => ({}));
    if (!done || measuring === null) return;
    measuring = `Measured ${done} of ${of} …`;
    show();
  }, 700);
  try {
    await store.heads();
  } catch (problem) {
    unmeasured = problem.message;
  } finally {
    clearInterval(watch);
    measuring = null;
    show();
  }
}

/** What each stage of the stream would say next after one token: final norm and head applied to it. */
function lensSection() {
  const { lens, pieces, targets, targetPieces } = store.summary;
  const t = ui.token ?? pieces.length - 1;
  const stage = (name) => {
    const { block, rest } = split(name);
    return block === null ? name : `block ${block} ${rest}`;
  };
  const row = (each) => {
    const [best] = each.top[t];
    const right = best.id === targets[0][t];
    return el("tr", {},
      el("th", { scope: "row" }, el("a", { href: link(each.name) }, stage(each.name))),
      el("td", { class: right ? "right" : null }, el("bdi", {}, quoted(best.piece)), right ? " ✓" : ""),
      el("td", { class: "num" }, percent(best.p)),
      el("td", { class: "num" }, percent(each.targetP[t])),
      el("td", { class: "num quiet" }, decimal(each.loss, 3)));
  };
  return el("section", { class: "lens-section" },
    el("h2", {}, "What would it say after each block?"),
    el("p", { class: "quiet" }, "After token ", el("b", {}, `${t} `, el("bdi", {}, quoted(pieces[t]))), ", whose true next is ", el("b", {}, el("bdi", {}, quoted(targetPieces[t]))), ": the final norm and the head applied to the stream at each stage. Choose another token in the strip above."),
    el("table", { class: "lens" },
      el("thead", {}, el("tr", {}, el("th", {}, "stream"), el("th", {}, "would say"), el("th", {}, "p"), el("th", {}, "p(true)"), el("th", { title: "mean loss over all tokens" }, "mean loss"))),
      el("tbody", {}, lens.map(row))));
}

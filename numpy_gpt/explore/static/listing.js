/** How a tensor is made: the formulas of its operations, and the source lines that compute it. */

import { store } from "explore/store.js";
import { ui } from "explore/main.js";
import { el, formula as formulaLines, formulaOf, isParameter, keepingFocus, link, split, trusted } from "explore/text.js";

const operations = () => store.summary.operations;

/** The operations that make a tensor, or its gradient: [{kind, says, positions, ops, role}], one for each kind. */
function makers(name, gradient) {
  if (!gradient) return operations().filter((operation) => operation.output === name).map((operation) => ({ kind: operation.kind, source: operation.source, ops: [operation], role: "output", positions: [] }));
  const found = new Map();
  const role = isParameter(name) ? "parameters" : "inputs";
  for (const operation of operations()) {
    operation[role].forEach((input, position) => {
      if (input !== name) return;
      const group = found.get(operation.source) ?? { kind: operation.kind, source: operation.source, ops: [], role, positions: [] };
      group.ops.push(operation);
      if (!group.positions.includes(position)) group.positions.push(position);
      found.set(operation.source, group);
    });
  }
  return [...found.values()];
}

export function computation(route, kinds) {
  const { name } = route;
  const wanted = kinds.flatMap((kind) => makers(name, kind !== "value").map((maker) => ({ ...maker, gradient: kind !== "value" })));
  if (!wanted.length) return el("section", {}, el("h2", {}, "How it is made"), el("p", { class: "quiet" }, "A parameter: the checkpoint holds it. Its gradient has a formula: ", el("a", { href: link(name, null, true) }, "gradient"), "."));
  return el("section", { class: "computation" }, el("h2", {}, "How it is made"), wanted.map((maker) => one(name, maker)));
}

function one(name, { kind, source, ops, role, positions, gradient }) {
  const formula = formulaOf(ops[0]);
  const from = gradient ? [`The gradient ${ops.length > 1 ? "adds up what comes" : "comes"} back through `, el("b", {}, formula?.title ?? kind), " of ", ops.map((operation, i) => [i ? ", " : "", operation.output === "loss" ? el("a", { href: "#loss/" }, "loss") : el("a", { href: link(operation.output, null, true) }, `d ${split(operation.output).rest}`)])] : [el("b", {}, formula?.title ?? kind), ". ", formula?.says ?? ""];
  const html = gradient ? formula?.backward : formula?.forward;
  return el("div", { class: "made" }, el("p", {}, from), html ? formulaLines(html) : null, listingBox(source, role, positions));
}

function listingBox(source, role, positions) {
  const found = store.summary.sources?.[source];
  if (!found) return null;
  const box = el("div", { class: "source" });
  const which = found[ui.listing] ? ui.listing : "plain";
  const tab = (to) => (found[to] ? el("button", { type: "button", "aria-pressed": String(which === to), title: "key s", "data-keep": `listing-${to}`, onclick: () => showListing(box.closest(".tensor"), to) }, found[to].file.replace("numpy_gpt/", "")) : null);
  const from = found[which];
  const code = trusted(el("pre", { class: "listing highlight", tabindex: "0", "aria-label": `Source of ${from.file}` }), from.html);
  const marks = role === "output" ? from.marks.output : positions.flatMap((position) => from.marks[role]?.[position] ?? []);
  for (const line of marks ?? []) code.querySelector(`[data-line="${line}"]`)?.classList.add("marked");
  box.append(el("div", { class: "choice small", role: "group", "aria-label": "Source" }, tab("plain"), tab("ops")), code);
  box.redraw = () => box.replaceWith(listingBox(source, role, positions));
  return box;
}

export function showListing(element, to) {
  ui.listing = to;
  keepingFocus(element, () => element.querySelectorAll(".source").forEach((box) => box.redraw()));
  element.querySelectorAll(".listing").forEach(showMark);
}

export function showMark(code) {
  const first = code.querySelector(".marked");
  if (first) code.scrollTop = first.offsetTop - code.clientHeight / 2 + 10;
}

/** Zoom 3, one number: its index, value and gradient, the terms it is the sum of, and what follows if it is changed. */

import { store } from "explore/store.js";
import { explain, next, whyZero } from "explore/terms.js";
import { announce, choose, go, route as current, ui } from "explore/main.js";
import { ONLY_SERVED, axes, count, decimal, el, formula as formulaLines, formulaOf, groupOf, isParameter, label, link, number, part, percent, piece, pieceAt, quoted, split, targetAt } from "explore/text.js";

const FIRST = 30; // terms shown before "show all", of more than 40
const FEW = 40;
const WRITTEN = 4; // terms in the line that has the numbers put in
const MOST_SHOWN = 2000; // rows that a table of terms can have
export const DECAY = 0.1; // weight decay, as in the book
const BETA1 = 0.9, BETA2 = 0.999, TINY = 1e-8; // AdamW's, as in the book

/** For the list of keys. */
export const KEYS = [
  ["f", "on a number: follow its largest term, on and on to the loss, a token or a parameter"],
  ["Backspace", "the number before"],
  ["i", "edit the number's index; there ↑ ↓ go to the neighbours"],
];

let trail = []; // numbers that were looked at, the present one last
let drawing = 0; // renderings begun; a later one makes an earlier one stop
let found = null; // the present number's explanation, for the key f
let panel = null;

store.on("run", () => { trail = []; });

/** Draw the number that the route names. */
export async function render(element, route) {
  const here = { name: route.name, index: route.index, gradient: route.gradient };
  const turn = ++drawing;
  const focus = element.contains(document.activeElement) ? document.activeElement.dataset.keep ?? "" : null;
  panel = element;
  found = null;
  remember(here);
  const terms = el("section", { class: "terms" }, el("p", { class: "quiet" }, "Adding up …"));
  const both = el("dl", { class: "pair" });
  const stories = el("div");
  element.replaceChildren(crumbs(), title(here), indexEditor(here), both, terms, stories);
  if (focus !== null) (element.querySelector(`[data-keep="${focus}"]`) ?? heading(element)).focus({ preventScroll: focus !== "" });
  try {
    const [explanation, other] = await Promise.all([explain(store, here.name, here.index, here.gradient), otherNumber(here)]);
    if (turn !== drawing) return;
    found = { here, explanation };
    both.replaceChildren(...pair(here, explanation.stored, other));
    terms.replaceChildren(...howItCameAbout(here, explanation));
    stories.replaceChildren(...experiments(here, explanation, other));
    terms.dataset.of = href(here);
    await torchBeside(both, here, explanation, turn);
  } catch (problem) {
    if (turn === drawing) terms.replaceChildren(el("p", { class: "error" }, problem.message));
  }
}

const heading = (element) => element.querySelector("h1");
const same = (a, b) => a && b && link(a.name, a.index, a.gradient) === link(b.name, b.index, b.gradient);

function remember(here) {
  if (same(trail.at(-1), here)) return;
  if (same(trail.at(-2), here)) trail.pop();
  else trail = [...trail, here].slice(-60);
}

/** The number itself: the loss is in the summary, and its gradient is 1. */
async function numberAt({ name, index, gradient }) {
  if (name === "loss") return gradient ? 1 : store.summary.loss;
  return (await store.slice(groupOf(name, gradient), name, index)).data[0];
}

/** The value of a gradient's number, or its gradient. */
const otherNumber = (here) => numberAt({ ...here, gradient: !here.gradient });

// What it is

function crumbs() {
  const before = trail.slice(-4, -1);
  return el("nav", { class: "crumbs", "aria-label": "Where you came from" },
    before.length ? [
      trail.length > 4 ? "… › " : null,
      before.map((each) => [el("a", { href: href(each), title: named(each) }, brief(each)), " › "]),
      el("span", { class: "quiet" }, "here "), el("kbd", { title: "Backspace goes back" }, "⌫"),
    ] : el("span", { class: "quiet" }, "One number"));
}

const href = ({ name, index, gradient }) => link(name, index, gradient);
const named = ({ name, index, gradient }) => `${gradient ? "gradient of " : ""}${label(name, index)}`;
const brief = ({ name, index, gradient }) => `${gradient ? "d " : ""}${name.replace(/^trf_blocks\./, "")}${index.length ? `[${index.join(",")}]` : ""}`;

function title({ name, index, gradient }) {
  const { block, rest } = split(name);
  const named = axes(name);
  const words = index.map((i, at) => (named[at] === "text" ? null : part(name, named[at], i))).filter(Boolean);
  return el("header", {},
    el("h1", { tabindex: "-1", "data-keep": "" }, gradient ? el("i", { class: "of" }, "∂loss/∂ ") : null, rest,
      block === null ? null : el("span", { class: "quiet" }, ` block ${block}`)),
    el("p", { class: "cell" }, words.map((each, i) => [i ? " · " : null, el("bdi", {}, each)])));
}

/** The index as fields: a number can be typed, and arrow keys go to the neighbours. */
function indexEditor({ name, index, gradient }) {
  const shape = shapeOf(name);
  if (!shape.length) return el("p", { class: "quiet note" }, "A single number: mean nats per token.");
  const fields = index.map((i, axis) => field(name, index, axis, shape[axis], gradient));
  return el("form", { class: "index", "aria-label": "Index", onsubmit: (event) => {
    event.preventDefault();
    typed(fields, name, shape, gradient);
  } }, fields, el("button", { type: "submit", class: "sr" }, "Go there"));
}

const shapeOf = (name) => (name === "loss" ? [] : store.shape(isParameter(name) ? "params" : "values", name));

function field(name, index, axis, size, gradient) {
  const input = el("input", { type: "text", inputmode: "numeric", class: "num", value: String(index[axis]), "data-keep": `axis-${axis}`, autocomplete: "off", title: `0 to ${size - 1}; ↑ ↓ go to the neighbours`, disabled: size === 1 });
  input.addEventListener("focus", () => input.select());
  input.addEventListener("change", () => input.form?.requestSubmit());
  input.addEventListener("keydown", (event) => {
    const by = { ArrowUp: 1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    step(name, index, axis, by, gradient);
  });
  return el("label", {}, input, el("span", { class: "quiet" }, `${axes(name)[axis] ?? "index"} of ${count(size)}`));
}

function step(name, index, axis, by, gradient) {
  const moved = Math.max(0, Math.min(shapeOf(name)[axis] - 1, index[axis] + by));
  if (moved !== index[axis]) go(name, index.with(axis, moved), gradient);
}

function typed(fields, name, shape, gradient) {
  const index = fields.map((each) => each.querySelector("input").value.trim());
  const wrong = index.findIndex((text, axis) => !/^\d+$/.test(text) || Number(text) >= shape[axis]);
  if (wrong < 0) return go(name, index.map(Number), gradient);
  const input = fields[wrong].querySelector("input");
  input.setCustomValidity(`A whole number from 0 to ${shape[wrong] - 1}`);
  input.reportValidity();
  input.addEventListener("input", () => input.setCustomValidity(""), { once: true });
}

/** The shortest decimal number that gives these bits again. */
function exact(x) {
  if (x === null || x === undefined) return "none";
  if (!Number.isFinite(x)) return number(x);
  if (store.summary.dtype !== "float32" || Math.fround(x) !== x) return String(x);
  for (let digits = 1; digits < 9; digits++) {
    const text = x.toPrecision(digits);
    if (Math.fround(text) === x) return String(Number(text));
  }
  return String(Number(x.toPrecision(9)));
}

/** Value and gradient, the one explained highlighted. */
function pair(here, stored, other) {
  const both = [[false, here.gradient ? other : stored], [true, here.gradient ? stored : other]];
  return both.filter(([, x]) => x !== null).map(([gradient, x]) => {
    const explained = gradient === here.gradient;
    const to = link(here.name, here.index, gradient);
    return el("div", { class: explained ? "explained" : null, "data-of": gradient ? "gradient" : "value" },
      el("dt", {}, explained ? (gradient ? "gradient" : "value") : el("a", { href: to, "data-keep": "other" }, gradient ? "gradient" : "value"), " ", el("kbd", {}, gradient ? "g" : "v")),
      el("dd", { class: "num" }, exact(x)));
  });
}

/** torch's number under ours. It computes the pass when it is first asked. */
async function torchBeside(both, here, explanation, turn) {
  if (!store.summary.torch || here.name === "loss" || (isParameter(here.name) && !here.gradient)) return;
  const ours = both.querySelector(".explained");
  const line = el("dd", { class: "torch quiet", title: "In units of eps · Σ|terms|, as the difference below" }, "asking PyTorch …");
  ours?.append(line);
  try {
    const [theirs] = (await store.torch(here.gradient ? "grads" : "values", here.name, here.index)).data;
    if (turn !== drawing) return;
    line.replaceChildren("PyTorch ", el("span", { class: "num" }, exact(theirs)), `, ${away(theirs, explanation)}`);
  } catch (problem) {
    line.textContent = `PyTorch: ${problem.message}`;
  }
}

/** How far PyTorch's number is from ours. */
function away(theirs, { stored, size }) {
  if (Object.is(theirs, stored)) return "the same bits";
  const off = Math.abs(theirs - stored);
  if (!Number.isFinite(off)) return theirs === stored ? "the same" : "not the same";
  const scale = size * store.summary.eps;
  return off === 0 ? "the same but for the sign" : `${scale ? `${number(off / scale, 2)} eps` : number(off, 2)} away`;
}

// How it is computed

/** The formulas that explain this number, each kind of operation once. */
function formulas({ name, gradient }) {
  const reads = isParameter(name) ? "parameters" : "inputs";
  const all = store.summary.operations.filter((op) => (gradient ? op[reads].includes(name) : op.output === name));
  const kinds = new Map(all.map((op) => [op.kind, op])); // the three linears of norm1 have one formula
  return [...kinds.values()].map((op) => {
    const { forward, backward } = formulaOf(op);
    const box = formulaLines(gradient ? backward : forward);
    if (gradient && kinds.size > 1) box.prepend(el("span", { class: "quiet note" }, `through ${split(op.output).rest}:`));
    if (gradient && SEPARATE.has(op.kind)) only(box, isParameter(name) ? op.inputs.length + op.parameters.indexOf(name) : op.inputs.indexOf(name));
    return box;
  });
}

/** Kinds whose backward formula has an equation for each input, and then for each parameter. */
const SEPARATE = new Set(["linear", "scores", "mix"]);

/** Leave one equation, without the comma after it. */
function only(box, which) {
  if (box.querySelectorAll("math").length <= which) return;
  const equations = [...box.querySelectorAll("math")];
  equations.forEach((equation, at) => at !== which && equation.remove());
}

function howItCameAbout(here, explanation) {
  const { terms, stored } = explanation;
  const made = [el("h2", {}, "How it is computed")];
  if (here.name === "loss" && here.gradient) {
    made.push(el("p", { class: "says" }, "The derivative of the loss with respect to itself is 1: the backward pass starts here. The way on is the loss itself, and what it is computed from."));
    return [...made, followButton(here, explanation)];
  }
  if (!here.gradient && isParameter(here.name)) {
    made.push(el("p", { class: "says" }, "A parameter, read from the checkpoint; this pass does not compute it."));
    return made;
  }
  const zero = here.gradient && (stored === 0 || here.name.endsWith(".W_key.bias"));
  const reason = zero ? whyZero(store, here.name, here.index, explanation) : null;
  if (reason) made.push(el("p", { class: "why" }, el("b", {}, stored === 0 ? "Why 0? " : "Why 0 but for rounding? "), reason));
  if (!here.gradient && stored === -Infinity && here.name.endsWith("att.scores")) made.push(el("p", { class: "why" }, `Key ${here.index[3]} lies in the future of query ${here.index[2]}: its score is −∞, and its probability 0.`));
  made.push(...formulas(here));
  const added = addedUp(here, explanation);
  if (added) made.push(added);
  if (!here.gradient && stored === -Infinity) return made;
  if (here.gradient && here.name.endsWith("att.probs") && here.index[3] > here.index[2]) made.push(el("p", { class: "why" }, "This key lies in the future of its query: p is 0, and softmax’s backward multiplies this gradient by it."));
  if (!terms.length) return [...made, el("p", { class: "quiet" }, reason ? "So it has no terms." : here.name.endsWith("att.scores") ? "It has no terms: the probability p is 0, and softmax’s backward multiplies by it." : "It has no terms.")];
  return [...made, written(here, explanation), account(explanation), followButton(here, explanation), table(here, explanation)];
}

/** Of a token's row: the positions whose gradients add up. */
function addedUp({ name, index, gradient }) {
  if (name !== "tok_emb.weight" || !gradient) return null;
  const at = store.summary.tokens[0].flatMap((id, t) => (id === index[0] ? [t] : []));
  if (!at.length) return null;
  const where = at.map((t, i) => [i ? ", " : "", el("a", { href: link("tok_emb", [0, t, index[1]], true) }, String(t))]);
  return el("p", { class: "says added" }, "Token ", el("bdi", {}, quoted(pieceAt(at[0]))), at.length > 1 ? " occurs at positions " : " occurs at position ", where,
    at.length > 1 ? ": their gradients add up here." : ": its gradient arrives here.",
    store.summary.config.tie_weights ? " The output layer uses the same row, and adds a gradient from every position." : null);
}

/** A factor in four digits; where a sum holds negative ones, in brackets. */
const inProduct = (x) => {
  const text = number(x).replaceAll("-", "−"); // where a line must not break
  return x < 0 ? `(${text})` : text;
};

/** The formula with the numbers put in. */
function written(here, { terms, sum }) {
  const shown = terms.slice(0, terms.length <= WRITTEN + 1 ? terms.length : WRITTEN);
  const products = shown.map(({ factors, means, inputs }) => factors.filter((factor, i) => !idle(factor, means[i], inputs[i])).map(inProduct).join(" × ") || "1");
  if (terms[0].exponent) products[0] = `exp(${terms[0].exponent.map(inProduct).join(" − ")})`;
  const rest = terms.length - shown.length;
  return el("p", { class: "written num" }, `${products.join(" + ")}${rest ? ` + … ${count(rest)} more` : ""} = ${number(sum, 5).replaceAll("-", "−")}`);
}

/** Whether a factor says nothing: dropout's 1 where there is none. */
const idle = (factor, means, input) => factor === 1 && !means && !input;

/** The sum beside the stored number, and by how many eps they differ. */
function account({ terms, sum, stored, error, size }) {
  const off = sum === stored ? 0 : sum - stored;
  const cell = (name, ...value) => [el("dt", {}, name), el("dd", {}, ...value)];
  const num = (text) => el("span", { class: "num" }, text);
  return el("dl", { class: "account" },
    cell(`sum of ${count(terms.length)} term${terms.length === 1 ? "" : "s"}`, num(exactSumText(sum))),
    cell("stored", num(exact(stored))),
    cell("difference", num(number(off, 2)), ` = `, el("b", {}, `${number(error, 2)} eps`), el("span", { class: "quiet", title: `Σ|terms| = ${number(size)}, eps = ${number(store.summary.eps, 3)} (${store.summary.dtype}); rounding allows 64` }, error <= 64 ? " of Σ|terms|: rounding" : " of Σ|terms|: more than rounding")));
}

/** A sum in double precision, a little longer than the stored number. */
const exactSumText = (x) => (Number.isFinite(x) ? String(Number(x.toPrecision(store.summary.dtype === "float32" ? 10 : 17))) : number(x));

function followButton(here, explanation) {
  const to = next(explanation, here);
  if (!to) return el("p", { class: "quiet note" }, "Its largest term depends on no other number.");
  return el("p", { class: "follow" }, el("button", { type: "button", class: "plain", "data-keep": "follow", onclick: follow }, here.name !== "loss" ? "Follow the largest term" : here.gradient ? "Follow the loss" : "Follow the token with the largest loss"), " ", el("kbd", {}, "f"), " ", el("span", { class: "quiet" }, "to ", reference(to, here)));
}

/** Go to the number behind the largest term. */
function follow() {
  if (!found || !same(found.here, current())) return;
  const to = next(found.explanation, found.here);
  if (!to) return announce("Its largest term depends on no other number.");
  if (/^(tokens|targets)$/.test(to.name)) {
    choose(to.index.at(-1));
    announce(`Reached ${label(to.name, to.index)}.`);
    return;
  }
  go(to.name, to.index, to.gradient);
}

/** Go to the number that one came from. */
function back() {
  const to = same(trail.at(-1), current()) ? trail.at(-2) : trail.at(-1); // the present one may not be drawn yet
  if (to) go(to.name, to.index, to.gradient);
}

/** A link to a number; of tokens and targets, which are ids, to the token. */
function reference(input, here, shown = () => true) {
  const { block, rest } = split(input.name);
  if (input.name === "tokens" || input.name === "targets") {
    const t = input.index.at(-1);
    const id = store.summary[input.name][input.index[0]][t];
    return el("button", { type: "button", class: "link end", onclick: () => choose(t) }, `${input.name === "tokens" ? "token" : "target"} ${t} `, el("bdi", {}, quoted(input.name === "tokens" ? pieceAt(t) : targetAt(t))), ` (id ${id})`);
  }
  const kinds = axes(input.name);
  const cell = input.index.map((i, at) => (kinds[at] === "text" || !shown(at) ? null : part(input.name, kinds[at], i))).filter(Boolean);
  const elsewhere = block !== null && block !== split(here.name).block;
  return el("a", { href: href(input), title: named(input) }, el("span", { class: "array" }, input.gradient ? el("i", { class: "of" }, "d ") : null, rest), elsewhere ? ` block ${block}` : null, cell.length ? el("span", { class: "cell-of" }, cell.map((each) => [" · ", el("bdi", {}, each)])) : null);
}

/** The terms, the largest first: their factors with what these are, the product, and a bar for its size. */
function table(here, { terms }) {
  const largest = Math.abs(terms[0].value);
  const body = el("tbody");
  const shared = inCommon(terms);
  const box = el("div", {}, sharedLine(shared, here), el("table", { class: "term-table" }, el("thead", {}, el("tr", {}, el("th", {}, "factors"), el("th", {}, "product"))), body));
  const show = (from, to) => body.append(...terms.slice(from, to).map((term, i) => row(here, term, largest, shared, from + i)));
  if (terms.length <= FEW) {
    show(0, terms.length);
    return box;
  }
  show(0, FIRST);
  const rest = terms.slice(FIRST).reduce((sum, { value }) => sum + value, 0);
  const most = Math.min(terms.length, MOST_SHOWN);
  const more = el("p", { class: "more" }, el("span", { class: "quiet" }, `${count(terms.length - FIRST)} smaller terms, together `, el("span", { class: "num" }, number(rest)), " "),
    el("button", { type: "button", class: "plain", onclick: () => {
      show(FIRST, most);
      more.remove();
      if (most < terms.length) box.append(el("p", { class: "quiet" }, `These are the largest ${count(most)} of ${count(terms.length)}.`));
    } }, most < terms.length ? `Show ${count(most)}` : "Show all"));
  box.append(more);
  return box;
}

const array = ({ name, gradient }) => `${gradient ? "d " : ""}${name}`;

/** Of each array that three or more terms name: per axis, whether the index is the same in all of them. */
function inCommon(terms) {
  const seen = new Map();
  for (const { factors, inputs } of terms.slice(0, MOST_SHOWN)) {
    for (const input of inputs.slice(0, factors.length)) {
      const known = seen.get(array(input));
      if (!known) seen.set(array(input), { input, times: 1, same: input.index.map(() => true) });
      else {
        known.times++;
        input.index.forEach((i, axis) => { known.same[axis] &&= i === known.input.index[axis]; });
      }
    }
  }
  const often = [...seen].filter(([, { times, same: axesSame }]) => times > 2 && !axesSame.every(Boolean));
  return Object.assign(new Map(often.map(([key, known]) => [key, known.same])), { inputs: often.map(([, known]) => known.input) });
}

/** What is the same in all terms, said once. */
function sharedLine(shared, here) {
  const parts = shared.inputs.map((input) => {
    const kinds = axes(input.name);
    const cell = input.index.map((i, axis) => (kinds[axis] === "text" || !shared.get(array(input))[axis] ? null : part(input.name, kinds[axis], i))).filter(Boolean);
    return cell.length ? [input.gradient ? el("i", { class: "of" }, "d ") : null, el("b", {}, split(input.name).rest), " ", el("bdi", {}, cell.join(" · "))] : null;
  }).filter(Boolean);
  return parts.length ? el("p", { class: "quiet note shared" }, "In every term: ", parts.map((each, i) => [i ? ", " : "", each])) : null;
}

function row(here, term, largest, shared, at) {
  const { factors, inputs, means, value } = term;
  const lines = factors.map((factor, i) => (idle(factor, means[i], inputs[i]) ? null : el("div", { class: "factor" },
    el("span", { class: "num" }, `${i ? "× " : ""}${number(factor)}`), " ",
    el("span", { class: "from" }, means[i] ? el("span", { class: "quiet" }, `${means[i]} `) : null, inputs[i] ? reference(inputs[i], here, (axis) => !shared.get(array(inputs[i]))?.[axis]) : null)))).filter(Boolean);
  const more = inputs.slice(factors.length);
  if (more.length) lines.push(el("div", { class: "factor" }, el("span", { class: "num" }), " ", el("span", { class: "from quiet" }, more[0].name === "tokens" ? ["row of ", reference(more[0], here)] : more.length === 1 ? "and the other score of this query" : `and the ${more.length} other scores of this query`)));
  const bar = el("i", { class: value < 0 ? "size negative" : "size" });
  bar.style.width = `${largest > 0 && Number.isFinite(largest) ? Math.max(1, (Math.abs(value) / largest) * 100) : 0}%`;
  return el("tr", { "data-term": at }, el("td", {}, lines), el("td", { class: "product" }, el("span", { class: "num", title: String(value) }, number(value, 5)), el("span", { class: "track" }, bar)));
}

// What follows if it is changed

function experiments(here, explanation, other) {
  if (here.name === "loss") return [];
  const gradient = here.gradient ? explanation.stored : other;
  const value = here.gradient ? other : explanation.stored;
  if (isParameter(here.name)) return [nudge(here, gradient), adamw(value, gradient)];
  return [ablation(here)];
}

const section = (name, heading, ...children) => el("section", { class: name }, el("h2", {}, heading), ...children);
const served = () => (store.served ? null : el("p", { class: "quiet" }, ONLY_SERVED));

/** The loss with h added to a parameter's number, beside what its gradient says. */
function nudge(here, gradient) {
  if (!store.served) return section("nudge", "Nudge it", served());
  const outcome = el("dl", { class: "account" });
  const input = el("input", { type: "text", class: "num", value: "0.001", "aria-label": "h: how much to add", "data-keep": "h" });
  const slider = el("input", { type: "range", min: "-6", max: "0", step: "0.25", value: "-3", "aria-label": "h on a logarithmic scale" });
  const problem = el("p", { class: "error", hidden: true });
  let [busy, again] = [false, false];
  const ask = async () => { // one request at a time: of those that come meanwhile, the last
    again = busy;
    if (busy) return;
    const h = Number(input.value.trim().replace("−", "-"));
    problem.hidden = true;
    if (!Number.isFinite(h) || h === 0) {
      outcome.replaceChildren();
      return fail(problem, "h is a number other than 0");
    }
    busy = true;
    try {
      const { loss, base } = await store.nudge(here.name, here.index, h);
      outcome.replaceChildren(...nudged(h, gradient, loss, base));
    } catch (error) {
      fail(problem, error.message);
    } finally {
      busy = false;
    }
    if (again) ask();
  };
  slider.addEventListener("input", () => {
    input.value = String(Number((Math.sign(Number(input.value)) || 1) * 10 ** slider.value).toPrecision(2) * 1);
    ask();
  });
  const form = el("form", { class: "inline", onsubmit: (event) => {
    event.preventDefault();
    ask();
  } }, el("label", {}, "h = ", input), slider, el("button", { class: "plain" }, "Add h"));
  return section("nudge", "Nudge it", el("p", { class: "quiet" }, "Add h to this number alone, in float64: does the loss change by gradient × h?"), form, problem, outcome);
}

function fail(problem, text) {
  problem.textContent = text;
  problem.hidden = false;
}

function nudged(h, gradient, loss, base) {
  if (loss === null) return [el("dt", {}, "loss"), el("dd", {}, "not finite")];
  const change = loss - base;
  const said = gradient * h;
  const line = (name, x, ...after) => [el("dt", {}, name), el("dd", {}, el("span", { class: "num" }, x), ...after)];
  return [
    line("loss", number(base, 8), " → ", el("span", { class: "num" }, number(loss, 8))),
    line("true change", number(change, 5)),
    line("gradient × h", number(said, 5)),
    line("ratio", said === 0 ? "none: the gradient is 0" : number(change / said, 5)),
  ].flat();
}

/** Two numbers in as many digits as tell them apart, four at least. */
function apart(a, b) {
  for (let digits = 4; digits < 17; digits++) if (a === b || number(a, digits) !== number(b, digits)) return [number(a, digits), number(b, digits)];
  return [String(a), String(b)];
}

/** The first step of AdamW for this number. */
function adamw(value, gradient) {
  const lines = el("dl", { class: "account adamw" });
  const input = el("input", { type: "text", class: "num", value: String(ui.lr), "aria-label": "Learning rate", "data-keep": "lr" });
  const draw = () => {
    const rate = Number(input.value);
    if (!(rate >= 0 && Number.isFinite(rate))) return;
    ui.lr = rate;
    lines.replaceChildren(...update(value, gradient));
  };
  input.addEventListener("input", draw);
  draw();
  return section("update", "AdamW’s first step", el("div", { class: "inline" }, el("label", {}, "learning rate ", input), el("span", { class: "quiet" }, `weight decay ${DECAY}`)), lines);
}

function update(w, g) {
  const m = (1 - BETA1) * g;
  const v = (1 - BETA2) * g * g;
  const mHat = m / (1 - BETA1);
  const vHat = v / (1 - BETA2);
  const decay = -ui.lr * DECAY * w;
  const move = (-ui.lr * mHat) / (Math.sqrt(vHat) + TINY);
  const n = (x) => number(x).replaceAll("-", "−");
  const line = (name, text) => [el("dt", {}, name), el("dd", { class: "num" }, text)];
  return [
    line("m", `(1 − 0.9) g = ${n(m)};  m̂ = m/(1 − 0.9) = ${n(mHat)}`),
    line("v", `(1 − 0.999) g² = ${n(v)};  v̂ = v/(1 − 0.999) = ${n(vHat)}`),
    line("decay", `−lr · ${DECAY} · ${inProduct(w)} = ${n(decay)}`),
    line("step", `−lr · m̂/(√v̂ + 1e-8) = ${n(move)}`),
    line("new", apart(w, w + decay + move).map((text) => text.replaceAll("-", "−")).join(" → ")),
  ].flat();
}

/** What can be set to 0 around a number: [words, body for the server]. */
function ablations({ name, index }) {
  const { rest, block } = split(name);
  const kinds = axes(name);
  const at = (keep) => ({ name, at: index.map((i, axis) => (keep.includes(kinds[axis]) ? i : ":")).join(",") });
  if (rest === "att.scores") return index[3] > index[2] ? [] : [["this score", { name, at: index.join(",") }]];
  const choices = [["this number", { name, at: index.join(",") }]];
  const token = kinds.includes("token") ? part(name, "token", index[kinds.indexOf("token")]) : null;
  const head = rest === "att.heads" ? Math.floor(index[2] / (store.summary.config.emb_dim / store.summary.config.n_heads)) : kinds.includes("head") ? index[1] : null;
  if (kinds.includes("feature")) choices.push([`feature ${index.at(-1)} of all tokens`, at(["head", "feature"])]);
  if (token) choices.push([`${token}: all its ${rest === "att.probs" ? "attention" : name === "logits" ? "logits" : "features"}`, at(["token"])]);
  if (head !== null) choices.push([`head ${head}`, rest === "att.heads" ? { heads: [[block, head]] } : at(["head"])]);
  return choices;
}

function ablation(here) {
  if (!store.served) return section("ablate", "Ablate", served());
  const choices = ablations(here);
  if (!choices.length) return el("div");
  const outcome = el("div", { "aria-live": "polite" });
  const buttons = choices.map(([words, body], i) => el("button", { type: "button", class: "plain", "data-keep": `zero-${i}`, "aria-pressed": "false", onclick: async (event) => {
    buttons.forEach((each) => each.setAttribute("aria-pressed", String(each === event.currentTarget)));
    try {
      outcome.replaceChildren(...ablated(await store.ablate(body)));
    } catch (error) {
      outcome.replaceChildren(el("p", { class: "error" }, error.message));
    }
  } }, el("bdi", {}, words)));
  return section("ablate", "Ablate", el("p", { class: "quiet" }, "Set to 0, and run the rest of the pass again:"), el("div", { class: "choices" }, buttons), outcome);
}

/** The loss and the next words before and after. */
function ablated({ loss, base, predictions }) {
  const s = store.summary;
  const change = loss === null || base === null ? null : loss - base;
  const last = s.pieces.length - 1;
  const turned = s.predictions.flatMap((before, t) => (t !== last && before[0].id !== predictions[t][0].id ? [t] : []));
  const says = (top, k) => top.slice(0, k).map(({ piece: text, p }, i) => [i ? ", " : "", el("bdi", {}, piece(text)), el("span", { class: "num quiet" }, ` ${percent(p)}`)]);
  const line = (t, k) => el("tr", {}, el("th", { scope: "row" }, `${t} `, el("bdi", {}, quoted(pieceAt(t)))), el("td", {}, says(s.predictions[t], k)), el("td", {}, says(predictions[t], k)));
  return [
    el("p", { class: "says" }, "loss ", el("span", { class: "num" }, decimal(base, 6)), " → ", el("span", { class: "num" }, decimal(loss, 6)), change === null ? null : `: ${change > 0 ? "worse" : change < 0 ? "better" : "unchanged"}`, change ? [" by ", el("b", { class: "num" }, number(Math.abs(change), 3))] : null),
    el("table", { class: "next-words" }, el("thead", {}, el("tr", {}, ["after", "expected", "now"].map((text) => el("th", {}, text)))),
      el("tbody", {}, line(last, 3), turned.slice(0, 12).map((t) => line(t, 1)))),
    last === 0 ? null : el("p", { class: "quiet note" }, turned.length ? `The first choice changed at ${turned.length} of the other ${last} positions.` : "At all other positions the first choice stayed the same."),
  ].filter(Boolean);
}

// Keys

const typing = (target) => /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName ?? "") && target.type !== "range";

/** f, Backspace and i from anywhere; v, g and arrows where the panel has the focus, which the tensor's keys leave alone. */
document.addEventListener("keydown", (event) => {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || !panel?.isConnected || panel.hidden) return;
  if (typing(event.target) || document.querySelector("dialog[open]")) return;
  const here = current();
  if (here.view !== "tensor" || !here.index) return;
  const everywhere = { f: follow, Backspace: back, i: () => panel.querySelector(".index input:not(:disabled)")?.focus() };
  const inside = { v: () => go(here.name, here.index, false), g: () => go(here.name, here.index, true) };
  const arrow = { ArrowLeft: [1, -1], ArrowRight: [1, 1], ArrowUp: [2, -1], ArrowDown: [2, 1] }[event.key];
  let act = everywhere[event.key];
  if (!act && panel.contains(event.target)) {
    act = inside[event.key];
    if (arrow && event.target.type !== "range" && here.index.length >= arrow[0]) act = () => step(here.name, here.index, here.index.length - arrow[0], arrow[1], here.gradient);
  }
  if (!act) return;
  event.preventDefault();
  act();
});

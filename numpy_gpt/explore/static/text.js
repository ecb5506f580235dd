/** Text for the page: numbers, names, labels of cells, and pieces of text made harmless to look at. */

import { store } from "explore/store.js";

/** Characters that are invisible or change the direction of text, but for the space: a label must show them. */
const HIDDEN = /(?! )[\p{Cc}\p{Cf}\p{Cs}\p{Zs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}\u2800\ufff0-\uffff]/gu;
const PICTURES = { "\n": "⏎", "\t": "⇥" };

/** A piece of text with everything invisible in it made visible; a space on its own shows as ␣. */
export function piece(text) {
  if (text === undefined || text === null) return "?";
  if (text === "") return "∅";
  const seen = text.replace(HIDDEN, (c) => PICTURES[c] ?? `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
  return seen.trim() === "" ? "␣".repeat(seen.length) : seen;
}

/** The same in quotes: “ moves”. */
export const quoted = (text) => `“${piece(text)}”`;

/** The piece of the token at a position of the text. */
export const pieceAt = (t) => store.summary.pieces[t];

/** The piece of the target that belongs to a position. */
export const targetAt = (t) => store.summary.targetPieces[t];

/** The id that occurs most often among some, and how often. */
export function mostOften(ids) {
  const times = (id) => ids.filter((other) => other === id).length;
  const id = ids.reduce((a, b) => (times(b) > times(a) ? b : a));
  return { id, times: times(id) };
}

/** The piece of a token id, where the page knows it. */
export const pieceOf = (id) => store.summary.words[id];

/** The same of a number that JSON could not carry: null, for NaN and infinities. */
export const decimal = (x, digits) => (x === null ? "nan" : number(x, digits));

/** From one loss to another: +0.034. Null, as above, gives nan. */
export const changeOf = (from, to, digits) => (from === null || to === null ? "nan" : `${to >= from ? "+" : ""}${number(to - from, digits)}`);

/** An array's norm divided by the square root of the number of its finite elements. */
export const perElement = (facts) => facts.norm / Math.sqrt(facts.finite || 1);

/** What there is to say of an operation: title, says, saysBackward, forward and backward. */
export const formulaOf = ({ kind, parameters }) => store.summary.formulas[kind === "linear" && parameters.length === 1 ? "linear:unbiased" : kind];

/** What an operation is called. */
export const title = (operation) => formulaOf(operation).title;

export const ONLY_SERVED = "This page is a file. The served page can do it: numpy-gpt explore CHECKPOINT TEXT";

/** The probability of a target whose loss is known. */
export const likelihood = (loss) => (loss === null ? NaN : Math.exp(-loss));

/** A number in at most `digits` significant digits, always one that Python and JavaScript read back. */
export function number(x, digits = 4) {
  if (x === null || x === undefined) return "";
  if (Number.isNaN(x)) return "nan";
  if (!Number.isFinite(x)) return x > 0 ? "inf" : "-inf";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e-3 && size < 1e5) {
    return x.toFixed(Math.max(0, Math.min(20, digits - 1 - Math.floor(Math.log10(size)))));
  }
  return x.toExponential(digits - 1).replace(/e([+-])(\d)$/, "e$10$2");
}

/** A probability as a percentage: 61 %, 0.4 %, 0.0021 %. */
export function percent(p) {
  if (p === null || Number.isNaN(p)) return "nan";
  if (p >= 0.0995) return `${Math.round(p * 100)} %`;
  return p >= 0.001 ? `${(p * 100).toFixed(1)} %` : `${number(p * 100, 2)} %`;
}

/** 163037184 as 163,037,184. */
export const count = (n) => n.toLocaleString("en-US");

/** (1, 4, 30, 32) */
export const shapeText = (shape) => `(${shape.join(", ")}${shape.length === 1 ? "," : ""})`;

/** A name without its block: {block: 1 | null, rest: "att.k"}. */
export function split(name) {
  const found = /^trf_blocks\.(\d+)\.(.+)$/.exec(name);
  return found ? { block: Number(found[1]), rest: found[2] } : { block: null, rest: name };
}

/** att.W_query of att.W_query.weight, for a line with little room. */
export const short = (name) => split(name).rest.replace(/^att\.(?=W_|out_proj)/, "").replace(/\.weight$/, "");

/** Whether a name is a parameter's. */
export const isParameter = (name) => Boolean(store.summary.arrays.params?.[name]);

/** The group that holds an array: values, grads or params. */
export const groupOf = (name, gradient) => (gradient ? "grads" : isParameter(name) ? "params" : "values");

/** What each axis of an array counts: "text", "head", "token", "key" (also a token), "feature", "id", "position", "output", "input". */
export function axes(name) {
  const { rest } = split(name);
  if (name === "loss") return [];
  if (rest === "att.scores" || rest === "att.probs") return ["text", "head", "token", "key"];
  if (/^att\.[qkv]$/.test(rest)) return ["text", "head", "token", "feature"];
  if (name === "logits") return ["text", "token", "id"];
  if (name === "pos_emb") return ["token", "feature"];
  if (name === "pos_emb.weight") return ["position", "feature"];
  if (name === "tok_emb.weight" || name === "out_head.weight") return ["id", "feature"];
  if (isParameter(name)) {
    const rank = store.summary.arrays.params[name].shape.length;
    return rank === 2 ? ["output", "input"] : [/norm/.test(rest) ? "feature" : "output"];
  }
  return ["text", "token", "feature"];
}

/** The head that a row of W_query, W_key or W_value, or a feature of att.heads belongs to; null for other arrays. */
export function headOfOutput(name, i) {
  const { n_heads: NH, emb_dim: C } = store.summary.config;
  return /att\.(W_(query|key|value)\.|heads$)/.test(name) ? Math.floor(i / (C / NH)) : null;
}

/** Whether a tensor is a pattern: a number for each query and key. */
export const isPattern = (name) => /att\.(scores|probs)$/.test(name);

/** The token that a cell belongs to, if any: the query of a pattern. */
export function tokenOf(name, index) {
  const at = axes(name).indexOf("token");
  return at < 0 ? null : index[at];
}

/** One index of an array in words: token 5 “ moves”, id 464 “The”, head 2, output 65 (head 2). */
export function part(name, axis, i) {
  if (axis === "token" || axis === "key") return `${axis} ${i} ${quoted(pieceAt(i))}`;
  if (axis === "id") return pieceOf(i) === undefined ? `id ${i}` : `id ${i} ${quoted(pieceOf(i))}`;
  const head = axis === "output" || axis === "feature" ? headOfOutput(name, i) : null;
  return head === null ? `${axis} ${i}` : `${axis} ${i} (head ${head})`;
}

/** att.k · block 0 · head 2 · token 5 “ moves” · feature 7 */
export function label(name, index) {
  if (name === "tokens" || name === "targets") {
    const t = index[index.length - 1];
    return `${name.slice(0, -1)} ${t} ${quoted(name === "tokens" ? pieceAt(t) : targetAt(t))}`;
  }
  const { block, rest } = split(name);
  const head = block === null ? [rest] : [rest, `block ${block}`];
  const named = axes(name);
  const cell = (index ?? []).map((i, at) => (named[at] === "text" ? null : part(name, named[at] ?? "index", i)));
  return [...head, ...cell.filter(Boolean)].join(" · ");
}

/** #grad:NAME/0,2,5: the permanent link of a tensor, or of a number. */
export function link(name, index = null, gradient = false) {
  return `#${gradient ? "grad:" : ""}${name}${index ? `/${index.join(",")}` : name === "loss" ? "/" : ""}`;
}

/** Make an element: el("a", {href, class, onclick}, child, "text", …); text is always text. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(made.dataset, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** A formula's MathML, as one line for each of its equations, so that long ones break between them. */
export function formula(mathml) {
  const box = trusted(el("div", { class: "formula" }), mathml);
  const math = box.querySelector("math");
  const row = math?.querySelector(":scope > mrow");
  if (!row) return box;
  const lines = [[]];
  for (const part of [...row.childNodes]) {
    if (part.nodeName === "mspace" && parseFloat(part.getAttribute("width")) >= 1) lines.push([]);
    else lines[lines.length - 1].push(part);
  }
  const equations = lines.filter((line) => line.length).map((line) => {
    const made = math.cloneNode(false);
    const inner = row.cloneNode(false);
    if (/^[,;]$/.test(line[line.length - 1].textContent)) line.pop();
    inner.append(...line);
    made.append(inner);
    return made;
  });
  box.replaceChildren(...equations);
  return box;
}

/** Draw part of the page again, and leave the focus on the control that has it, found by its data-keep. */
export function keepingFocus(element, draw) {
  const keep = element.contains(document.activeElement) ? document.activeElement.dataset.keep : undefined;
  draw();
  if (keep) element.querySelector(`[data-keep="${CSS.escape(keep)}"]`)?.focus({ preventScroll: true });
}

/** Set an element's content to HTML that Python made of this project's own sources and formulas, and of nothing else. */
export function trusted(element, html) {
  element.innerHTML = html;
  return element;
}

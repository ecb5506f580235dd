/** The page's frame: its routes, header, tokens, keyboard and theme; the three views draw into it. */

import { store } from "explore/store.js";
import * as map from "explore/map.js";
import * as tensor from "explore/tensor.js";
import * as inspector from "explore/number.js";
import { dark, sequential } from "explore/heat.js";
import { count, decimal, el, label, link, number, percent, piece, quoted, shapeText } from "explore/text.js";

/** What is kept from one view to the next. goal: where to scroll; lr: AdamW's learning rate, at first the book's. */
export const ui = { token: null, head: 0, show: null, listing: "plain", open: 0, colour: "values", goal: null, lr: 4e-4 };

const $ = (id) => document.getElementById(id);
let shown = null;
let following = "";

/** Go to a tensor (index null) or a number; "map" goes to the map. */
export function go(name, index = null, gradient = false) {
  location.hash = name === "map" ? "#map" : link(name, index, gradient);
}

/** location.hash as {view, name, index, gradient, step, head}. */
export function parse(hash) {
  let text = hash.replace(/^#/, "");
  try {
    text = decodeURIComponent(text);
  } catch { /* a stray % is part of no name, and found below */ }
  const onMap = /^(?:map(?:\/(\d+))?)?$/.exec(text);
  if (onMap) return { view: "map", step: onMap[1] === undefined ? null : Number(onMap[1]), name: null, index: null, gradient: false };
  const found = /^(grad:)?([^/?]+)(?:\?head=(\d+))?(?:\/([-\d,]*))?$/.exec(text);
  if (!found) return { view: "unknown", text };
  const [, grad, name, head, numbers] = found;
  const index = numbers === undefined ? null : numbers === "" ? [] : numbers.split(",").map((i) => (/^\d+$/.test(i) ? Number(i) : NaN));
  return check({ view: "tensor", name, index, gradient: Boolean(grad), head: head === undefined ? null : Number(head), text });
}

/** The same, or an "unknown" route with the reason. */
function check(route) {
  const { values, params } = store.summary.arrays;
  const shape = route.name === "loss" ? [] : (values[route.name] ?? params[route.name])?.shape;
  if (!shape) return { view: "unknown", text: route.text, why: `This pass has no tensor ${quoted(route.name)}.` };
  if (route.index && (route.index.length !== shape.length || route.index.some((i, at) => !(i >= 0 && i < shape[at])))) {
    return { view: "unknown", text: route.text, why: `${route.name} has shape ${shapeText(shape)}: there is no ${quoted(route.text.slice(route.text.lastIndexOf("/") + 1))} in it.` };
  }
  return route;
}

export const route = () => parse(location.hash);

/** Say something to a screen reader. */
export function announce(text) {
  $("status").textContent = text;
}

// The header

function header() {
  const s = store.summary;
  const facts = ["", `${s.config.n_layers} blocks of ${s.config.n_heads} heads`, `${s.config.emb_dim} features`, s.dtype];
  const checkpoint = s.checkpoint.split(/[\\/]/).filter(Boolean).slice(-2).join("/");
  const loss = el("a", { href: "#loss/", class: "loss", title: "The loss: mean over the tokens" }, "loss ", el("b", { class: "num" }, decimal(s.loss, 5)), " nats");
  $("header").replaceChildren(
    el("a", { href: "#map", class: "brand", title: "The map (m)" }, "numpy-gpt ", el("b", {}, "explore")),
    el("p", { class: "model" }, el("span", { class: "checkpoint", title: s.checkpoint }, piece(checkpoint)), el("span", { class: "quiet", title: facts.slice(1).join(", ") }, `${count(s.parameters)} parameters`, el("span", { class: "facts" }, facts.join(" · "))), loss),
    textForm(),
    el("button", { type: "button", class: "icon", title: "Light or dark (t)", "aria-label": "Light or dark", onclick: toggleTheme }, "◐"),
    el("button", { type: "button", class: "icon", title: "Keys (?)", "aria-label": "List of keys", onclick: help }, "?"));
}

/** The text, which Enter runs on the served page. */
function textForm() {
  const s = store.summary;
  if (!store.served) return el("p", { class: "text-shown", title: "In a file the text cannot be changed: numpy-gpt explore CHECKPOINT TEXT" }, piece(s.text));
  const input = el("textarea", { id: "text", rows: "1", spellcheck: "false", autocomplete: "off", "aria-label": "Text: Enter runs the model on it", title: "Change the text; Enter runs it (/)" });
  input.value = s.text;
  const after = el("input", { id: "following", type: "text", spellcheck: "false", autocomplete: "off", placeholder: "what follows", "aria-label": "What follows the text: its first token is the last target", title: "What follows the text: its first token is the last target. Left empty, the text's own last token is only a target" });
  after.value = following;
  const error = el("p", { class: "error", role: "alert", hidden: true });
  const form = el("form", { class: "text-form", onsubmit: (event) => {
    event.preventDefault();
    run(input, after, error);
  } }, input, after, error);
  form.addEventListener("input", () => { error.hidden = true; });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
    if (event.key !== "Escape") return;
    event.stopPropagation();
    input.value = store.summary.text;
    after.value = following;
    error.hidden = true;
    $("view").focus();
  });
  return form;
}

async function run(input, after, error) {
  if (input.readOnly) return;
  input.readOnly = true;
  input.classList.add("busy");
  const before = following;
  try {
    following = after.value;
    await store.run(input.value, following || null);
    $("view").focus(); // so that the next key is a shortcut
  } catch (problem) {
    following = before;
    error.textContent = problem.message;
    error.hidden = false;
  } finally {
    input.readOnly = false;
    input.classList.remove("busy");
  }
}

// The tokens

function tokens() {
  const s = store.summary;
  const most = Math.max(...s.tokenLosses, 1e-9);
  const scale = sequential(most * 1.6);
  const list = el("div", { class: "strip", role: "listbox", "aria-label": "Tokens; under each, what the model expected next and the loss of the true next one", tabindex: "0" },
    s.pieces.map((text, t) => tokenBox(text, t, scale)));
  list.addEventListener("keydown", (event) => {
    const to = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    choose(Math.max(0, Math.min(s.pieces.length - 1, (ui.token ?? (to > 0 ? -1 : s.pieces.length)) + to)));
  });
  const key = el("div", { class: "strip-key quiet", "aria-hidden": "true" }, el("span", {}, "position"), el("span", {}, "token"), el("span", {}, "expects next, %"), el("span", {}, "true next"), el("span", {}, "its loss"));
  const fade = () => {
    list.classList.toggle("before", list.scrollLeft > 1);
    list.classList.toggle("after", list.scrollLeft + list.clientWidth < list.scrollWidth - 1);
  };
  list.addEventListener("scroll", fade);
  new ResizeObserver(fade).observe(list);
  $("tokens").replaceChildren(el("div", { class: "strip-row" }, key, list), el("div", { id: "about-token" }));
  aboutToken();
}

function tokenBox(text, t, scale) {
  const s = store.summary;
  const [best] = s.predictions[t];
  const right = best.id === s.targets[0][t];
  const loss = el("span", { class: "num token-loss" }, decimal(s.tokenLosses[t], 2));
  if (s.tokenLosses[t] !== null) loss.style.backgroundColor = scale.css(s.tokenLosses[t]);
  const means = `token ${t} ${quoted(text)}: expects ${quoted(best.piece)}, ${percent(best.p)}; true next ${quoted(s.targetPieces[t])}, loss ${decimal(s.tokenLosses[t], 3)}`;
  return el("div", { class: "token", id: `token-${t}`, role: "option", "aria-selected": "false", "aria-label": means, title: means, onclick: () => choose(ui.token === t ? null : t) },
    el("span", { class: "token-at num" }, String(t)),
    el("bdi", { class: "token-piece" }, piece(text)),
    el("span", { class: right ? "token-next right" : "token-next" }, el("bdi", {}, piece(best.piece)), el("span", { class: "num quiet" }, best.p === null ? " nan" : ` ${Math.round(best.p * 100)}`)),
    el("bdi", { class: "token-target" }, piece(s.targetPieces[t])),
    loss);
}

/** Choose a token: the views mark it, and a line under the strip says what is known of it. */
export function choose(t) {
  ui.token = t;
  aboutToken();
  tensor.tokenChosen();
  map.tokenChosen();
}

function aboutToken() {
  const s = store.summary;
  document.querySelectorAll(".token").forEach((box, t) => box.setAttribute("aria-selected", String(t === ui.token)));
  const strip = document.querySelector(".strip");
  if (ui.token === null) strip.removeAttribute("aria-activedescendant");
  else strip.setAttribute("aria-activedescendant", `token-${ui.token}`);
  $(`token-${ui.token}`)?.scrollIntoView({ block: "nearest", inline: "nearest" });
  const t = ui.token;
  if (t === null) return $("about-token").replaceChildren(el("p", { class: "about" }, "Choose a token (click, or ", el("kbd", {}, ","), " ", el("kbd", {}, "."), "): its row in the table, what the model expects after it, and its place in the views below."));
  const id = s.tokens[0][t];
  const same = s.tokens[0].flatMap((other, at) => (other === id && at !== t ? [at] : []));
  const row = (gradient) => link("tok_emb.weight", [id, 0], gradient);
  const expects = s.predictions[t].slice(0, 5).map((next) => el("span", { class: next.id === s.targets[0][t] ? "chip true" : "chip" },
    el("a", { href: link("logits", [0, t, next.id]), title: `Logit of id ${next.id}` }, el("bdi", {}, piece(next.piece))), el("span", { class: "num quiet" }, ` ${percent(next.p)}`)));
  $("about-token").replaceChildren(el("p", { class: "about" },
    el("b", {}, `token ${t} `, el("bdi", {}, quoted(s.pieces[t]))), ` id ${id}`,
    same.length ? `, also at ${same.slice(0, 4).join(", ")}${same.length > 4 ? " …" : ""}` : ", occurs once", " · its row of ",
    el("a", { href: row(false) }, "tok_emb.weight"),
    " and ", el("a", { href: row(true), title: "Where the gradients of all its occurrences add up" }, same.length ? `the gradient, where all ${same.length + 1} add up` : "its gradient"),
    " · expects ", ...expects));
}

// Theme

function toggleTheme() {
  const next = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("numpy-gpt-theme", next);
  } catch { /* a file may be without storage */ }
  redraw();
}

function storedTheme() {
  try {
    const theme = localStorage.getItem("numpy-gpt-theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch { /* as above */ }
}

// Keys

const KEYS = [
  ["m", "the map"], ["← →", "on the map: step through the pass, forward and then backward"], ["Home  End", "on the map: first and last step"],
  ["Enter", "open the tensor that the step makes; in a heat map, the number under the cursor"],
  ["Esc", "back out: number, tensor, map"], ["c", "on the map: colour by activations or gradients"],
  ["v  g  b  u", "on a tensor: value, gradient, both, AdamW's update (of a parameter)"],
  ["[  ]", "previous and next tensor in order of computation"], ["0 … 9  h  H", "choose a head; the next, the one before"],
  ["arrows", "in a heat map: move the cursor (with Shift by 8); in the tokens: choose one"],
  [",  .", "previous and next token"],
  ["s", "source of plain.py or of ops/"], ["/", "change the text"], ["t", "light or dark"], ["Tab", "next control"], ["?", "this list"],
];

function help() {
  const dialog = $("help");
  dialog.replaceChildren(
    el("h2", { id: "help-title" }, "Keys"),
    el("dl", { class: "keys" }, [...KEYS, ...inspector.KEYS].map(([keys, does]) => [el("dt", {}, keys.split("  ").map((key) => el("kbd", {}, key))), el("dd", {}, does)])),
    el("p", { class: "quiet" }, "Every view has a link of its own in the address bar. Orange is above zero, blue below, and hatched cells are the future, which a token may not see. ", el("i", {}, "d"), " before a name is the gradient of the loss with respect to it; ", el("b", {}, "eps"), ` is the spacing of ${store.summary.dtype} numbers just above 1: ${number(store.summary.eps, 3)}.`),
    el("form", { method: "dialog" }, el("button", { class: "plain" }, "Close")));
  dialog.showModal();
}

const typing = (target) => target.isContentEditable || /^(TEXTAREA|SELECT)$/.test(target.tagName) || (target.tagName === "INPUT" && !/^(checkbox|radio|button)$/.test(target.type));

function key(event) {
  if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (typing(event.target)) {
    if (event.key === "Escape") $("view").focus();
    return;
  }
  const now = route();
  const general = {
    "?": help, t: toggleTheme, m: () => go("map"), Escape: () => up(now),
    "/": () => { $("text")?.focus(); $("text")?.select(); },
    ".": () => choose(Math.min(store.summary.pieces.length - 1, (ui.token ?? -1) + 1)),
    ",": () => choose(Math.max(0, (ui.token ?? store.summary.pieces.length) - 1)),
  };
  const inNumber = event.target.closest?.("#number");
  const handled = general[event.key] ? (general[event.key](), true) : inNumber ? false : (now.view === "map" ? map : tensor).key(event, now);
  if (handled) event.preventDefault();
}

/** Escape: from a number to its tensor, from there to the map. */
function up(now) {
  if (now.index && now.name !== "loss") return go(now.name, null, now.gradient);
  if (now.view !== "map") return map.back();
  if (now.step !== null) go("map");
}

// Drawing

/** Draw what the address says. */
async function draw() {
  const now = route();
  const page = document.body;
  page.dataset.view = now.view;
  const kept = shown && shown.view === now.view && shown.name === now.name;
  shown = now;
  if (now.view !== "tensor") tensor.forget(); // what is still being drawn must not appear
  document.title = title(now);
  if (!kept) $("view").scrollTop = 0;
  $("number").hidden = now.view !== "tensor";
  if (now.view === "unknown") return unknown(now);
  try {
    if (now.view === "map") return await map.render($("view"), now);
    const answer = now.index ? inspector.render($("number"), now) : tensor.hint($("number"), now); // first in line
    await Promise.all([answer, tensor.render($("view"), now)]);
    if (shown === now && now.index) announce(label(now.name, now.index));
  } catch (problem) {
    if (shown !== now) return; // of a view that was left
    console.error(problem);
    $("view").replaceChildren(el("div", { class: "pad" }, el("h1", {}, "This cannot be shown"), el("p", { class: "error" }, problem.message)));
  }
}

const title = (now) => (now.name ? `${now.gradient ? "gradient of " : ""}${label(now.name, now.index)}` : "numpy-gpt explore");

function unknown(now) {
  $("view").replaceChildren(el("div", { class: "pad" }, el("h1", {}, "Not here"), el("p", {}, now.why ?? `The address ${quoted(now.text)} is not one of this page's.`), el("p", {}, el("a", { href: "#map" }, "The map"), " shows all tensors.")));
}

function redraw() {
  tensor.forget();
  map.forget();
  tokens();
  draw();
}

function start() {
  header();
  redraw();
}

async function main() {
  storedTheme();
  try {
    await store.open();
  } catch (problem) {
    $("view").replaceChildren(el("p", { class: "pad error" }, `The pass could not be read: ${problem.message}`));
    return;
  }
  start();
  store.on("run", () => {
    ui.token = null;
    const now = route();
    if (now.view === "unknown") history.replaceState(null, "", `#${now.text.replace(/\/.*$/, "")}`); // the number is not in this text
    start();
    announce("The pass was run again.");
  });
  addEventListener("hashchange", draw);
  addEventListener("keydown", key);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    $("view").focus();
  });
  let resized = 0;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(() => { tensor.forget(); draw(); }, 120);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.addEventListener("click", (event) => {
    // a click on a link to the current view draws it again
    const href = event.target.closest?.("a[href^='#']")?.getAttribute("href");
    if (href && href === location.hash) draw();
  });
}

main();

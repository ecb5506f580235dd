/** What a tensor's page has below its heat map: where a gradient comes from, the logit lens, AdamW's step. */

import { store } from "explore/store.js";
import { choose, ui } from "explore/main.js";
import { changeOf, decimal, el, isParameter, isPattern, likelihood, link, number, ONLY_SERVED, percent, pieceAt, pieceOf, quoted, split, targetAt, tokenOf } from "explore/text.js";

/** The sections that a kind of tensor has of its own. onToken gets what follows the chosen token. */
export async function special(route, onToken) {
  const { rest } = split(route.name);
  if (isPattern(route.name)) return []; // where the head looks stands beside, see tensor.js
  if (/^att\.[qkv]$/.test(rest)) return pulls(route, onToken);
  if (store.summary.lens.some((each) => each.name === route.name)) return lens(route, onToken);
  if (route.name === "logits") return expects(onToken);
  if (isParameter(route.name)) return [...(["tok_emb.weight", "out_head.weight"].includes(route.name) ? [rowsOfText(route)] : []), adamw()];
  return [];
}

/** A section that follows the chosen token. */
function followed(className, onToken, first, draw) {
  const box = el("section", { class: className });
  const show = (t) => box.replaceChildren(...draw(t));
  onToken.push(show);
  show(first);
  return box;
}

export const bar = (share, className = "") => {
  const made = el("span", { class: `share ${className}`, "aria-hidden": "true" });
  made.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span", { class: "share-box" }, made);
};

/** The tokens that one query attends to, the largest weight first. */
export async function looksAt(route, head, onToken) {
  const { block } = split(route.name);
  const name = `trf_blocks.${block}.att.probs`;
  const T = store.summary.pieces.length;
  const probs = (await store.slice("values", name, [0, head, null, null])).data;
  const [dp, ds] = await Promise.all([name, `trf_blocks.${block}.att.scores`].map(async (each) => (await store.slice("grads", each, [0, head, null, null])).data));
  return followed("looks", onToken, ui.token ?? tokenOf(route.name, route.index ?? []) ?? T - 1, (t) => {
    const keys = Array.from({ length: t + 1 }, (_, s) => s).sort((a, b) => probs[t * T + b] - probs[t * T + a]).slice(0, 6);
    const goal = [", to predict ", el("b", {}, el("bdi", {}, quoted(targetAt(t))))];
    return [
      el("h2", {}, `Where head ${head} looks`),
      el("p", {}, "From token ", el("b", {}, `${t} `, el("bdi", {}, quoted(pieceAt(t)))), goal, ", it looks most at:"),
      el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "token"), el("th", {}, "p"), el("th"), el("th", {}, "d probs"), el("th", {}, "d scores"))),
        el("tbody", {}, keys.map((s) => el("tr", {}, el("th", { scope: "row" }, `${s} `, el("bdi", {}, quoted(pieceAt(s)))),
          el("td", { class: "num" }, el("a", { href: link(name, [0, head, t, s]) }, number(probs[t * T + s], 3))), el("td", { class: "wide-cell" }, bar(probs[t * T + s])),
          el("td", { class: "num" }, el("a", { href: link(name, [0, head, t, s], true) }, number(dp[t * T + s], 3))), el("td", { class: "num" }, el("a", { href: link(name.replace("probs", "scores"), [0, head, t, s], true) }, number(ds[t * T + s], 3))))))),
      t === 0 ? el("p", { class: "quiet note" }, "The first token sees itself only: p is 1 whatever its score, so that score's gradient is 0.")
        : el("p", { class: "quiet note" }, "d scores = p · (d probs − Σ p · d probs over the row): where p is 0 it is 0, and a row's add up to 0.")];
  });
}

/** Where the gradient of a token's key (or query, or value) comes from: its parts by the token they come through. */
async function pulls(route, onToken) {
  const { block, rest } = split(route.name);
  const which = rest.slice(-1);
  const prefix = `trf_blocks.${block}.att.`;
  const { n_heads: NH, emb_dim: C } = store.summary.config;
  const [T, HS] = [store.summary.pieces.length, C / NH];
  if (T * T * NH > 4e6) return [];
  const heads = [...Array(NH).keys()];
  const weights = await Promise.all(heads.map(async (h) => (await store.slice(which === "v" ? "values" : "grads", `${prefix}${which === "v" ? "probs" : "scores"}`, [0, h, null, null])).data));
  const mask = which === "v" && store.summary.arrays.masks?.[`${prefix}probs`] ? await Promise.all(heads.map(async (h) => (await store.slice("masks", `${prefix}probs`, [0, h, null, null])).data)) : null;
  const other = which === "v" ? await store.array("grads", `${prefix}heads`) : await store.array("values", `${prefix}${which === "k" ? "q" : "k"}`);
  const offset = (h, t) => (which === "v" ? t * C + h * HS : (h * T + t) * HS);
  const scale = which === "v" ? 1 : 1 / Math.sqrt(HS);
  const noun = { q: "query", k: "key", v: "value" }[which];
  const last = block === store.summary.config.n_layers - 1;
  return followed("pulls broad", onToken, ui.token ?? tokenOf(route.name, route.index ?? []) ?? Math.min(3, T - 1), (token) => {
    const partners = which === "q" ? [...Array(token + 1).keys()] : [...Array(T - token).keys()].map((i) => i + token);
    const weight = (h, x) => {
      const at = which === "q" ? token * T + x : x * T + token;
      return weights[h][at] * (mask ? mask[h][at] : 1) * scale;
    };
    const whole = heads.map((h) => Float64Array.from({ length: HS }, (_, d) => partners.reduce((sum, x) => sum + weight(h, x) * other.data[offset(h, x) + d], 0)));
    const square = whole.reduce((sum, part) => sum + part.reduce((of, x) => of + x * x, 0), 0);
    const share = (h, x) => (square ? (weight(h, x) * whole[h].reduce((sum, g, d) => sum + g * other.data[offset(h, x) + d], 0)) / square : 0);
    const rows = partners.map((x) => ({ x, by: heads.map((h) => share(h, x)) })).map((row) => ({ ...row, all: row.by.reduce((a, b) => a + b, 0) })).sort((a, b) => Math.abs(b.all) - Math.abs(a.all));
    const rest = rows.splice(FIRST);
    const most = Math.abs(rows[0]?.all) || 1;
    const cell = (row, h) => {
      const [q, k] = which === "q" ? [token, row.x] : [row.x, token];
      return el("td", { class: "num" }, el("a", { href: link(which === "v" ? `${prefix}probs` : `${prefix}scores`, [0, h, q, k], which !== "v"), title: which === "v" ? "The attention weight it is multiplied by" : "The gradient of the score" }, signed(row.by[h])));
    };
    return [
      el("h2", {}, `Where the ${noun}’s gradient of token ${token} `, el("bdi", {}, quoted(pieceAt(token))), " comes from"),
      el("p", { class: "quiet" }, which === "q" ? "It is a sum over the keys that the token looked at. " : ["It is a sum over the tokens that looked at this one, each of which predicts its own target. ", last ? "This is the last block: each part comes from that one target alone. " : "Each part also carries the losses of later tokens, through the blocks above. "],
        "A part’s share is its component along the whole gradient, divided by the whole’s length: the shares add up to 1, and a negative one pulls the other way."),
      el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, which === "q" ? "key" : "looked from"), which === "q" ? null : el("th", {}, "target"), el("th", {}, "share"), el("th"), NH <= 8 ? heads.map((h) => el("th", {}, `head ${h}`)) : null)),
        el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, `${row.x} `, el("bdi", {}, quoted(pieceAt(row.x)))), which === "q" ? null : el("td", {}, el("bdi", {}, quoted(targetAt(row.x)))),
          el("td", { class: "num" }, el("b", {}, signed(row.all))), el("td", { class: "wide-cell" }, bar(Math.abs(row.all) / most, row.all < 0 ? "negative" : "")), NH <= 8 ? heads.map((h) => cell(row, h)) : null)),
        rest.length ? el("tr", { class: "quiet" }, el("th", { scope: "row", colspan: which === "q" ? 1 : 2 }, `${rest.length} others`), el("td", { class: "num" }, signed(rest.reduce((sum, row) => sum + row.all, 0)))) : null))];
  });
}

const FIRST = 8; // rows of a table
const signed = (share) => (Number.isFinite(share) ? `${(share * 100).toFixed(1).replace("-", "−")} %` : "nan");

/** What the model would say if it stopped here, for each token. */
function lens(route, onToken) {
  const here = store.summary.lens.find((each) => each.name === route.name);
  const box = el("section", { class: "lens-tensor" });
  const { targets } = store.summary;
  const rows = here.top.map((top, t) => el("tr", { dataset: { t } },
    el("th", { scope: "row" }, el("button", { type: "button", class: "link", onclick: () => choose(t) }, `${t} `, el("bdi", {}, quoted(pieceAt(t))))),
    top.map((next) => el("td", { class: next.id === targets[0][t] ? "right" : null }, el("bdi", {}, quoted(next.piece)), " ", el("span", { class: "num quiet" }, percent(next.p)))),
    el("td", {}, el("bdi", {}, quoted(targetAt(t)))), el("td", { class: "num" }, percent(here.targetP[t]))));
  box.append(el("h2", {}, "What would the model say if it stopped here?"),
    el("p", { class: "quiet" }, "The final norm and the head applied to this stream (the logit lens)", here === store.summary.lens.at(-1) ? ": of the last stream it is what the model says. " : `: mean loss ${decimal(here.loss, 4)} instead of ${decimal(store.summary.loss, 4)}. `, "The true next token is marked."),
    el("div", { class: "tall" }, el("table", { class: "lens" }, el("thead", {}, el("tr", {}, el("th", {}, "after"), el("th", {}, "first"), el("th", {}, "second"), el("th", {}, "third"), el("th", {}, "true next"), el("th", {}, "p(true)"))), el("tbody", {}, rows))));
  onToken.push((t) => rows.forEach((row, at) => row.classList.toggle("chosen", at === t)));
  return box;
}

/** The likeliest next tokens, whose logits are of interest among 50,257. */
function expects(onToken) {
  const { predictions, targets } = store.summary;
  return followed("expects", onToken, ui.token ?? store.summary.pieces.length - 1, (t) => [
    el("h2", {}, "What it expects after token ", `${t} `, el("bdi", {}, quoted(pieceAt(t)))),
    el("table", {}, el("tbody", {}, predictions[t].map((next) => el("tr", { class: next.id === targets[0][t] ? "right" : null },
      el("th", { scope: "row" }, el("bdi", {}, quoted(next.piece))), el("td", { class: "num" }, el("a", { href: link("logits", [0, t, next.id]) }, `id ${next.id}`)), el("td", { class: "num" }, percent(next.p)), el("td", { class: "wide-cell" }, bar(next.p)))))),
    el("p", {}, "The true next is ", el("a", { href: link("logits", [0, t, targets[0][t]], true) }, el("bdi", {}, quoted(targetAt(t)))), ".")]);
}

const HEAD_ROWS = "As a row of the output layer, every row gets a gradient from every position: final_norm there, times the token's probability (less 1 where it is the target), divided by the number of positions.";

/** The rows of a vocabulary table that this text touches, those of repeated tokens first. */
function rowsOfText(route) {
  const ids = store.summary.tokens[0];
  const seen = new Map();
  ids.forEach((id, t) => seen.set(id, [...(seen.get(id) ?? []), t]));
  const rows = [...seen].sort((a, b) => b[1].length - a[1].length).slice(0, 40);
  const embedding = route.name === "tok_emb.weight";
  const tied = store.summary.config.tie_weights;
  return el("section", { class: "rows-of-text" }, el("h2", {}, "Rows of this text's tokens"),
    el("p", { class: "quiet" }, embedding ? `A token that occurs again reads the same row, so its gradients add up there. ${tied ? HEAD_ROWS : "A row whose token does not occur has gradient 0."}` : HEAD_ROWS),
    el("p", { class: "chips" }, rows.map(([id, at]) => el("a", { class: at.length > 1 ? "chip repeated" : "chip", href: link(route.name, [id, 0], true), title: `id ${id}, at ${at.join(", ")}` }, el("bdi", {}, quoted(pieceOf(id) ?? pieceAt(at[0]))), at.length > 1 ? el("b", { class: "num" }, ` ×${at.length}`) : null))));
}

/** One step of AdamW on this text, and what becomes of the probabilities. */
function adamw() {
  const box = el("section", { class: "adamw" }, el("h2", {}, "What would AdamW do with it?"));
  const rate = el("input", { type: "text", inputmode: "decimal", value: String(ui.lr), size: "7", "aria-label": "learning rate" });
  const outcome = el("div", { "aria-live": "polite" });
  const button = el("button", { class: "plain" }, "Take one step");
  const form = el("form", { class: "inline", onsubmit: async (event) => {
    event.preventDefault();
    const chosen = Number(rate.value);
    if (!(chosen > 0)) return outcome.replaceChildren(el("p", { class: "error" }, "The learning rate is a number above 0."));
    ui.lr = chosen;
    button.disabled = true;
    try {
      outcome.replaceChildren(updateTable(await store.updated(chosen)));
      box.classList.add("broad");
    } catch (problem) {
      outcome.replaceChildren(el("p", { class: "error" }, problem.message));
    } finally {
      button.disabled = false;
    }
  } }, el("label", {}, "lr ", rate), button);
  box.append(el("p", { class: "quiet" }, "On the first step m̂ is the gradient and √v̂ its size, so each number moves by about lr against its gradient's sign, and weight decay 0.1 pulls it to 0: ", el("b", {}, "Update"), " above shows it. Taken for all parameters at once, on a copy:"),
    store.served ? form : el("p", {}, ONLY_SERVED), outcome);
  return box;
}

function updateTable(after) {
  const { predictions, tokenLosses } = store.summary;
  return el("div", {}, el("p", {}, "Loss ", el("b", { class: "num" }, decimal(after.base, 6)), " → ", el("b", { class: "num" }, decimal(after.loss, 6)), ` (${changeOf(after.base, after.loss, 3)})`),
    el("div", { class: "tall" }, el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, "after"), el("th", {}, "expected"), el("th", {}, "now expects"), el("th", {}, "true next"), el("th", {}, "p(true)"), el("th", {}, "then"))),
      el("tbody", {}, predictions.map((top, t) => {
        const [before, then] = [tokenLosses, after.tokenLosses].map((losses) => likelihood(losses[t]));
        return el("tr", {}, el("th", { scope: "row" }, `${t} `, el("bdi", {}, quoted(pieceAt(t)))),
          el("td", {}, el("bdi", {}, quoted(top[0].piece)), " ", el("span", { class: "num quiet" }, percent(top[0].p))),
          el("td", {}, el("bdi", {}, quoted(after.predictions[t][0].piece)), " ", el("span", { class: "num quiet" }, percent(after.predictions[t][0].p))),
          el("td", {}, el("bdi", {}, quoted(targetAt(t)))), el("td", { class: "num" }, percent(before)), el("td", { class: "num" }, el("b", {}, percent(then)), then > before ? " ↑" : then < before ? " ↓" : ""));
      })))));
}

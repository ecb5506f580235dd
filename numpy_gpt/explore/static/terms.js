// The terms of a number: the rules of numpy_gpt/explain/terms.py over the arrays of the store, in double precision.
// A rule fetches the slices that it needs, all at once, and returns terms; nothing here knows of the page.

/** A number with its name, as a factor of a term. */
const named = (number, name, index, gradient = false) => ({ number, input: { name, index, gradient } });

/** A factor that is not an input's own number, and what it is. */
const by = (constant, means) => ({ constant, means });

/** The product of named numbers and, after them, of constants. */
function term(...parts) {
  const inputs = [];
  const factors = [];
  const means = [];
  for (const { number, input, constant, means: said } of parts) {
    if (input) inputs.push(input);
    factors.push(input ? number : constant);
    means.push(input ? null : said);
  }
  return made(factors, inputs, means);
}

/** A term of its factors, its inputs, and what each factor is: null for the number that the input in its place names. */
function made(factors, inputs = [], means = factors.map(() => null)) {
  let value = 1;
  for (const factor of factors) value *= factor;
  return { value, factors, inputs, means };
}

const TWO_NUMBERS = [null, null];

const range = (n) => Array.from({ length: n }, (_, i) => i);
const together = (...promises) => Promise.all(promises);

/** The arrays of a pass, by name; which group holds a name follows from the summary. */
class Pass {
  constructor(store) {
    this.store = store;
    this.summary = store.summary;
    this.config = store.summary.config;
    this.tokens = store.summary.tokens;
    this.targets = store.summary.targets;
    this.B = this.tokens.length;
    this.T = this.tokens[0].length;
    this.C = this.config.emb_dim;
    this.HS = this.C / this.config.n_heads;
  }

  isParameter(name) {
    return name in this.summary.arrays.params;
  }

  shape(name) {
    return name === "loss" ? [] : this.store.shape(this.isParameter(name) ? "params" : "values", name);
  }

  /** The numbers of a slice, `at` as store.slice takes it: null for a complete axis. */
  async row(name, at, gradient = false) {
    const group = gradient ? "grads" : this.isParameter(name) ? "params" : "values";
    return (await this.store.slice(group, name, at)).data;
  }

  async number(name, index, gradient = false) {
    if (name === "loss") return gradient ? 1 : this.summary.loss;
    return (await this.row(name, index, gradient))[0];
  }

  /** A number with its name. */
  async at(name, index, gradient = false) {
    return named(await this.number(name, index, gradient), name, index, gradient);
  }

  async cache(name, at) {
    return (await this.store.slice("caches", name, at)).data;
  }

  /** Dropout's factors in a slice, as a function of the position in it; 1 without dropout. */
  async mask(name, at) {
    if (!(name in (this.summary.arrays.masks ?? {}))) return () => by(1, null);
    const { data } = await this.store.slice("masks", name, at);
    return (i) => by(data[i], "dropout");
  }

  /** All (b, t). */
  positions() {
    return range(this.B).flatMap((b) => range(this.T).map((t) => [b, t]));
  }
}

// Queries, keys and values are (B, NH, T, HS); to a linear they are (B, T, O), the heads side by side.

const inHeads = (name) => name.endsWith(".att.q") || name.endsWith(".att.k") || name.endsWith(".att.v");

/** (b, h, t, d) of heads as [b, t, o]. */
function flat(pass, name, index) {
  if (!inHeads(name)) return index;
  const [b, h, t, d] = index;
  return [b, t, h * pass.HS + d];
}

/** The inverse of flat; t may be null, for all of them. */
function split(pass, name, b, t, o) {
  return inHeads(name) ? [b, Math.floor(o / pass.HS), t, o % pass.HS] : [b, t, o];
}

/** The gradient's row (O,) of an output at (b, t), over all features and heads. */
async function outputGradients(pass, name, b, t) {
  return pass.row(name, inHeads(name) ? [b, null, t, null] : [b, t, null], true);
}

/** For each b the slice that `at` makes of it. */
const eachText = (pass, slice) => Promise.all(range(pass.B).map(slice));

const RULES = {
  // y = table[tokens]
  embedding: {
    async value(pass, op, [b, t, c]) {
      const token = pass.tokens[b][t];
      const weight = await pass.at(op.parameters[0], [token, c]);
      return [made([weight.number], [weight.input, { name: "tokens", index: [b, t], gradient: false }])];
    },
    async parameter(pass, op, [token, c]) {
      const found = pass.positions().filter(([b, t]) => pass.tokens[b][t] === token);
      const dys = await Promise.all(found.map(([b, t]) => pass.at(op.output, [b, t, c], true)));
      return dys.map((dy) => term(dy));
    },
  },

  // y = table[:T]
  position: {
    async value(pass, op, index) {
      return [term(await pass.at(op.parameters[0], index))];
    },
    async parameter(pass, op, index) {
      return index[0] < pass.T ? [term(await pass.at(op.output, index, true))] : [];
    },
  },

  // emb = dropout(tok_emb + pos_emb)
  sum: {
    async value(pass, op, index) {
      const [token, position, mask] = await together(
        pass.at(op.inputs[0], index), pass.at(op.inputs[1], index.slice(1)), pass.mask(op.output, index));
      return [term(token, mask(0)), term(position, mask(0))];
    },
    async input(pass, op, index, i) {
      const all = i === 0 ? [index] : range(pass.B).map((b) => [b, ...index]);
      return Promise.all(all.map(async (at) => {
        const [dy, mask] = await together(pass.at(op.output, at, true), pass.mask(op.output, at));
        return term(dy, mask(0));
      }));
    },
  },

  // y = x: the stream, under the name that its next reader gives it
  same: {
    async value(pass, op, index) {
      return [term(await pass.at(op.inputs[0], index))];
    },
    async input(pass, op, index) {
      return [term(await pass.at(op.output, index, true))];
    },
  },

  // y = x̂ · scale + shift,  x̂ = (x − mean(x)) · rstd
  layernorm: {
    async value(pass, op, [b, t, c]) {
      const [x] = op.inputs;
      const [xs, scale, shift, [rstd]] = await together(
        pass.row(x, [b, t, null]), pass.at(op.parameters[0], [c]), pass.at(op.parameters[1], [c]),
        pass.cache(`${op.output}.rstd`, [b, t, 0]));
      const share = by(-rstd / pass.C, "−1/(C σ), the mean’s share");
      return [
        term(named(xs[c], x, [b, t, c]), scale, by(rstd, "1/σ")),
        ...range(pass.C).map((j) => term(named(xs[j], x, [b, t, j]), scale, share)),
        term(shift),
      ];
    },
    // dx = rstd · (g − mean(g) − x̂ · mean(g · x̂)),  g = dy · scale
    async input(pass, op, [b, t, c]) {
      const [dys, scales, xHat, [rstd]] = await together(
        pass.row(op.output, [b, t, null], true), pass.row(op.parameters[0], [null]),
        pass.cache(`${op.output}.x_hat`, [b, t, null]), pass.cache(`${op.output}.rstd`, [b, t, 0]));
      return range(pass.C).flatMap((j) => {
        const g = [named(dys[j], op.output, [b, t, j], true), named(scales[j], op.parameters[0], [j])];
        const along1 = term(...g, by(-rstd / pass.C, "−1/(C σ), along 1"));
        const alongXHat = term(...g, by((-rstd * xHat[c] * xHat[j]) / pass.C, "−x̂ x̂′/(C σ), along x̂"));
        return j === c ? [term(...g, by(rstd, "1/σ")), along1, alongXHat] : [along1, alongXHat];
      });
    },
    async parameter(pass, op, [c], which) {
      const texts = await eachText(pass, (b) => together(
        pass.row(op.output, [b, null, c], true), which === 0 ? pass.cache(`${op.output}.x_hat`, [b, null, c]) : null));
      return pass.positions().map(([b, t]) => {
        const dy = named(texts[b][0][t], op.output, [b, t, c], true);
        if (which === 1) return term(dy);
        const x = { name: op.inputs[0], index: [b, t, c], gradient: false };
        return made([dy.number, texts[b][1][t]], [dy.input, x], [null, "x̂ of"]); // dscale = Σ dy · x̂
      });
    },
  },

  // y = x @ wᵀ + b
  linear: {
    async value(pass, op, index) {
      const [b, t, o] = flat(pass, op.output, index);
      const [x] = op.inputs;
      const [w, bias] = op.parameters;
      const [xs, ws, shift] = await together(
        pass.row(x, [b, t, null]), pass.row(w, [o, null]), bias ? pass.at(bias, [o]) : null);
      const terms = range(ws.length).map((i) => term(named(xs[i], x, [b, t, i]), named(ws[i], w, [o, i])));
      if (shift) terms.push(term(shift));
      return terms;
    },
    async input(pass, op, [b, t, i]) {
      const [w] = op.parameters;
      const [dys, ws] = await together(outputGradients(pass, op.output, b, t), pass.row(w, [null, i]));
      const terms = [];
      for (let o = 0; o < ws.length; o++) { // plainly: the logits are 50,257
        const dy = { name: op.output, index: split(pass, op.output, b, t, o), gradient: true };
        terms.push(made([dys[o], ws[o]], [dy, { name: w, index: [o, i], gradient: false }], TWO_NUMBERS));
      }
      return terms;
    },
    async parameter(pass, op, [o, i], which) {
      const texts = await eachText(pass, (b) => together(
        pass.row(op.output, split(pass, op.output, b, null, o), true),
        which === 0 ? pass.row(op.inputs[0], [b, null, i]) : null));
      return pass.positions().map(([b, t]) => {
        const dy = named(texts[b][0][t], op.output, split(pass, op.output, b, t, o), true);
        return which === 0 ? term(dy, named(texts[b][1][t], op.inputs[0], [b, t, i])) : term(dy);
      });
    },
  },

  // s = q @ kᵀ / √HS; −inf in the future
  scores: {
    async value(pass, op, [b, h, t, s]) {
      if (s > t) return [made([-Infinity])];
      const [q, k] = op.inputs;
      const [qs, ks] = await together(pass.row(q, [b, h, t, null]), pass.row(k, [b, h, s, null]));
      const scale = by(pass.HS ** -0.5, "1/√HS");
      return range(pass.HS).map((d) => term(named(qs[d], q, [b, h, t, d]), named(ks[d], k, [b, h, s, d]), scale));
    },
    async input(pass, op, [b, h, row, d], which) {
      const ofQuery = which === 0;
      const other = op.inputs[1 - which];
      const [ds, others] = await together(
        pass.row(op.output, ofQuery ? [b, h, row, null] : [b, h, null, row], true),
        pass.row(other, [b, h, null, d]));
      const met = range(pass.T).filter((i) => (ofQuery ? i <= row : i >= row));
      const scale = by(pass.HS ** -0.5, "1/√HS");
      return met.map((i) => term(
        named(ds[i], op.output, ofQuery ? [b, h, row, i] : [b, h, i, row], true),
        named(others[i], other, [b, h, i, d]), scale));
    },
  },

  // p = softmax(s): exp(s − max) / Σ exp(s − max)
  softmax: {
    async value(pass, op, [b, h, t, s]) {
      const [scores] = op.inputs;
      const [score, [largest], [total]] = await together(pass.at(scores, [b, h, t, s]),
        pass.cache(`${op.output}.max`, [b, h, t, 0]), pass.cache(`${op.output}.total`, [b, h, t, 0]));
      const row = range(t + 1).filter((i) => i !== s); // the future is masked
      const others = row.map((i) => ({ name: scores, index: [b, h, t, i], gradient: false }));
      const p = made([Math.exp(score.number - largest) / total], [score.input, ...others], ["exp(s − log Σ exp) of"]);
      return [{ ...p, exponent: [score.number, largest + Math.log(total)] }];
    },
    // ds = p · (dp − Σ dp · p)
    async input(pass, op, [b, h, t, s]) {
      const [ps, dps] = await together(
        pass.row(op.output, [b, h, t, null]), pass.row(op.output, [b, h, t, null], true));
      if (ps[s] === 0) return [];
      const p = (i) => named(ps[i], op.output, [b, h, t, i]);
      const dp = (i) => named(dps[i], op.output, [b, h, t, i], true);
      const seen = range(pass.T).filter((i) => ps[i] !== 0);
      return [term(dp(s), p(s)), ...seen.map((i) => term(dp(i), p(s), p(i), by(-1, "−1")))];
    },
  },

  // heads = dropout(p) @ v, side by side
  mix: {
    async value(pass, op, [b, t, c]) {
      const [probs, v] = op.inputs;
      const [h, d] = [Math.floor(c / pass.HS), c % pass.HS];
      const [ps, vs, mask] = await together(
        pass.row(probs, [b, h, t, null]), pass.row(v, [b, h, null, d]), pass.mask(probs, [b, h, t, null]));
      return range(pass.T).filter((s) => ps[s] !== 0).map((s) =>
        term(named(ps[s], probs, [b, h, t, s]), named(vs[s], v, [b, h, s, d]), mask(s)));
    },
    async input(pass, op, index, which) {
      const [probs, v] = op.inputs;
      if (which === 0) {
        const [b, h, t, s] = index;
        const [dys, vs, mask] = await together(
          pass.row(op.output, [b, t, null], true), pass.row(v, [b, h, s, null]), pass.mask(probs, index));
        return range(pass.HS).map((d) => {
          const c = h * pass.HS + d;
          return term(named(dys[c], op.output, [b, t, c], true), named(vs[d], v, [b, h, s, d]), mask(0));
        });
      }
      const [b, h, s, d] = index;
      const c = h * pass.HS + d;
      const [dys, ps, mask] = await together(
        pass.row(op.output, [b, null, c], true), pass.row(probs, [b, h, null, s]), pass.mask(probs, [b, h, null, s]));
      return range(pass.T).filter((t) => ps[t] !== 0).map((t) =>
        term(named(dys[t], op.output, [b, t, c], true), named(ps[t], probs, [b, h, t, s]), mask(t)));
    },
  },

  // y = ½ x + ½ x tanh u
  gelu: {
    async value(pass, op, index) {
      const x = await pass.at(op.inputs[0], index);
      const u = Math.sqrt(2 / Math.PI) * (x.number + 0.044715 * x.number ** 3);
      const half = by(0.5, "½");
      return [term(x, half), term(x, half, by(Math.tanh(u), "tanh u"))];
    },
    async input(pass, op, index) {
      const [dy, [slope]] = await together(pass.at(op.output, index, true), pass.cache(`${op.output}.slope`, index));
      return [made([dy.number, slope], [dy.input, { name: op.inputs[0], index, gradient: false }], [null, "slope at"])];
    },
  },

  // y = x + dropout(branch)
  residual: {
    async value(pass, op, index) {
      const [x, branch] = op.inputs;
      const [stream, added, mask] = await together(
        pass.at(x, index), pass.at(branch, index), pass.mask(branch, index));
      return [term(stream), term(added, mask(0))];
    },
    async input(pass, op, index, which) {
      const [dy, mask] = await together(pass.at(op.output, index, true), pass.mask(op.inputs[1], index));
      return [which === 0 ? term(dy) : term(dy, mask(0))];
    },
  },

  // loss = mean of log Σ exp z − z[target]
  cross_entropy: {
    async value(pass, op) {
      const [logits] = op.inputs;
      const N = pass.B * pass.T;
      const [V] = pass.shape(logits).slice(-1);
      const texts = await eachText(pass, (b) => pass.row(logits, [b, null, null]));
      const rows = texts.flatMap((data) => range(pass.T).map((t) => data.subarray(t * V, (t + 1) * V)));
      return pass.positions().flatMap(([b, t], n) => {
        const { likeliest, lse } = logSumExp(rows[n]);
        const target = pass.targets[b][t];
        return [
          made([lse, 1 / N], [{ name: logits, index: [b, t, likeliest], gradient: false }],
            ["log Σ exp of the row of", "1/N"]),
          term(named(rows[n][target], logits, [b, t, target]), by(-1 / N, "−1/N")),
        ];
      });
    },
    // dz = (softmax(z) − [target]) / N
    async input(pass, op, [b, t, v]) {
      const [logits, targets] = op.inputs;
      const N = pass.B * pass.T;
      const row = await pass.row(logits, [b, t, null]);
      const { largest, total } = logSumExp(row);
      const loss = { name: "loss", index: [], gradient: true };
      const own = { name: logits, index: [b, t, v], gradient: false };
      const terms = [made([Math.exp(row[v] - largest) / total, 1 / N], [own, loss], ["softmax at", "1/N of"])];
      if (pass.targets[b][t] === v) {
        terms.push(made([1, -1 / N], [loss, { name: targets, index: [b, t], gradient: false }], [null, "−1/N at"]));
      }
      return terms;
    },
  },
};

/** Of a row of logits: the index and value of the largest, Σ exp(z − largest), and log Σ exp z. */
function logSumExp(row) {
  let likeliest = 0;
  for (let i = 1; i < row.length; i++) if (row[i] > row[likeliest]) likeliest = i;
  const largest = row[likeliest];
  let total = 0;
  for (let i = 0; i < row.length; i++) total += Math.exp(row[i] - largest);
  return { likeliest, largest, total, lse: largest + Math.log(total) };
}

/** The terms of an activation's or a parameter's own number. */
async function valueTerms(pass, name, index) {
  if (pass.isParameter(name)) return [made([await pass.number(name, index)])];
  const op = pass.summary.operations.find(({ output }) => output === name);
  return RULES[op.kind].value(pass, op, index);
}

/** The terms of a gradient: of all operations that read the array. */
async function gradientTerms(pass, name, index) {
  if (name === "loss") return [made([1])];
  const parameter = pass.isParameter(name);
  const found = pass.summary.operations.flatMap((op) =>
    (parameter ? op.parameters : op.inputs).flatMap((read, i) =>
      read === name ? [RULES[op.kind][parameter ? "parameter" : "input"](pass, op, index, i)] : []));
  return (await Promise.all(found)).flat();
}

/** Fail with a sentence unless the pass has such a number. */
function check(pass, name, index, gradient) {
  const { values, params } = pass.summary.arrays;
  if (name !== "loss" && !Object.hasOwn(values, name) && !Object.hasOwn(params, name)) throw new Error(`There is no ${name}.`);
  const shape = pass.shape(name);
  const inside = index.length === shape.length
    && index.every((i, axis) => Number.isInteger(i) && i >= 0 && i < shape[axis]);
  if (!inside) throw new Error(`${name} has shape (${shape.join(", ")}): [${index.join(", ")}] is outside.`);
}

/**
 * How a number came about: what it is the sum of, the largest term first.
 *
 * Returns {stored, terms: [{value, factors, inputs: [{name, index, gradient}], means}], sum, size, error}: size is
 * Σ |terms|, error |sum − stored| in units of eps · size. A factor is the number that the input in its place names,
 * unless means says in its place what else it is.
 */
export async function explain(store, name, index, gradient = false) {
  const pass = new Pass(store);
  check(pass, name, index, gradient);
  const [stored, terms] = await together(
    pass.number(name, index, gradient),
    gradient ? gradientTerms(pass, name, index) : valueTerms(pass, name, index));
  const values = Float64Array.from(terms, ({ value }) => value);
  const sizes = values.map(Math.abs);
  const order = Uint32Array.from(sizes.keys()).sort((i, j) => sizes[j] - sizes[i] || i - j);
  const sum = exactSum(values);
  const size = exactSum(sizes);
  return { stored, terms: Array.from(order, (i) => terms[i]), sum, size, error: errorOf(sum, stored, size * store.summary.eps, store.summary.tiny) };
}

/** |sum − stored| in units of scale; 0 if they are equal but for an underflow, infinite if one is not finite. */
function errorOf(sum, stored, scale, tiny) {
  const off = Math.abs(sum - stored);
  if (sum === stored || off <= tiny) return 0;
  return scale && Number.isFinite(off) ? off / scale : Infinity;
}

/** The sum rounded once, as Python's math.fsum: exact partial sums of no common digits (Shewchuk 1997). */
export function exactSum(numbers) {
  const partials = [];
  for (let x of numbers) {
    if (!Number.isFinite(x)) return numbers.reduce((sum, each) => sum + each, 0);
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const high = x + y;
      const low = y - (high - x);
      if (low !== 0) partials[kept++] = low;
      x = high;
    }
    partials.length = kept;
    partials.push(x);
  }
  return rounded(partials);
}

/** The sum of numbers of no common digits, the largest last: where two are half a digit apart, the third decides. */
function rounded(partials) {
  let high = 0;
  let low = 0;
  let i = partials.length;
  while (i > 0 && low === 0) {
    const part = partials[--i];
    const sum = high + part;
    low = part - (sum - high);
    high = sum;
  }
  if (i > 0 && Math.sign(low) === Math.sign(partials[i - 1])) {
    const up = high + 2 * low;
    if (up - high === 2 * low) return up;
  }
  return high;
}

/**
 * The number that "follow the largest term" goes to, or null at the end: a gradient leads to the gradient below it and
 * so to the loss, the loss to the token that adds most to it, and a value to what made it, up to a parameter or a token's id.
 */
export function next(explanation, { name, index, gradient }) {
  if (name === "loss" && gradient) return { name, index, gradient: false };
  if (name === "loss") return worst(explanation.terms);
  const inputs = explanation?.terms[0]?.inputs ?? [];
  const rank = (input) => (input.gradient ? 0 : /^(tokens|targets)$/.test(input.name) ? 1 : 2);
  return [...inputs].sort((a, b) => rank(a) - rank(b))[0] ?? null;
}

/** The target's logit of the token that adds most to the loss. */
function worst(terms) {
  const losses = new Map(); // position -> [its part of the loss, its target's logit]
  for (const { value, factors, inputs: [logit] } of terms) {
    const position = logit.index.slice(0, 2).join();
    const [sum, target] = losses.get(position) ?? [0, null];
    losses.set(position, [sum + value, factors[1] < 0 ? logit : target]);
  }
  return [...losses.values()].reduce((a, b) => (b[0] > a[0] ? b : a))[1];
}

/** Why a gradient is exactly 0, in one sentence; null where it just came out as 0. */
export function whyZero(store, name, index, explanation) {
  const pass = new Pass(store);
  const kind = name.replace(/^trf_blocks\.\d+\./, "");
  if (kind === "att.scores" && index[3] > index[2]) {
    return `This key (position ${index[3]}) lies in the future of its query (position ${index[2]}): the score is masked to −∞, so the loss does not depend on it.`;
  }
  if ((kind === "att.scores" || kind === "att.q") && index[2] === 0) {
    return "The first query sees one key only: its probability is 1 whatever the score.";
  }
  if (kind === "att.k" && index[2] === 0 && pass.T === 1) {
    return "There is one key only: its probability is 1 whatever the score.";
  }
  if (/^att\.W_(query|key)\./.test(kind) && pass.T === 1) {
    return "The only query sees one key only: its probability is 1 whatever the score.";
  }
  if (kind === "att.W_key.bias") {
    return "A key bias adds the same number, query · bias, to all scores of a query, and softmax ignores what is added to all alike.";
  }
  if (name === "tok_emb.weight" && !pass.config.tie_weights && !pass.tokens.flat().includes(index[0])) {
    return "This token does not occur in the text, so the loss does not depend on its row.";
  }
  if (name === "pos_emb.weight" && index[0] >= pass.T) {
    return `The text ends before position ${index[0]}, so this row was not used.`;
  }
  const { terms } = explanation;
  if (!terms.length) return null;
  if (terms.every(({ value }) => value === 0)) {
    const dropped = terms.some(({ factors, inputs }) => factors.length > inputs.length && factors.slice(inputs.length).includes(0));
    return dropped ? "Dropout set what was computed from this number to 0." : "Every term is 0: no gradient arrives here.";
  }
  return "Its terms cancel.";
}

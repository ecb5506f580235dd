"""One pass with everything kept: every activation, and the loss's gradient with respect to each, by name."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_gpt.block import Dropout, linear_into, merge_heads, split_heads
from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.explain.operations import operations
from numpy_gpt.explain.terms import Explanation, explain
from numpy_gpt.model import GPT
from numpy_gpt.ops import attention, cross_entropy, dropout, embedding, gelu, layernorm, linear
from numpy_gpt.parallel.threads import all_cores, product
from numpy_gpt.parameters import block_names, separate
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array, Params

Replacement = npt.ArrayLike | Callable[[Array], npt.ArrayLike]
"""An array to put in an activation's place, or a function that makes it from a copy of the activation."""


class Trace:
    """What `trace` returns. The arrays are copies: yours to change, and no later step changes them.

    config: the model's. tokens, targets (None if not given): (B, T). params: the parameters.
    values: name -> activation, in order of computation.
    grads: name -> total derivative of the loss by that activation, then by every parameter; empty without targets.
    loss: mean nats per token, None without targets. logits: values["logits"], (B, T, V).
    caches: what backward keeps beside the activations: x̂ and 1 / σ of each LayerNorm, GELU's slope, softmax's log-sums.
    masks: dropout's factors (0 or 1 / (1 − rate)) under the names of "emb", "att.probs", "att.out" and "ff.out", where
    drawn. replaced: the names of the replaced activations.
    """

    def __init__(self, model: GPT, tokens: Array, targets: Array | None, replaced: frozenset[str]):
        self.config: GPTConfig = model.config
        self.tokens, self.targets, self.replaced = tokens, targets, replaced
        self.params: Params = {name: array.copy() for name, array in model.params.items()}
        self.values: Params = {}
        self.grads: Params = {}
        self.masks: Params = {}
        self.caches: dict[str, Any] = {}
        self.loss: Any = None

    @property
    def logits(self) -> Array:
        """values["logits"], (B, T, V)."""
        return self.values["logits"]

    def explain(self, name: str, index: Sequence[int], gradient: bool = False) -> Explanation:
        """How values[name][index], or with gradient grads[name][index], came about: the terms it sums.

        name: an activation's, a parameter's or "loss" (index ()). The result has .stored (the number), .terms (the
        largest first, each with .value, .factors and .inputs: name, index, gradient) and .sum; print it for a table.
        Raises InputError for an unknown name, an index outside the array, and a gradient of a trace without targets.
        """
        return explain(self, name, index, gradient)


@all_cores()
def trace(
    model: GPT,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike | None = None,
    rng: Generator | None = None,
    replace: Mapping[str, Replacement] | None = None,
) -> Trace:
    """Run one pass over tokens (B, T) and keep every activation; with targets (B, T), every gradient too.

    The names, with B texts, T tokens, C features, NH heads of HS features, a vocabulary of V:
        tok_emb (B, T, C), pos_emb (T, C), emb (B, T, C): their sum, after dropout;
        for each block trf_blocks.{i}.: resid_pre (B, T, C): what the block reads; norm1;
            att.q, att.k, att.v (B, NH, T, HS); att.scores (B, NH, T, T): scaled, −inf in the future; att.probs: after
            softmax, before dropout; att.heads (B, T, C): side by side; att.out: after out_proj, before dropout;
            resid_mid (B, T, C); norm2; ff.pre (B, T, 4C); ff.act: after GELU; ff.out (B, T, C): before dropout;
            resid_post (B, T, C);
        final_norm (B, T, C), logits (B, T, V).

    A gradient is the total derivative of the loss by that array, over all paths, as torch's retain_grad gives it. loss
    and the parameters' gradients have the bits of model.loss_and_grads(tokens, targets, rng); rng given: dropout is on.

    replace puts another array in an activation's place: name -> array of its shape, or a function of the activation.
    The replacement is a constant, as after torch's detach: no gradient passes it to earlier activations, and
    grads[name] is the gradient with respect to the replacement.

    Raises InputError for ids that do not fit the model, and for a replacement of an unknown name, of another shape or
    without numbers.
    """
    if not isinstance(replace, Mapping | None):
        raise InputError(f"replace: give a dict from names to arrays or functions, not {type(replace).__name__}")
    model._check_parameters()
    replace = dict(replace or {})
    names = [operation.output for operation in operations(model.config)[:-1]]
    for name in replace:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 3, 0) or names[:3]
            raise InputError(f"replace: a trace has no {name!r}; the nearest names are {', '.join(near)}")
    if targets is None:
        ids, want = model._checked("tokens", tokens), None
    else:
        ids, want = model._checked_pair(tokens, targets)
    t = Trace(model, ids.copy(), None if want is None else want.copy(), frozenset(replace))
    one = _Pass(copy(model), t, replace, Dropout(model.config.drop_rate, rng, model.dtype))
    h = one.forward()
    if want is not None:
        dh, dw_head = one.head_loss(h, want)
        grads = one.backward(dh, dw_head)
        grads |= t.grads
        t.grads = {name: grads[name] for name in [*t.values, *model.params]}
    return t


class _Pass:
    """The model's forward and backward pass, as model.py and block.py have them, with each array kept on its way."""

    def __init__(self, model: GPT, t: Trace, replace: Mapping[str, Replacement], drop: Dropout):
        model._buffers = {}  # a copy's own: the gradients that the model returned last stay as they are
        self.model, self.t, self.drop = model, t, drop
        self._replace = replace

    def keep(self, name: str, array: Array) -> Array:
        """Keep the activation, or what replaces it, and return the one that the pass continues with."""
        if name not in self._replace:
            self.t.values[name] = array.copy()
            return array
        made = self._replace[name]
        new = made(array.copy()) if callable(made) else made
        try:
            put = np.asarray(new)
        except ValueError as error:
            raise InputError(
                f"replace: {name} has shape {array.shape}, its replacement rows of different lengths"
            ) from error
        except (TypeError, RuntimeError) as error:  # another library's array
            raise InputError(f"replace: {name} has shape {array.shape}, its replacement fails: {error}") from error
        if put.dtype.kind not in "biuf":
            found = "None: return the array" if new is None and callable(made) else "not an array of numbers"
            raise InputError(f"replace: {name} has shape {array.shape}, its replacement is {found}")
        if put.shape != array.shape:
            raise InputError(f"replace: {name} has shape {array.shape}, its replacement shape {put.shape}")
        put = put.astype(array.dtype)
        self.t.values[name] = put
        return put.copy()

    def grad(self, name: str, d: Array) -> Array:
        """Keep an activation's gradient, and return what flows on: zero if the activation was replaced."""
        self.t.grads[name] = d.copy()
        return np.zeros_like(d) if name in self._replace else d

    def masked(self, name: str, shape: tuple[int, ...]) -> Array | None:
        mask = self.drop.mask(shape)
        if mask is not None:
            self.t.masks[name] = mask
        return mask

    def forward(self) -> Array:
        """Keep every activation; return the final LayerNorm's output, (B, T, C)."""
        p, tokens, config = self.model.params, self.t.tokens, self.model.config
        self.model._check_parameters()
        tok, self._c_tok = embedding.embedding_forward(tokens, p["tok_emb.weight"])
        tok, pos = self.keep("tok_emb", tok), self.keep("pos_emb", p["pos_emb.weight"][: tokens.shape[1]])
        x, _ = embedding.position_embedding_forward(tok, pos)  # (B, T, C)
        x, self._c_drop = dropout.dropout_forward(x, self.masked("emb", x.shape))
        x = self.keep("emb", x)
        self._c_blocks = []
        for i in range(config.n_layers):
            x, c_block = self.block_forward(x, self.model._block(i), f"trf_blocks.{i}.")
            self._c_blocks.append(c_block)
        h, self._c_norm = layernorm.layernorm_forward(x, p["final_norm.scale"], p["final_norm.shift"])
        self.t.caches["final_norm"] = self._c_norm[:2]
        h = self.keep("final_norm", h)
        self.keep("logits", linear.linear_forward(h, self.model._head(), None)[0])
        return h

    def block_forward(self, x: Array, p: Params, at: str) -> tuple[Array, Any]:
        """block.block_forward, for the block whose names begin with `at`."""
        config, keep, caches = self.model.config, self.keep, self.t.caches
        x = keep(f"{at}resid_pre", x)
        h, c_norm1 = layernorm.layernorm_forward(x, p["norm1.scale"], p["norm1.shift"])
        caches[f"{at}norm1"] = c_norm1[:2]
        h = keep(f"{at}norm1", h)
        qkv, c_qkv = linear.linear_forward(h, p["att.W_qkv.weight"], p.get("att.W_qkv.bias"))  # (B, T, 3C)
        q, k, v = (split_heads(third, config.n_heads) for third in np.split(qkv, 3, axis=-1))  # (B, NH, T, HS)
        q, k, v = keep(f"{at}att.q", q), keep(f"{at}att.k", k), keep(f"{at}att.v", v)
        heads, c_att = self.attention_forward(q, k, v, at)
        merged = keep(f"{at}att.heads", merge_heads(heads))  # (B, T, C)
        a, c_out = linear.linear_forward(merged, p["att.out_proj.weight"], p["att.out_proj.bias"])
        a = keep(f"{at}att.out", a)
        a, c_drop1 = dropout.dropout_forward(a, self.masked(f"{at}att.out", a.shape))
        mid = keep(f"{at}resid_mid", x + a)
        h, c_norm2 = layernorm.layernorm_forward(mid, p["norm2.scale"], p["norm2.shift"])
        caches[f"{at}norm2"] = c_norm2[:2]
        h = keep(f"{at}norm2", h)
        h, c_0 = linear.linear_forward(h, p["ff.layers.0.weight"], p["ff.layers.0.bias"])  # (B, T, 4C)
        h, c_gelu = gelu.gelu_forward(keep(f"{at}ff.pre", h))
        caches[f"{at}ff.act"] = c_gelu
        m, c_2 = linear.linear_forward(keep(f"{at}ff.act", h), p["ff.layers.2.weight"], p["ff.layers.2.bias"])
        m = keep(f"{at}ff.out", m)  # (B, T, C)
        m, c_drop2 = dropout.dropout_forward(m, self.masked(f"{at}ff.out", m.shape))
        y = keep(f"{at}resid_post", mid + m)
        return y, (c_norm1, c_qkv, c_att, c_out, c_drop1, c_norm2, c_0, c_gelu, c_2, c_drop2)

    def attention_forward(self, q: Array, k: Array, v: Array, at: str) -> tuple[Array, Any]:
        """The operation's heads (B, NH, T, HS). It does not return scores and probabilities, so they are computed here.

        If one of those two is replaced, the heads are made from its replacement.
        """
        B, NH, T, HS = q.shape
        mask = self.masked(f"{at}att.probs", (B, NH, T, T))
        y, cache = attention.attention_forward(q, k, v, mask)
        s = product(q / math.sqrt(HS), k.mT)  # (B, NH, T, T)
        s[..., np.triu(np.ones((T, T), bool), k=1)] = -np.inf
        s = self.keep(f"{at}att.scores", s)
        largest = s.max(axis=-1, keepdims=True)  # (B, NH, T, 1)
        e = np.exp(s - largest)
        total = e.sum(axis=-1, keepdims=True)  # (B, NH, T, 1)
        self.t.caches[f"{at}att.probs"] = largest, total
        p = self.keep(f"{at}att.probs", e / total)
        replaced = not {f"{at}att.scores", f"{at}att.probs"}.isdisjoint(self._replace)
        if replaced:
            y = product(p if mask is None else p * mask, v)
        return y, (cache, q, k, v, y, p, mask, replaced)

    def head_loss(self, h: Array, want: Array) -> tuple[Array, Array]:
        """Keep the loss and the logits' gradient; return dh (B, T, C) and the head's dw."""
        loss, dh, dw = self.model._head_loss(h, want, backward=True)
        logits = self.t.values["logits"]
        of_logits, c_loss = cross_entropy.cross_entropy_forward(logits, want)
        self.t.grads["logits"] = cross_entropy.cross_entropy_backward(1.0, c_loss)
        if "logits" in self._replace:
            loss, dh, dw = of_logits, np.zeros_like(dh), np.zeros_like(dw)
        self.t.loss = loss
        return dh, dw

    def backward(self, dh: Array, dw_head: Array) -> Params:
        """Keep every activation's gradient; return the parameters'."""
        model, tokens, grads = self.model, self.t.tokens, {self.model._head_name(): dw_head}
        dx, grads["final_norm.scale"], grads["final_norm.shift"] = layernorm.layernorm_backward(
            self.grad("final_norm", dh), self._c_norm
        )
        for i in reversed(range(model.config.n_layers)):
            block: Params = {}
            dx = self.block_backward(dx, self._c_blocks[i], block, f"trf_blocks.{i}.")
            grads |= {block_names(model.config)[i][short]: grad for short, grad in separate(block).items()}
        dx = dropout.dropout_backward(self.grad("emb", dx), self._c_drop)
        dtok, dpos = self.grad("tok_emb", dx), self.grad("pos_emb", dx.sum(axis=0))
        grads["pos_emb.weight"] = np.zeros_like(model.params["pos_emb.weight"])
        grads["pos_emb.weight"][: tokens.shape[1]] = dpos
        dw = dw_head if model.config.tie_weights else None
        grads["tok_emb.weight"] = embedding.embedding_backward(dtok, self._c_tok, dw)
        return grads

    def block_backward(self, dy: Array, cache: Any, grads: Params, at: str) -> Array:
        """block.block_backward, for the block whose names begin with `at`."""
        c_norm1, c_qkv, c_att, c_out, c_drop1, c_norm2, c_0, c_gelu, c_2, c_drop2 = cache
        grad = self.grad
        dy = grad(f"{at}resid_post", dy)
        dm = grad(f"{at}ff.out", dropout.dropout_backward(dy, c_drop2))  # y = mid + dropout(m)
        da = grad(f"{at}ff.act", linear_into(grads, "ff.layers.2", dm, c_2))  # (B, T, 4C)
        dh = grad(f"{at}ff.pre", gelu.gelu_backward(da, c_gelu))
        dh = grad(f"{at}norm2", linear_into(grads, "ff.layers.0", dh, c_0))  # (B, T, C)
        dmid, grads["norm2.scale"], grads["norm2.shift"] = layernorm.layernorm_backward(dh, c_norm2)
        dmid = grad(f"{at}resid_mid", dmid + dy)  # residual: dy takes both paths
        da = grad(f"{at}att.out", dropout.dropout_backward(dmid, c_drop1))  # mid = x + dropout(a)
        dheads = grad(f"{at}att.heads", linear_into(grads, "att.out_proj", da, c_out))
        dq, dk, dv = self.attention_backward(split_heads(dheads, self.model.config.n_heads), c_att, at)
        dq, dk, dv = grad(f"{at}att.q", dq), grad(f"{at}att.k", dk), grad(f"{at}att.v", dv)  # (B, NH, T, HS)
        dqkv = np.concatenate([merge_heads(d) for d in (dq, dk, dv)], axis=-1)  # (B, T, 3C)
        dh = grad(f"{at}norm1", linear_into(grads, "att.W_qkv", dqkv, c_qkv))
        dx, grads["norm1.scale"], grads["norm1.shift"] = layernorm.layernorm_backward(dh, c_norm1)
        return grad(f"{at}resid_pre", dx + dmid)

    def attention_backward(self, dheads: Array, cache: Any, at: str) -> tuple[Array, Array, Array]:
        """dheads (B, NH, T, HS) -> the operation's dq, dk, dv; keep the scores' and probabilities' gradients."""
        c_att, q, k, v, y, p, mask, replaced = cache
        dp = dropout.dropout_backward(product(dheads, v.mT), mask)  # (B, NH, T, T); y = (p · mask) @ v
        dp = self.grad(f"{at}att.probs", dp)
        if not replaced:
            ds = p * (dp - (dheads * y).sum(axis=-1, keepdims=True))  # p = softmax(s)
            ds[..., 0, :] = 0  # the first query sees one key: p = 1, whatever the score
            self.grad(f"{at}att.scores", ds)
            return attention.attention_backward(dheads, c_att)
        self.grad(f"{at}att.scores", p * (dp - (dp * p).sum(axis=-1, keepdims=True)))
        dv = product((p if mask is None else p * mask).mT, dheads)
        return np.zeros_like(q), np.zeros_like(k), dv  # scores or probs are a constant: no path from q, k

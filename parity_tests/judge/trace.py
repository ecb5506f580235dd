"""Every activation and gradient of a pass by torch's functions and retain_grad, to judge numpy_gpt.trace.

The pass is written out over plain tensors, without torch_gpt's modules and numpy_gpt's list of operations.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from parity_tests.judge import compare
from parity_tests.judge.compare import check

PARTS = (  # of a block: an activation, and what its gradient comes from, for the message
    ("resid_pre", "norm1 and the residual"),
    ("norm1", "att.q, att.k and att.v"),
    ("att.q", "att.scores"),
    ("att.k", "att.scores"),
    ("att.v", "att.heads"),
    ("att.scores", "att.probs"),
    ("att.probs", "att.heads"),
    ("att.heads", "att.out"),
    ("att.out", "resid_mid"),
    ("resid_mid", "norm2 and the residual"),
    ("norm2", "ff.pre"),
    ("ff.pre", "ff.act"),
    ("ff.act", "ff.out"),
    ("ff.out", "resid_post"),
    ("resid_post", "what reads the block"),
)


class TorchTrace(NamedTuple):
    """values: name -> activation; grads: name -> gradient, of activations and parameters; 0 where none arrives."""

    values: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    loss: np.ndarray


def names(config):
    """The names of a trace's activations in order of computation, written down a second time."""
    blocks = [f"trf_blocks.{i}.{name}" for i in range(config.n_layers) for name, _ in PARTS]
    return ["tok_emb", "pos_emb", "emb", *blocks, "final_norm", "logits"]


def torch_trace(config, params, tokens, targets, factors=None, replace=None):
    """factors: dropout's, in order of use, or None. replace: name -> a function of the activation."""
    p = {name: torch.from_numpy(np.array(a)).requires_grad_() for name, a in params.items()}
    masks = iter([] if factors is None else factors)
    (B, T), NH, kept, replace = tokens.shape, config.n_heads, {}, replace or {}
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def keep(name, tensor):
        if name in replace:
            tensor = torch.from_numpy(replace[name](tensor.detach().numpy().copy())).requires_grad_()
        else:
            tensor.retain_grad()
        kept[name] = tensor
        return tensor

    def drop(tensor):
        return tensor if factors is None else tensor * torch.from_numpy(next(masks))

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.scale"], p[f"{name}.shift"], eps=1e-5)

    def affine(x, name):
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    def heads(x):
        return x.view(B, T, NH, -1).transpose(1, 2)

    tok = keep("tok_emb", F.embedding(torch.from_numpy(tokens), p["tok_emb.weight"]))
    pos = keep("pos_emb", p["pos_emb.weight"][:T])
    x = keep("emb", drop(tok + pos))
    for i in range(config.n_layers):
        b = f"trf_blocks.{i}."
        pre = keep(f"{b}resid_pre", x + 0)
        h = keep(f"{b}norm1", norm(pre, f"{b}norm1"))
        q, k, v = (
            keep(f"{b}att.{n[2].lower()}", heads(affine(h, f"{b}att.{n}"))) for n in ("W_query", "W_key", "W_value")
        )
        scores = keep(f"{b}att.scores", (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(future, -torch.inf))
        probs = keep(f"{b}att.probs", scores.softmax(-1))
        h = keep(f"{b}att.heads", (drop(probs) @ v).transpose(1, 2).reshape(B, T, -1))
        out = keep(f"{b}att.out", affine(h, f"{b}att.out_proj"))
        mid = keep(f"{b}resid_mid", pre + drop(out))
        h = keep(f"{b}norm2", norm(mid, f"{b}norm2"))
        h = keep(f"{b}ff.act", F.gelu(keep(f"{b}ff.pre", affine(h, f"{b}ff.layers.0")), approximate="tanh"))
        out = keep(f"{b}ff.out", affine(h, f"{b}ff.layers.2"))
        x = keep(f"{b}resid_post", mid + drop(out))
    h = keep("final_norm", norm(x, "final_norm"))
    logits = keep("logits", F.linear(h, p["tok_emb.weight" if config.tie_weights else "out_head.weight"]))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in (kept | p).items()}
    arrays = [{n: t.detach().numpy() for n, t in found.items()} for found in (kept, grads)]
    return TorchTrace(*arrays, loss.detach().numpy())


def check_traces(config, got, want):
    """Compare every activation in order of the pass, then every gradient in order of the backward pass.

    The first that diverges is named, with what its gradient comes from. The scale is the largest activation, or the
    largest gradient, as for the whole model.
    """
    __tracebackhide__ = True
    assert list(got.values) == names(config), "names of the activations"
    assert list(got.grads) == [*names(config), *got.params], "names of the gradients"
    for name, a in want.values.items():
        check_infinite(name, got.values[name], a)
    got_values, want_values = ({n: np.where(np.isinf(a), 0, a) for n, a in t.values.items()} for t in (got, want))
    largest = max(float(np.abs(a).max()) for a in want_values.values())
    for name, activation in got_values.items():
        check(name, activation, want_values[name], largest, compare.MODEL)
    G = max(float(np.abs(g).max()) for g in want.grads.values())
    sources = dict(PARTS) | {"emb": "the first block", "tok_emb": "emb", "pos_emb": "emb", "final_norm": "logits"}
    for name in [*reversed(got.values), *got.params]:
        try:
            check(f"d {name}", got.grads[name], want.grads[name], G, compare.MODEL)
        except AssertionError as error:
            source = (
                "" if name in got.params else f", made of that of {sources.get(name.split('.', 2)[-1], 'the loss')}"
            )
            raise AssertionError(f"{error}{source}") from None


def check_infinite(name, got, want):
    """−inf is where torch has it."""
    __tracebackhide__ = True
    assert got.shape == want.shape, f"{name}: {got.shape} for {want.shape}"
    infinite = [np.where(np.isinf(a), a, 0) for a in (got, want)]
    assert np.array_equal(*infinite), f"{name}: infinite elsewhere, or of the other sign"

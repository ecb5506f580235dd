"""A pass with every activation and gradient kept, in torch: the other column of `numpy-gpt explore`."""

import json
import math
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from numpy_gpt.config import GPTConfig
from numpy_gpt.weights.checkpoint import load_params
from torch_gpt.model import from_params


def traced(
    config: GPTConfig, params: dict[str, Tensor], tokens: Tensor, targets: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The activations by the names of numpy_gpt.trace, each with its gradient retained, and the loss."""
    kept: dict[str, Tensor] = {}
    (B, T), p = tokens.shape, params
    future = torch.ones(T, T, dtype=torch.bool).triu(1)

    def keep(name: str, x: Tensor) -> Tensor:
        x.retain_grad()
        kept[name] = x
        return x

    def norm(x: Tensor, name: str) -> Tensor:
        return keep(name, F.layer_norm(x, x.shape[-1:], p[f"{name}.scale"], p[f"{name}.shift"], eps=1e-5))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))

    tok = keep("tok_emb", F.embedding(tokens, p["tok_emb.weight"]))
    pos = keep("pos_emb", p["pos_emb.weight"][:T].clone())
    x = keep("emb", tok + pos)
    for i in range(config.n_layers):
        b = f"trf_blocks.{i}."
        x = keep(f"{b}resid_pre", x.clone())
        h = norm(x, f"{b}norm1")
        q, k, v = (
            keep(
                f"{b}att.{name[2].lower()}", linear(h, f"{b}att.{name}").view(B, T, config.n_heads, -1).transpose(1, 2)
            )
            for name in ("W_query", "W_key", "W_value")
        )
        s = keep(f"{b}att.scores", (q @ k.mT / math.sqrt(config.head_size)).masked_fill(future, -math.inf))
        a = keep(f"{b}att.probs", torch.softmax(s, dim=-1))
        h = keep(f"{b}att.heads", (a @ v).transpose(1, 2).reshape(B, T, -1))
        x = keep(f"{b}resid_mid", x + keep(f"{b}att.out", linear(h, f"{b}att.out_proj")))
        h = keep(f"{b}ff.pre", linear(norm(x, f"{b}norm2"), f"{b}ff.layers.0"))
        h = keep(f"{b}ff.act", F.gelu(h, approximate="tanh"))
        x = keep(f"{b}resid_post", x + keep(f"{b}ff.out", linear(h, f"{b}ff.layers.2")))
    x = norm(x, "final_norm")
    logits = keep("logits", F.linear(x, p["tok_emb.weight" if config.tie_weights else "out_head.weight"]))
    return kept, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def write_pass(checkpoint: Path, parent: int) -> None:
    """The pass of the tokens and targets on stdin, as JSON, to stdout as safetensors: values/NAME and grads/NAME.

    Ends with the process `parent`, which may be killed at any moment.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tokens, targets = (torch.tensor(ids) for ids in json.load(sys.stdin))
    config, stored = load_params(checkpoint)
    params: dict[str, Tensor] = dict(from_params(config, stored).named_parameters())
    values, loss = traced(config, params, tokens, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    found = {f"values/{name}": x.detach() for name, x in values.items()}
    for name, x in (values | params).items():
        found[f"grads/{name}"] = torch.zeros_like(x) if x.grad is None else x.grad
    with open(1, "wb", closefd=False) as out:  # sys.stdout is for text
        out.write(save({name: x.contiguous().clone() for name, x in found.items()}))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)

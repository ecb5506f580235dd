"""GPT-2's own names and layout, used by OpenAI and Hugging Face, and their conversion to the book's and back.

In GPT-2, a linear weight is (in, out), a "Conv1D"; query, key and value are one matrix, c_attn, with biases; the
output head is the token embedding. nanoGPT has the same names with torch's (out, in) layout. Sources: OpenAI's
model.py (https://github.com/openai/gpt-2), transformers' modeling_gpt2.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.parameters import QKV, parameter_shapes
from numpy_gpt.typing import Array, Weights
from numpy_gpt.weights.stored import Stored

ENDS = {
    "tok_emb.weight": "wte.weight",
    "pos_emb.weight": "wpe.weight",
    "final_norm.scale": "ln_f.weight",
    "final_norm.shift": "ln_f.bias",
    "out_head.weight": "lm_head.weight",
}
"""The book's names outside the blocks -> GPT-2's."""

BLOCK = {
    "norm1.scale": "ln_1.weight",
    "norm1.shift": "ln_1.bias",
    "att.out_proj.weight": "attn.c_proj.weight",
    "att.out_proj.bias": "attn.c_proj.bias",
    "norm2.scale": "ln_2.weight",
    "norm2.shift": "ln_2.bias",
    "ff.layers.0.weight": "mlp.c_fc.weight",
    "ff.layers.0.bias": "mlp.c_fc.bias",
    "ff.layers.2.weight": "mlp.c_proj.weight",
    "ff.layers.2.bias": "mlp.c_proj.bias",
}
"""The book's names inside a block -> GPT-2's; att.W_query, att.W_key and att.W_value are thirds of attn.c_attn."""

LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def from_gpt2(config: GPTConfig, tensors: Mapping[str, Stored], what: str) -> dict[str, Stored]:
    """The book's parameters, read from GPT-2's tensors on demand.

    Linear weights are (in, out) unless the first c_attn is (3C, C). Raises InputError, which starts with `what`, for a
    tensor that is missing, unexpected, or of another shape.
    """
    first = tensors.get("h.0.attn.c_attn.weight")
    conv1d = first is None or first.shape != (3 * config.emb_dim, config.emb_dim)
    # do not build the shapes of an absurd number of layers
    shapes = parameter_shapes(replace(config, n_layers=min(config.n_layers, len(tensors) + 1)))
    found, used = {}, set()
    for name, shape in shapes.items():
        theirs, third = _theirs(name)
        used.add(theirs)
        stored = shape if third is None else (3 * shape[0], *shape[1:])
        turned = conv1d and theirs.endswith(LINEAR)
        want = stored[::-1] if turned else stored
        if theirs not in tensors:
            raise InputError(f"{what} has no tensor {theirs}: it is incomplete, or another configuration's")
        if tensors[theirs].shape != want:
            raise InputError(f"{what}: {theirs} has shape {tensors[theirs].shape}, its configuration expects {want}")
        found[name] = tensors[theirs].map(shape, partial(_part, turned=turned, third=third))
    if more := set(tensors) - used:
        raise InputError(f"{what} has a tensor {min(more)}, which a GPT-2 of its configuration lacks")
    return found


def renamed(tensors: Mapping[str, Stored], rename: Callable[[str], str], what: str) -> dict[str, Stored]:
    """The tensors under other names. Raises InputError, which starts with `what`, if two get the same name."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if rename(name) in found:
            raise InputError(f"{what} has {rename(name)} twice, also as {name}: it holds more than one model")
        found[rename(name)] = tensor
    return found


def to_gpt2(config: GPTConfig, params: Weights) -> dict[str, Array]:
    """The book's parameters as GPT-2's tensors, (in, out), with zeros for missing query, key and value biases."""
    tensors: dict[str, Array] = {}
    for name in parameter_shapes(config):
        theirs, third = _theirs(name)
        if third is None:
            array = np.asarray(params[name])
        elif third == 0:
            array = np.concatenate([np.asarray(params[name.replace(QKV[0], layer)]) for layer in QKV])
            if not config.qkv_bias:
                tensors[theirs.replace("weight", "bias")] = np.zeros(len(array), array.dtype)
        else:
            continue
        tensors[theirs] = array.T if theirs.endswith(LINEAR) else array
    return tensors


def _theirs(name: str) -> tuple[str, int | None]:
    """The GPT-2 tensor with the book's parameter of this name, and its third of it (None: all)."""
    if name in ENDS:
        return ENDS[name], None
    _, i, rest = name.split(".", 2)
    if rest in BLOCK:
        return f"h.{i}.{BLOCK[rest]}", None
    _, which, kind = rest.split(".")
    return f"h.{i}.attn.c_attn.{kind}", QKV.index(which)


def _part(array: Array, turned: bool, third: int | None) -> Array:
    array = array.T if turned else array
    return array if third is None else np.split(array, 3)[third]

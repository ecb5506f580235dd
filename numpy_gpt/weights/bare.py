"""A GPT-2 in a file without a configuration: its origin from the tensors' names, its sizes from their shapes.

The number of heads cannot be inferred from shapes. If not given, it is that of the GPT-2 size of the same width.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.weights.gpt2 import LINEAR
from numpy_gpt.weights.huggingface import BUFFERS, read_parameters, same
from numpy_gpt.weights.stored import Stored

WRAPPED = re.compile(r"^(module\.|_orig_mod\.|model\.)+")
"""Prefixes that DistributedDataParallel, torch.compile and Lightning add to every name."""


class Bare(NamedTuple):
    """A GPT-2: its origin in words, its configuration, and its parameters under the book's names."""

    what: str
    config: GPTConfig
    tensors: dict[str, Stored]


def unwrapped(name: str) -> str:
    """The name without those prefixes."""
    return WRAPPED.sub("", name)


def is_books(tensors: Mapping[str, Stored]) -> bool:
    """Whether the names are those of the book's GPTModel."""
    return "tok_emb.weight" in tensors


def read_books(file: Path, tensors: Mapping[str, Stored], n_heads: int | None) -> Bare:
    """The book's GPTModel, ignoring its causal masks. Raises InputError if the shapes are not a GPT's."""
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".att.mask")}
    config, guessed = _config(file, tensors, n_heads, ("tok_emb.weight", "pos_emb.weight"), r"trf_blocks\.(\d{1,9})\.")
    head = tensors.get("out_head.weight")
    tied = head is None or same(head, tensors["tok_emb.weight"])
    if tied:
        tensors.pop("out_head.weight", None)
    qkv_bias = "trf_blocks.0.att.W_query.bias" in tensors
    return Bare(f"the book's GPT{guessed}", replace(config, qkv_bias=qkv_bias, tie_weights=tied), tensors)


def read_gpt2(file: Path, tensors: Mapping[str, Stored], n_heads: int | None, nanogpt: bool = False) -> Bare:
    """A GPT-2 under GPT-2's names, in its layout or in torch's, as in nanoGPT and minGPT (nanogpt: surely nanoGPT's).

    Raises InputError if it is incomplete or the shapes are not a GPT-2's.
    """
    config, guessed = _config(file, tensors, n_heads, ("wte.weight", "wpe.weight"), r"h\.(\d{1,9})\.")
    head = tensors.get("lm_head.weight")
    tied = head is None or same(head, tensors["wte.weight"])
    config = replace(config, qkv_bias=True, tie_weights=tied)
    parameters = read_parameters(config, _with_biases(tensors), str(file))
    what = "GPT-2"
    if tensors["h.0.attn.c_attn.weight"].shape == (3 * config.emb_dim, config.emb_dim):
        masks = any(BUFFERS.fullmatch(name) for name in tensors)
        what = _trained_by(nanogpt or "ln_f.bias" not in tensors, masks and not tied)
    return Bare(what + guessed, config, parameters)


def _trained_by(nanogpt: bool, mingpt: bool) -> str:
    """The origin of a GPT-2 in torch's layout: minGPT uses GPT-2's GELU, nanoGPT does not."""
    if nanogpt:
        return "nanoGPT's GPT (its GELU is exact, here it is GPT-2's: logits differ by about 1e-4)"
    if mingpt:
        return "minGPT's GPT"
    return "nanoGPT's or minGPT's GPT (nanoGPT's GELU is exact, here it is GPT-2's: its logits differ by about 1e-4)"


def _config(
    file: Path, tensors: Mapping[str, Stored], n_heads: int | None, tables: tuple[str, str], block: str
) -> tuple[GPTConfig, str]:
    """The configuration inferred from the shapes, the rest at its defaults; and a note if the heads are a guess."""
    shapes = [tensors[name].shape if name in tensors else () for name in tables]
    layers = {int(match[1]) for name in tensors if (match := re.match(block, name))}
    if [len(shape) for shape in shapes] != [2, 2] or not layers:
        raise InputError(f"{file} is not a GPT-2: it has no {' or '.join(tables)}, or no blocks")
    (V, C), (T, _) = shapes
    guessed = ""
    if n_heads is None:
        known = {size["emb_dim"]: (name, size["n_heads"]) for name, size in GPT2_SIZES.items()}
        if C not in known:
            beside = ", or put the model's config.json next to it" if "wte.weight" in tables else ""
            raise InputError(f"{file} does not give the number of heads for its {C} features: pass --n-heads{beside}")
        size, n_heads = known[C]
        guessed = f", with the {n_heads} heads of GPT-2 {size}, since the file does not give their number"
    try:
        return GPTConfig(V, T, C, n_heads, max(layers) + 1), guessed
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _with_biases(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Add a bias of 0 for every weight without one, as after nanoGPT's bias=False."""
    completed = dict(tensors)
    for name, tensor in tensors.items():
        bias = name.removesuffix("weight") + "bias"
        if name.startswith(("h.", "ln_f.")) and name.endswith(".weight") and bias not in tensors:
            shape = tensor.shape[:1] if name.endswith(LINEAR) else tensor.shape
            completed[bias] = Stored(shape, tensor.dtype, partial(np.zeros, shape, tensor.dtype))
    return completed

"""OpenAI's GPT-2 as released: hparams.json and a TensorFlow checkpoint, read without TensorFlow.

Variables are named model/h0/attn/c_attn/w and so on; a "Conv1D" weight has a leading axis of 1. Source: model.py of
https://github.com/openai/gpt-2.
"""

import re
from pathlib import Path

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.typing import Array
from numpy_gpt.weights.gpt2 import from_gpt2, renamed
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tensorflow.bundle import read_bundle

PREFIX = "model.ckpt"
"""Prefix of the files model.ckpt.index and model.ckpt.data-…."""

KEYS = {
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""GPTConfig's size keys -> those of hparams.json."""

KINDS = {"w": "weight", "g": "weight", "b": "bias"}


def read_openai(folder: Path) -> tuple[GPTConfig, dict[str, Stored]]:
    """Configuration and parameters of a folder with hparams.json and model.ckpt.*; tensors are not yet read.

    The head is tied to the token embedding; query, key and value have biases; dropout, which the release does not
    specify, is off. Raises InputError for files that are missing, damaged, or not a GPT-2's.
    """
    config = _config(folder / "hparams.json")
    what = str(folder / f"{PREFIX}.index")
    variables = {
        name: _without_leading_axis(tensor)
        for name, tensor in read_bundle(folder / PREFIX).items()
        if name.startswith("model/")  # others are step counts and the like
    }
    return config, from_gpt2(config, renamed(variables, _gpt2_name, what), what)


def _config(file: Path) -> GPTConfig:
    values = read_json(file)
    if missing := [theirs for theirs in KEYS.values() if theirs not in values]:
        raise InputError(f"{file} has no {', '.join(missing)}: is it the hparams.json of a GPT-2?")
    size = {ours: values[theirs] for ours, theirs in KEYS.items()}
    for name, released in GPT2_SIZES.items():
        if size["emb_dim"] == released["emb_dim"] and size["n_heads"] != released["n_heads"]:
            raise InputError(
                f"{file}: n_head is {size['n_heads']!r}, but {released['n_heads']} in GPT-2 {name}: it is damaged"
            )
    try:
        return GPTConfig(**size, drop_rate=0.0, qkv_bias=True, tie_weights=True)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _gpt2_name(variable: str) -> str:
    """model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight; model/wte -> wte.weight."""
    *path, last = variable.removeprefix("model/").split("/")
    path = [re.sub(r"^h(?=\d+$)", "h.", scope) for scope in path]
    return ".".join([*path, KINDS[last]] if last in KINDS else [*path, last, "weight"])


def _without_leading_axis(tensor: Stored) -> Stored:
    if len(tensor.shape) != 3 or tensor.shape[0] != 1:
        return tensor
    shape = tensor.shape[1:]

    def squeezed(array: Array) -> Array:
        return array.reshape(shape)

    return tensor.map(shape, squeezed)

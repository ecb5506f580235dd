"""The model's parameters: names, shapes, initial values and memory layout; and checks of an optimiser's moments."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.random.generator import Generator
from numpy_gpt.typing import Array, Float, Params

QKV = ("W_query", "W_key", "W_value")

ADDRESSES, MOST_LAYERS = 1 << 47, 1 << 20
"""Bytes that a process can address; number of layers whose names alone take gigabytes."""


def parameter_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, in the order of torch's state_dict; linear weights are (out, in)."""
    V, C = config.vocab_size, config.emb_dim
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (V, C), "pos_emb.weight": (config.context_length, C)}
    for i in range(config.n_layers):
        block: dict[str, tuple[int, ...]] = {}
        for name in QKV:
            block[f"att.{name}.weight"] = (C, C)
            if config.qkv_bias:
                block[f"att.{name}.bias"] = (C,)
        block |= {"att.out_proj.weight": (C, C), "att.out_proj.bias": (C,)}
        block |= {"ff.layers.0.weight": (4 * C, C), "ff.layers.0.bias": (4 * C,)}
        block |= {"ff.layers.2.weight": (C, 4 * C), "ff.layers.2.bias": (C,)}
        block |= {"norm1.scale": (C,), "norm1.shift": (C,), "norm2.scale": (C,), "norm2.shift": (C,)}
        shapes |= {f"trf_blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"final_norm.scale": (C,), "final_norm.shift": (C,)}
    return shapes if config.tie_weights else shapes | {"out_head.weight": (V, C)}


def parameter_count(config: GPTConfig) -> int:
    """Elements of all parameters together."""
    shapes = parameter_shapes(replace(config, n_layers=1))  # all blocks are alike
    block = sum(math.prod(shape) for name, shape in shapes.items() if name.startswith("trf_blocks."))
    return sum(map(math.prod, shapes.values())) + (config.n_layers - 1) * block


def decayed_parameters(config: GPTConfig, decay: str) -> list[str]:
    """The names of the parameters that weight decay shrinks.

    decay: "all", as in the book; "2d", the weights of embeddings and linear layers, as in nanoGPT; "matrices", those of
    linear layers alone, as in minGPT. A token embedding that is also the output head counts as an embedding.
    """
    shapes = parameter_shapes(config)
    left_out = {"all": (), "2d": (".bias", ".scale", ".shift"), "matrices": (".bias", ".scale", ".shift", "emb.weight")}
    return [name for name in shapes if not name.endswith(left_out[decay])]


def check_possible(config: GPTConfig) -> None:
    """Raise InputError for a model that no process can hold, before listing its layers one by one."""
    C = config.emb_dim
    numbers = (config.vocab_size + config.context_length + 12 * C * config.n_layers) * C
    if 4 * numbers >= ADDRESSES or config.n_layers > MOST_LAYERS:
        raise InputError(
            "a model of this configuration takes more memory than a process can have: choose a smaller vocab_size, "
            "context_length, emb_dim or n_layers"
        )


def check_shapes(config: GPTConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError naming the first parameter that is missing, unknown or of the wrong shape."""
    # an absurd n_layers must not build an absurd dictionary
    shapes = parameter_shapes(replace(config, n_layers=min(config.n_layers, len(found) + 1)))
    for name in [*shapes, *found]:
        if name not in found or name not in shapes:
            raise InputError(f"parameter {name} is {'missing' if name in shapes else 'not one of this configuration'}")
        if found[name] != shapes[name]:
            raise InputError(f"parameter {name} has shape {found[name]}, the configuration needs {shapes[name]}")


@cache
def known_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """parameter_shapes, cached: do not modify."""
    return parameter_shapes(config)


@cache
def block_names(config: GPTConfig) -> list[dict[str, str]]:
    """For each block: its own parameter names -> the model's names."""
    names = list(parameter_shapes(config))
    prefixes = [f"trf_blocks.{i}." for i in range(config.n_layers)]
    return [{n.removeprefix(prefix): n for n in names if n.startswith(prefix)} for prefix in prefixes]


def block_matrices(config: GPTConfig, dtype: Float) -> Params:
    """Uninitialised arrays for a block's matrices, under the block's own names, in one allocation.

    att.W_qkv.weight (3C, C) stacks the query, key and value weights, so that one product computes all three. A single
    allocation is read faster, because it is mapped in larger pages.
    """
    C = config.emb_dim
    shapes = {
        "att.W_qkv.weight": (3 * C, C),
        "att.out_proj.weight": (C, C),
        "ff.layers.0.weight": (4 * C, C),
        "ff.layers.2.weight": (C, 4 * C),
    }
    sizes = [math.prod(shape) for shape in shapes.values()]
    parts = np.split(np.empty(sum(sizes), dtype), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def separate(block: Params) -> Params:
    """A block's arrays, with att.W_qkv.weight and .bias split into views under their three names."""
    found: Params = {}
    for name, array in block.items():
        if name.startswith("att.W_qkv."):
            kind = name.rpartition(".")[2]
            found |= {f"att.{qkv}.{kind}": third for qkv, third in zip(QKV, np.split(array, 3), strict=True)}
        else:
            found[name] = array
    return found


def join(block: Params, weight: Array | None = None) -> Params:
    """The inverse of `separate`; weight: att.W_qkv.weight, if it exists already."""
    found = {name: array for name, array in block.items() if name.split(".")[1] not in QKV}
    found["att.W_qkv.weight"] = _joined(block, "weight") if weight is None else weight  # (3C, C)
    if "att.W_query.bias" in block:
        found["att.W_qkv.bias"] = _joined(block, "bias")  # (3C,)
    return found


def _joined(block: Params, kind: str) -> Array:
    return np.concatenate([block[f"att.{name}.{kind}"] for name in QKV])


def initial_parameters(config: GPTConfig, rng: Generator, dtype: Float = np.float32) -> Params:
    """torch's defaults for the book's layers, drawn in torch's order (float32, then cast to dtype).

    Embeddings N(0, 1); linear weights and biases uniform in ±1/√in_features; LayerNorm 1 and 0, which draw nothing.
    """
    params: Params = {}
    shapes = parameter_shapes(config)
    for name, shape in shapes.items():
        if "norm" in name:
            params[name] = np.full(shape, 1 if name.endswith("scale") else 0, dtype)
        elif "emb" in name:
            params[name] = np.asarray(rng.normal(shape), dtype)
        else:
            _, in_features = shapes[name.replace("bias", "weight")]  # a bias shares its weight's bound
            bound = in_features**-0.5
            params[name] = np.asarray(rng.uniform(shape, -bound, bound), dtype)
    return params


def check_state(name: str, array: Array, dtype: np.dtype[Any]) -> None:
    """Raise InputError unless an optimiser can reach this state: t >= 0, finite moments, v >= 0."""
    integer = dtype.kind == "i"
    largest = 1 << 53 if integer else float(np.finfo(dtype).max)  # torch counts its steps in floating point
    least = 0 if integer or name.startswith("v.") else -largest
    if array.dtype.kind not in ("iu" if integer else "f"):
        raise InputError(f"the optimiser's state has {name} as {array.dtype}: start from the model with --init")
    if array.size and not (array.min() >= least and array.max() <= largest):  # a NaN fails both
        raise InputError(
            f"the optimiser's state has {name} beyond {least} to {largest}: start from the model with --init"
        )

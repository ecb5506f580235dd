"""Hugging Face's GPT-2 folders, in and out: config.json beside model.safetensors, whole or in shards.

Names are GPT-2's, with or without the prefix "transformer."; the buffers that old files carry (attn.bias, the causal
mask, and attn.masked_bias) are passed over. Source of the keys: transformers' configuration_gpt2.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.config import GPTConfig
from numpy_gpt.encodings.huggingface import tokenizer_files
from numpy_gpt.encodings.vocabulary import end_of
from numpy_gpt.errors import InputError
from numpy_gpt.files import replacing
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.paths import is_file
from numpy_gpt.tokenizer import ENCODINGS
from numpy_gpt.typing import Weights
from numpy_gpt.weights.gpt2 import from_gpt2, renamed, to_gpt2
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tensors import FIX, read_tensors, write_tensors

PREFIX = "transformer."
INDEX = "model.safetensors.index.json"
PARAMETERS = (".weight", ".bias", ".scale", ".shift")
"""How the names of tensors end, among the keys of the metadata."""

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""GPTConfig's keys of the size -> config.json's."""

ENCODING = "numpy_gpt_encoding"
"""Our own key in a config.json, which transformers keeps: the encoding's name."""

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one formula
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""What a config.json may say of the rest, the first being its default: anything else is not the model computed here."""


def read_huggingface(path: Path) -> tuple[GPTConfig, dict[str, Stored]]:
    """Configuration and parameters of a folder, or of its model.safetensors, tensors unread.

    Raises InputError for what is missing, damaged, or another model than this GPT-2.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / "config.json")
    metadata, tensors = _shards(path) if path.is_dir() else read_tensors(path)
    return config, read_parameters(config, with_aliases(tensors, metadata, str(path)), str(path))


def short_name(name: str) -> str:
    """GPT-2's name of a tensor that transformers names."""
    return name.removeprefix(PREFIX)


def with_aliases(tensors: Mapping[str, Stored], metadata: Mapping[str, Any], what: str) -> dict[str, Stored]:
    """With the tensors that are there under one name alone, and whose other the metadata tells.

    So safetensors.torch.save_model keeps shared tensors: {"lm_head.weight": "transformer.wte.weight"}, the name that is
    left out and the one that is not. Raises InputError, which begins with `what`, where both are missing.
    """
    found, short = dict(tensors), {short_name(name): tensor for name, tensor in tensors.items()}
    for name, kept in metadata.items():
        if not (name.endswith(PARAMETERS) and isinstance(kept, str)) or short_name(name) in short:
            continue
        if short_name(kept) not in short:
            raise InputError(f"{what} says that {name} is {kept}, and has neither: it is incomplete or damaged")
        found[name] = short[short_name(kept)]
    return found


def read_parameters(config: GPTConfig, tensors: Mapping[str, Stored], what: str) -> dict[str, Stored]:
    """The book's parameters of tensors named as transformers names them; errors are InputErrors about `what`."""
    tensors = renamed(tensors, short_name, what)
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    head = tensors.pop("lm_head.weight", None) if config.tie_weights else None
    if head is not None and not same(head, tensors.setdefault("wte.weight", head)):
        raise InputError(f"{what}: lm_head.weight is not wte.weight, and its configuration says they are tied")
    return from_gpt2(config, tensors, what)


def same(a: Stored, b: Stored) -> bool:
    """Whether both have the same shape and numbers."""
    return a is b or (a.shape == b.shape and np.array_equal(a.read(), b.read()))


def read_config(file: Path) -> GPTConfig:
    """The configuration in a config.json. Raises InputError if it is no GPT-2's, or one that is computed otherwise."""
    values = read_json(file)
    for key, choices in FIXED.items():
        value = values.get(key, choices[0])
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            raise InputError(
                f"{file}: {key} is {value!r}, and only {choices[0]!r} is computed here: it is another model"
            )
    rates = {key: values.get(key, 0.1) for key in DROPOUTS}
    if any(rate != rates["resid_pdrop"] for rate in rates.values()):
        said = ", ".join(f"{key} {rate!r}" for key, rate in rates.items())
        raise InputError(f"{file}: {said} differ, and there is one rate here: set all three to it")
    if missing := [theirs for theirs in KEYS.values() if theirs not in values]:
        raise InputError(f"{file} has no {', '.join(missing)}: is it the config.json of a GPT-2?")
    try:
        config = GPTConfig(
            **{ours: values[theirs] for ours, theirs in KEYS.items()},
            drop_rate=rates["resid_pdrop"],
            qkv_bias=True,
            tie_weights=values.get("tie_word_embeddings", True),
        )
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if values.get("n_inner") not in (None, 4 * config.emb_dim):
        raise InputError(f"{file}: n_inner is {values['n_inner']!r}, and here it is 4 × n_embd")
    return config


def read_encoding(file: Path) -> str | None:
    """The name of the encoding that a config.json written here tells."""
    name = read_json(file).get(ENCODING)
    return name if name in ENCODINGS else None


def write_huggingface(
    config: GPTConfig, params: Weights, folder: Path, vocabulary: Mapping[str, bytes], encoding: str | None = None
) -> None:
    """A folder that exists, as transformers' GPT2LMHeadModel reads it, and if there is a vocabulary GPT2Tokenizer.

    vocabulary: its files, as they are kept in a checkpoint, or nothing. encoding: its name, if it has one, for
    read_encoding. Raises InputError where something cannot be written.
    """
    end = end_of(vocabulary) if vocabulary else None  # a vocabulary may be padded: then it is not the last
    end = config.vocab_size - 1 if end is None else end
    values = (
        {name: choices[0] for name, choices in FIXED.items()}
        | {
            "architectures": ["GPT2LMHeadModel"],
            **{theirs: getattr(config, ours) for ours, theirs in KEYS.items()},
            **dict.fromkeys(DROPOUTS, config.drop_rate),
            "n_inner": None,
            "tie_word_embeddings": config.tie_weights,
            "bos_token_id": end,
            "eos_token_id": end,
            "dtype": str(params["tok_emb.weight"].dtype),
        }
        | ({ENCODING: encoding} if encoding else {})
    )
    files = tokenizer_files(vocabulary, config.context_length) if vocabulary else {}
    files["config.json"] = json.dumps(values, indent=2).encode()
    tensors = to_gpt2(config, params)
    names = {name: name if name == "lm_head.weight" else PREFIX + name for name in tensors}
    whole = {names[name]: tensor for name, tensor in tensors.items()}
    try:
        for file, content in files.items():
            with replacing(folder / file) as beside:
                beside.write_bytes(content)
        write_tensors(folder / "model.safetensors", whole, {"format": "pt"})
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}; choose another --out") from error


def _shards(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of model.safetensors, or of the shards that its index names."""
    if (single := folder / "model.safetensors").is_file():
        return read_tensors(single)
    if not (folder / INDEX).is_file():
        pickled = folder / "pytorch_model.bin"
        there = is_file(pickled)
        fix = f"torch-gpt import {pickled} --out DIR takes its weights" if there else "put model.safetensors there"
        raise InputError(f"{folder} has a config.json, but neither model.safetensors nor {INDEX}: {fix}")
    index = read_json(folder / INDEX)
    places, about = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of names: {FIX}")
    metadata: dict[str, Any] = dict(about) if isinstance(about, dict) else {}
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(places.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{folder / INDEX} names {shard!r}, which is no .safetensors file beside it: {FIX}")
        said, found = read_tensors(folder / shard)
        metadata |= said
        for name, tensor in found.items():
            if places.get(name) != shard:
                raise InputError(f"{folder / shard} has a tensor {name}, which {INDEX} says is not there: {FIX}")
            tensors[name] = tensor
    if missing := places.keys() - tensors.keys() - metadata.keys():
        raise InputError(f"{folder}: {min(missing)} is not in {places[min(missing)]}, where {INDEX} says it is: {FIX}")
    return metadata, tensors

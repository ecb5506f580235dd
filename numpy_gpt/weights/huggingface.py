"""Hugging Face's GPT-2 folders, read and written: config.json and model.safetensors, in one file or in shards.

Names are GPT-2's, with or without the prefix "transformer."; the buffers in old files (attn.bias, the causal mask, and
attn.masked_bias) are ignored. Source of the keys: transformers' configuration_gpt2.py.
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
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.files import replacing
from numpy_gpt.io.paths import is_file
from numpy_gpt.tokenizer import ENCODINGS
from numpy_gpt.typing import Weights
from numpy_gpt.weights.gpt2 import from_gpt2, renamed, to_gpt2
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tensors import FIX, read_tensors, write_tensors

PREFIX = "transformer."
INDEX = "model.safetensors.index.json"
PARAMETERS = (".weight", ".bias", ".scale", ".shift")
"""Endings that identify tensor names among the metadata's keys."""

BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_positions",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""GPTConfig's size keys -> those of config.json."""

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
"""Accepted values of config.json's other keys, the first being the default: any other value is another model."""


def read_huggingface(path: Path) -> tuple[GPTConfig, dict[str, Stored]]:
    """Configuration and parameters of a folder, or of its model.safetensors; tensors are not yet read.

    Raises InputError for files that are missing, damaged, or of a model other than GPT-2.
    """
    folder = path if path.is_dir() else path.parent
    config = read_config(folder / "config.json")
    metadata, tensors = _shards(path) if path.is_dir() else read_tensors(path)
    return config, read_parameters(config, with_aliases(tensors, metadata, str(path)), str(path))


def short_name(name: str) -> str:
    """GPT-2's name of a tensor under transformers' name."""
    return name.removeprefix(PREFIX)


def with_aliases(tensors: Mapping[str, Stored], metadata: Mapping[str, Any], what: str) -> dict[str, Stored]:
    """Add tensors whose name the metadata gives as an alias of a stored one.

    safetensors.torch.save_model stores shared tensors once: {"lm_head.weight": "transformer.wte.weight"} maps the
    omitted name to the stored one. Raises InputError, which starts with `what`, if both are missing.
    """
    found, short = dict(tensors), {short_name(name): tensor for name, tensor in tensors.items()}
    for name, kept in metadata.items():
        if not (name.endswith(PARAMETERS) and isinstance(kept, str)) or short_name(name) in short:
            continue
        if short_name(kept) not in short:
            raise InputError(f"{what} says that {name} is {kept}, but has neither: it is incomplete or damaged")
        found[name] = short[short_name(kept)]
    return found


def read_parameters(config: GPTConfig, tensors: Mapping[str, Stored], what: str) -> dict[str, Stored]:
    """The book's parameters from tensors under transformers' names. Raises InputError, which starts with `what`."""
    tensors = renamed(tensors, short_name, what)
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    head = tensors.pop("lm_head.weight", None) if config.tie_weights else None
    if head is not None and not same(head, tensors.setdefault("wte.weight", head)):
        raise InputError(f"{what}: lm_head.weight differs from wte.weight, but its configuration says they are tied")
    return from_gpt2(config, tensors, what)


def same(a: Stored, b: Stored) -> bool:
    """Whether both have the same shape and numbers."""
    return a is b or (a.shape == b.shape and np.array_equal(a.read(), b.read()))


def read_config(file: Path) -> GPTConfig:
    """The configuration in a config.json. Raises InputError if it is not a GPT-2's, or is a variant of it."""
    values = read_json(file)
    for key, choices in FIXED.items():
        value = values.get(key, choices[0])
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            raise InputError(f"{file}: {key} is {value!r}, but only {choices[0]!r} is supported: it is another model")
    rates = {key: values.get(key, 0.1) for key in DROPOUTS}
    if any(rate != rates["resid_pdrop"] for rate in rates.values()):
        said = ", ".join(f"{key} {rate!r}" for key, rate in rates.items())
        raise InputError(f"{file}: {said} differ, but only one dropout rate is supported: set all three to it")
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
        raise InputError(f"{file}: n_inner is {values['n_inner']!r}, but only 4 × n_embd is supported")
    return config


def read_encoding(file: Path) -> str | None:
    """The encoding's name in a config.json written here; None if it has none."""
    name = read_json(file).get(ENCODING)
    return name if name in ENCODINGS else None


def write_huggingface(
    config: GPTConfig, params: Weights, folder: Path, vocabulary: Mapping[str, bytes], encoding: str | None = None
) -> None:
    """Write to an existing folder what transformers' GPT2LMHeadModel and, with a vocabulary, GPT2Tokenizer read.

    vocabulary: its files, as kept in a checkpoint, or empty. encoding: its name, if it has one, for read_encoding.
    Raises InputError if a file cannot be written.
    """
    end = end_of(vocabulary) if vocabulary else None  # not the last id of a padded vocabulary
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
    renamed_tensors = {names[name]: tensor for name, tensor in tensors.items()}
    try:
        for file, content in files.items():
            with replacing(folder / file) as beside:
                beside.write_bytes(content)
        write_tensors(folder / "model.safetensors", renamed_tensors, {"format": "pt"})
    except OSError as error:
        raise InputError(f"cannot write into {folder}: {error.strerror or error}; choose another --out") from error


def _shards(folder: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The metadata and the tensors of model.safetensors, or of the shards that its index names."""
    if (single := folder / "model.safetensors").is_file():
        return read_tensors(single)
    if not (folder / INDEX).is_file():
        pickled = folder / "pytorch_model.bin"
        usable = is_file(pickled)
        fix = f"torch-gpt import {pickled} --out DIR reads its weights" if usable else "put model.safetensors there"
        raise InputError(f"{folder} has a config.json, but neither model.safetensors nor {INDEX}: {fix}")
    index = read_json(folder / INDEX)
    places, about = index.get("weight_map"), index.get("metadata")
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{folder / INDEX} has no weight_map of names: {FIX}")
    metadata: dict[str, Any] = dict(about) if isinstance(about, dict) else {}
    tensors: dict[str, Stored] = {}
    for shard in sorted(set(places.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{folder / INDEX} names {shard!r}, which is not a .safetensors file next to it: {FIX}")
        said, found = read_tensors(folder / shard)
        metadata |= said
        for name, tensor in found.items():
            if places.get(name) != shard:
                raise InputError(f"{folder / shard} has a tensor {name}, which {INDEX} says is not there: {FIX}")
            tensors[name] = tensor
    if missing := places.keys() - tensors.keys() - metadata.keys():
        raise InputError(f"{folder}: {min(missing)} is not in {places[min(missing)]}, where {INDEX} says it is: {FIX}")
    return metadata, tensors

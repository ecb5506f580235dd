"""Weights to import, in any format: the reader for a path, and the vocabulary found with it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from numpy_gpt.config import GPTConfig
from numpy_gpt.encodings.huggingface import read_tokenizer
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.formats import GIVE, foreign, kind_of_file
from numpy_gpt.io.paths import check_readable, is_file, kind_of
from numpy_gpt.weights.bare import is_books, read_books, read_gpt2, unwrapped
from numpy_gpt.weights.gpt2 import renamed
from numpy_gpt.weights.huggingface import (
    read_config,
    read_encoding,
    read_huggingface,
    read_parameters,
    short_name,
    with_aliases,
)
from numpy_gpt.weights.openai import PREFIX, read_openai
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tensors import read_tensors

SHARD = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.safetensors")

MINGPT_HEADS = {"gopher-44m": 8, "gpt-mini": 6, "gpt-micro": 4, "gpt-nano": 3}
"""Heads of minGPT's own sizes (https://github.com/karpathy/minGPT), which its config.json gives by name only."""


class Source(NamedTuple):
    """A GPT-2 to import; its tensors are read on demand."""

    what: str
    config: GPTConfig
    tensors: dict[str, Stored]
    vocabulary: dict[str, bytes]  # its files, as kept in a checkpoint; empty if there is none
    encoding: str | None = None  # its name, if the source gives it


def open_source(path: Path, n_heads: int | None = None) -> Source:
    """The GPT-2 at path: OpenAI's folder, Hugging Face's folder, or a .safetensors file of theirs or of the book's.

    n_heads, if given, is its number of heads, which its configuration must not contradict. Raises InputError for
    anything else, and for missing or damaged files.
    """
    kind = kind_of(path)
    if kind == "missing":
        raise InputError(f"{path} does not exist: {GIVE}")
    if kind == "file":
        return _open_file(path, n_heads)
    if kind != "folder":
        raise InputError(f"{path} is neither a file nor a folder: {GIVE}")
    if is_file(path / "hparams.json") or is_file(path / f"{PREFIX}.index"):
        source = Source("OpenAI's GPT-2", *read_openai(path), read_tokenizer(path))
    elif is_file(path / "config.json"):
        encoding = read_encoding(path / "config.json")
        source = Source("Hugging Face's GPT-2", *read_huggingface(path), read_tokenizer(path), encoding)
    else:
        raise InputError(
            f"{path} has neither hparams.json and {PREFIX}.index (OpenAI's GPT-2) nor config.json (Hugging Face's)"
            + _only_file(path)
        )
    _check_heads(path, n_heads, source.config, "its configuration")
    return source


def source_of(file: Path, tensors: Mapping[str, Stored], n_heads: int | None = None, nanogpt: bool = False) -> Source:
    """The GPT-2 with these tensors of a file: the book's, Hugging Face's, nanoGPT's or minGPT's, by their names.

    The number of heads is n_heads, else that in config.json next to the file, else that of the GPT-2 size of this
    width. Raises InputError if it is not one of these GPTs, or is incomplete.
    """
    tensors = renamed(tensors, unwrapped, str(file))
    vocabulary = read_tokenizer(file.parent)
    if is_books(tensors):
        return Source(*read_books(file, tensors, n_heads), vocabulary)
    tensors = renamed(tensors, short_name, str(file))
    beside = file.parent / "config.json"
    mingpts = read_json(beside).get("model") if is_file(beside) else None
    if isinstance(mingpts, dict):
        n_heads = n_heads or mingpts.get("n_head") or MINGPT_HEADS.get(str(mingpts.get("model_type")))
    elif is_file(beside):
        config = read_config(beside)
        _check_heads(file, n_heads, config, "config.json next to it")
        parameters = read_parameters(config, tensors, str(file))
        return Source("Hugging Face's GPT-2", config, parameters, vocabulary, read_encoding(beside))
    return Source(*read_gpt2(file, tensors, n_heads, nanogpt), vocabulary)


def _open_file(file: Path, n_heads: int | None) -> Source:
    """The GPT-2 in a safetensors file of any name. Raises InputError, naming its format, for any other file."""
    check_readable(file)
    if SHARD.fullmatch(file.name) or file.suffix == ".json" or file.name.startswith(f"{PREFIX}."):
        raise InputError(f"{file} is one file of several: give their folder, {file.parent}")
    if file.suffix != ".safetensors" and kind_of_file(file) != "safetensors":
        raise InputError(f"{file} cannot be imported: {foreign(file) or GIVE}")
    metadata, tensors = read_tensors(file)
    if metadata.get("format") == "numpy-gpt":
        raise InputError(f"{file} is already a numpy-gpt checkpoint: it needs no import")
    return source_of(file, with_aliases(tensors, metadata, str(file)), n_heads)


def _check_heads(path: Path, n_heads: int | None, config: GPTConfig, where: str) -> None:
    """Raise InputError if n_heads is given and `where` has another number."""
    if n_heads not in (None, config.n_heads):
        raise InputError(f"{path} has {n_heads} heads, but {where} says {config.n_heads}: correct one of them")


def _only_file(folder: Path) -> str:
    """Advice to give the folder's .safetensors file instead, if it has exactly one."""
    files = list(folder.glob("*.safetensors"))
    return f": give its file, {files[0]}" if len(files) == 1 else ""

"""Weights from elsewhere, whatever they are: which reader a path is for, and the vocabulary that lies beside it."""

from pathlib import Path
from typing import NamedTuple

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.paths import check_readable, is_file, kind_of
from numpy_gpt.weights.huggingface import read_encoding, read_huggingface
from numpy_gpt.weights.openai import PREFIX, read_openai
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tokenizers import read_tokenizer

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


class Source(NamedTuple):
    """A GPT-2 to bring in: its tensors are read when they are wanted."""

    what: str
    config: GPTConfig
    tensors: dict[str, Stored]
    vocabulary: dict[str, bytes]  # its files as they are kept in a checkpoint; empty without one
    encoding: str | None = None  # its name, where the source tells it


def open_source(path: Path) -> Source:
    """The GPT-2 at path: OpenAI's folder, Hugging Face's folder or its .safetensors file.

    Raises InputError for anything else, and for what in it is missing or damaged.
    """
    kind = kind_of(path)
    if kind == "missing":
        raise InputError(f"{path} does not exist: give a folder of OpenAI's or Hugging Face's GPT-2")
    if kind == "file":
        check_readable(path)
    if path.suffix in PICKLES and kind == "file":
        raise InputError(f"{path} is a PyTorch pickle, which only PyTorch reads: torch-gpt import {path} --out DIR")
    folder = path if kind == "folder" else path.parent
    if kind == "folder" and (is_file(path / "hparams.json") or is_file(path / f"{PREFIX}.index")):
        return Source("OpenAI's GPT-2", *read_openai(path), read_tokenizer(folder))
    if is_file(folder / "config.json") and (kind == "folder" or path.suffix == ".safetensors"):
        encoding = read_encoding(folder / "config.json")
        return Source("Hugging Face's GPT-2", *read_huggingface(path), read_tokenizer(folder), encoding)
    if kind == "folder":
        raise InputError(
            f"{path} has neither hparams.json and {PREFIX}.index (OpenAI's GPT-2) nor config.json (Hugging Face's)"
        )
    raise InputError(f"{path} cannot be brought in: give a folder, or a .safetensors file with config.json beside it")

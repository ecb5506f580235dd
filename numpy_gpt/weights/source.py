"""Weights from elsewhere, whatever they are: which reader a path is for, and the vocabulary that lies beside it."""

import json
from pathlib import Path
from typing import NamedTuple

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.files import read_json
from numpy_gpt.paths import check_readable, is_file, kind_of
from numpy_gpt.weights.huggingface import VOCABULARY, read_huggingface
from numpy_gpt.weights.openai import PREFIX, read_openai
from numpy_gpt.weights.stored import Stored

PICKLES = (".pth", ".pt", ".bin", ".ckpt")


class Source(NamedTuple):
    """A GPT-2 to bring in: its tensors are read when they are wanted."""

    what: str
    config: GPTConfig
    tensors: dict[str, Stored]
    vocabulary: dict[str, bytes]  # encoder.json and vocab.bpe, or what there is of them


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
        return Source("OpenAI's GPT-2", *read_openai(path), read_vocabulary(folder))
    if is_file(folder / "config.json") and (kind == "folder" or path.suffix == ".safetensors"):
        return Source("Hugging Face's GPT-2", *read_huggingface(path), read_vocabulary(folder))
    if kind == "folder":
        raise InputError(
            f"{path} has neither hparams.json and {PREFIX}.index (OpenAI's GPT-2) nor config.json (Hugging Face's)"
        )
    raise InputError(f"{path} cannot be brought in: give a folder, or a .safetensors file with config.json beside it")


def read_vocabulary(folder: Path) -> dict[str, bytes]:
    """encoder.json and vocab.bpe in folder, under Hugging Face's names too or inside tokenizer.json; what there is."""
    found: dict[str, bytes] = {}
    for ours, theirs in VOCABULARY.items():
        for name in (theirs, ours):
            if is_file(folder / name):
                found[ours] = (folder / name).read_bytes()
    return found or _from_tokenizer(folder / "tokenizer.json")


def _from_tokenizer(file: Path) -> dict[str, bytes]:
    """The same two files out of the one that transformers writes today."""
    if not is_file(file):
        return {}
    try:
        model = read_json(file)["model"]
        lines = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        vocabulary = {"encoder.json": json.dumps(model["vocab"]), "vocab.bpe": "\n".join(["#version: 0.2", *lines, ""])}
        return {name: text.encode() for name, text in vocabulary.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} holds no vocabulary in GPT-2's format ({error!r}): remove it, or mend it") from error

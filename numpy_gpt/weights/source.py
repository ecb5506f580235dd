"""Weights from elsewhere, whatever they are: which reader a path is for, and the vocabulary that lies beside it."""

import json
from pathlib import Path
from typing import NamedTuple

from numpy_gpt.config import GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.files import read_json
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
    if not path.exists():
        raise InputError(f"{path} does not exist: give a folder of OpenAI's or Hugging Face's GPT-2")
    if path.suffix in PICKLES and path.is_file():
        raise InputError(f"{path} is a PyTorch pickle, which only PyTorch reads: torch-gpt import {path} --out DIR")
    folder = path if path.is_dir() else path.parent
    if path.is_dir() and ((path / "hparams.json").exists() or (path / f"{PREFIX}.index").exists()):
        return Source("OpenAI's GPT-2", *read_openai(path), read_vocabulary(folder))
    if (folder / "config.json").exists() and (path.is_dir() or path.suffix == ".safetensors"):
        return Source("Hugging Face's GPT-2", *read_huggingface(path), read_vocabulary(folder))
    if path.is_dir():
        raise InputError(
            f"{path} has neither hparams.json and {PREFIX}.index (OpenAI's GPT-2) nor config.json (Hugging Face's)"
        )
    raise InputError(f"{path} cannot be brought in: give a folder, or a .safetensors file with config.json beside it")


def read_vocabulary(folder: Path) -> dict[str, bytes]:
    """encoder.json and vocab.bpe in folder, under Hugging Face's names too or inside tokenizer.json; what there is."""
    found: dict[str, bytes] = {}
    for ours, theirs in VOCABULARY.items():
        for name in (theirs, ours):
            if (folder / name).is_file():
                found[ours] = (folder / name).read_bytes()
    return found or _from_tokenizer(folder / "tokenizer.json")


def _from_tokenizer(file: Path) -> dict[str, bytes]:
    """The same two files out of the one that transformers writes today."""
    if not file.is_file():
        return {}
    model = read_json(file).get("model", {})
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return {}
    lines = [each if isinstance(each, str) else " ".join(each) for each in merges]
    return {
        "encoder.json": json.dumps(vocab).encode(),
        "vocab.bpe": "\n".join(["#version: 0.2", *lines, ""]).encode(),
    }

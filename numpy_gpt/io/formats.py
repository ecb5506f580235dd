"""File formats recognised by their first bytes, for messages about a file of the wrong format."""

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from numpy_gpt.io.paths import check_regular

HEAD = 512
"""Bytes examined at the start of a file."""

GIVE = "give a .safetensors file, or a folder of OpenAI's or Hugging Face's GPT-2"

MAGIC: dict[str, bytes] = {
    "gguf": rb"GGUF|lmgg",
    "npy": rb"\x93NUMPY",
    "hdf5": rb"\x89HDF\r\n\x1a\n",
    "gzip": rb"\x1f\x8b",
    "xz": rb"\xfd7zXZ\0",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "zstandard": rb"\x28\xb5\x2f\xfd",
    "7-Zip": rb"7z\xbc\xaf\x27\x1c",
    "tar": rb".{257}ustar",
    "safetensors": rb"(?!\0{5}).{5}\0{3}\{",
    "llm.c": b"|".join(re.escape(n.to_bytes(4, "little")) for n in (20240326, 20240327, 20240328, 20240520)),
    "lfs": rb"version https://git-lfs",
    "web": rb"(\xef\xbb\xbf)?\s*(?i:<!doctype|<html|<\?xml)",
    "saved model": rb"\x08\x01\x12[\x80-\xff]",
    "onnx": rb"\x08[\x03-\x14]\x12",
    "graph": rb"\x0a[\x80-\xff]{0,4}[\0-\x7f]\x0a.[ -~](?=.{0,400}[\0-\x08])",
    "tflite": rb".{4}TFL3",
    "msgpack": rb"[\x81-\x8f][\xa1-\xbf][ -~]",
    "torch": rb"\x80\x02|PK\x03\x04.{26}[^/\0]{1,255}/(data\.pkl|data/\d|constants\.pkl|version|byteorder)",
    "pickle": rb"\x80[\x03-\x05]",
    "npz": rb"PK\x03\x04.{26}[^\0]{1,255}\.npy",
    "zip": rb"PK\x03\x04",
    "zeros": rb"\0{64}",
}
"""Kind -> pattern of such a file's start; the first match wins."""

WORDS: dict[str, str | Callable[[Path], str]] = {
    "empty": "it is empty: copy or download it again",
    "gguf": f"it is GGUF, llama.cpp's format: {GIVE}",
    "npy": f"it is one NumPy array, as numpy.save writes it: {GIVE}",
    "npz": f"it is an .npz of NumPy arrays: {GIVE}",
    "hdf5": f"it is HDF5, as Keras saves weights: {GIVE}",
    "llm.c": "it is a file of llm.c: import the folder that llm.c's dev/eval/export_hf.py makes of its weights",
    "lfs": "it is a Git LFS pointer in place of the file: fetch the file itself with git lfs pull",
    "web": "it is a web page or a server's error: download the file itself",
    "saved model": f"it is a TensorFlow SavedModel: {GIVE}",
    "graph": f"it is a TensorFlow graph: {GIVE}",
    "onnx": f"it is ONNX: {GIVE}",
    "tflite": f"it is TensorFlow Lite: {GIVE}",
    "msgpack": f"it is MessagePack, as Flax saves weights: {GIVE}",
    "torch": lambda file: f"it is a PyTorch pickle, which only PyTorch reads: torch-gpt import {file} --out DIR",
    "pickle": "it is a pickle, which may run code when read: save the state_dict with torch.save or as safetensors",
    "tar": "it is a tar archive: unpack it first",
    "zip": "it is a zip archive: unpack it first",
    "zeros": "it starts with zeros, like an interrupted copy: copy or download it again",
    "text": lambda file: f"it is a text that starts with {_start(file)!r}: {GIVE}",
    **{tool: f"it is compressed by {tool}: unpack it first" for tool in ("gzip", "xz", "bzip2", "zstandard", "7-Zip")},
}
"""Kind -> the message for such a file where another kind was expected."""


def kind_of_file(file: Path) -> str:
    """The key in WORDS of a file's kind; "" if its start is not recognised or it cannot be read."""
    head = _head(file)
    if head is None:
        return ""
    for kind, pattern in MAGIC.items():
        if re.match(pattern, head, re.DOTALL):
            return kind
    text = head.decode("utf-8", "ignore")  # the last character may be cut
    if len(head) - len(text.encode()) < 4 and re.fullmatch(r"[^\0-\x08\x0e-\x1f\x7f]+", text):
        return "text"
    return "" if head else "empty"


def foreign(file: Path, *own: str, fix: str = GIVE) -> str:
    """The message for a file of another kind than its reader's `own`; "" if the kind is not recognised.

    fix: the advice where the kind's message has none; the default is for importing weights.
    """
    kind = kind_of_file(file)
    words = "" if kind in own else WORDS.get(kind, "")
    return (words if isinstance(words, str) else words(file)).replace(GIVE, fix)


def _head(file: Path) -> bytes | None:
    with suppress(OSError):
        check_regular(file)
        with file.open("rb", buffering=0) as f:
            return f.read(HEAD)
    return None


def _start(file: Path) -> str:
    words = (_head(file) or b"").decode("utf-8", "ignore").split()
    return " ".join(words)[:30]

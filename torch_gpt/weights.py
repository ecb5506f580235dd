"""Importing a GPT-2 from PyTorch's own files, which only PyTorch reads: the book's, nanoGPT's, transformers'."""

import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from numpy_gpt.errors import InputError
from numpy_gpt.io.formats import foreign, kind_of_file
from numpy_gpt.io.paths import is_file, kind_of
from numpy_gpt.typing import Array
from numpy_gpt.weights.source import Source, open_source, source_of
from numpy_gpt.weights.stored import Stored

INSIDE = ("model_state_dict", "state_dict", "model")
"""Keys of the parameters in a file with other entries: the book's, the usual one, nanoGPT's."""

DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8} | {
    torch.int8, torch.int16, torch.int32, torch.int64
}  # fmt: skip
"""Dtypes of tensors that can be converted to NumPy."""

DIRECTORY = 0x10
"""The bit of a zip member's external attributes that marks it as a folder, without content."""

LEAST, TIMES_THE_FILE = 2 << 20, 2.5
"""Bytes that a file's tensors may always take, and multiple of its size otherwise: layers may share numbers."""


def read_pth(file: Path, n_heads: int | None = None) -> Source:
    """Read the GPT-2 in a file that torch.save wrote, with PyTorch's restricted unpickler: data, not code.

    Shapes do not give the number of heads: it is n_heads, else that in config.json or nanoGPT's model_args, else one
    per 64 features if the width is one of GPT-2's. Raises InputError for a file that is damaged, has code in it, or is
    not a GPT-2.
    """
    kind = kind_of(file)
    if kind == "folder":
        pickled = file / "pytorch_model.bin"
        example = f", for example {pickled}" if is_file(pickled) else ""
        raise InputError(
            f"{file} is a folder: give a file that torch.save wrote{example}; for OpenAI's folder, or one of "
            "Hugging Face's safetensors, use numpy-gpt import"
        )
    if kind in ("pipe", "other"):
        raise InputError(f"{file} is a pipe or a device, which cannot be read twice: give a file that torch.save wrote")
    if kind_of_file(file) == "safetensors":
        return open_source(file, n_heads)
    _check_archive(file)
    try:
        # by name, torch would read a pickle called .safetensors as safetensors
        with file.open("rb") if file.suffix == ".safetensors" else nullcontext(file) as f:
            content = torch.load(f, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: give a file that torch.save wrote") from error
    except Exception as error:  # the unpickler's exceptions are not documented
        if words := foreign(file, "torch"):
            raise InputError(f"{file} cannot be read as PyTorch weights: {words}") from error
        raise InputError(
            f"{file} cannot be read as PyTorch weights ({type(error).__name__}): it is damaged, or "
            "holds more than data: save only the state_dict, torch.save(model.state_dict(), FILE)"
        ) from error
    more = content if isinstance(content, dict) else {}
    inside = next((more[key] for key in INSIDE if isinstance(more.get(key), dict)), more)
    found = {str(name): _stored(str(name), tensor) for name, tensor in inside.items() if isinstance(tensor, Tensor)}
    _check_sharing(file, (tensor for tensor in inside.values() if isinstance(tensor, Tensor)))
    if not found:
        raise InputError(f"{file} has no state_dict: save one with torch.save(model.state_dict(), FILE)")
    args = more.get("model_args")  # nanoGPT's
    n_heads = n_heads or (args.get("n_head") if isinstance(args, dict) else None)
    return source_of(file, found, n_heads, nanogpt=isinstance(args, dict))


def _stored(name: str, tensor: Tensor) -> Stored:
    """A tensor as a Stored; bfloat16, which NumPy lacks, is widened.

    A tensor that NumPy cannot represent (sparse, without numbers, quantised, 8-bit float) has dtype void, and only its
    `read` raises InputError, since it may not be needed.
    """
    wrong = _wrong(tensor)
    shape = () if tensor.is_nested else tuple(tensor.shape)  # a nested one has no shape
    if wrong:
        return Stored(shape, np.dtype(np.void), partial(_refuse, name, wrong))
    wide = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
    return Stored(shape, torch.empty(0, dtype=wide).numpy().dtype, partial(_numbers, tensor, wide))


def _wrong(tensor: Tensor) -> str | None:
    """Why NumPy cannot represent a tensor: its kind, or an expanded view with more numbers than the file has."""
    kind = f"{tensor.dtype}, {tensor.layout}"
    if tensor.is_meta:
        return f"{kind}, without numbers, which NumPy lacks"
    if tensor.is_nested:
        return f"{kind}, nested, which NumPy lacks"
    if tensor.layout != torch.strided or tensor.dtype not in DTYPES:
        return f"{kind}, which NumPy lacks"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded to {tensor.numel():,} numbers, but the file has fewer"
    return None


def _numbers(tensor: Tensor, dtype: torch.dtype) -> Array:
    """A copy of the tensor's numbers, with lazy negation applied."""
    array: Array = tensor.detach().resolve_neg().to(dtype, copy=True).numpy()
    return array


def _refuse(name: str, wrong: str) -> Array:
    raise InputError(f"{name} is {wrong}: save the model again as plain float32 tensors")


def _check_archive(file: Path) -> None:
    """Raise InputError if the members of torch.save's archive claim more bytes than the file can have.

    Other faults, and files that are not archives, are left to torch.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
        size = file.stat().st_size
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile):  # RuntimeError: encrypted, or a newer format
        return
    if not any(member.filename.lower().endswith("data.pkl") for member in members):
        return  # another program's archive
    if any(member.external_attr & DIRECTORY for member in members):
        raise InputError(
            f"{file} has members marked as folders, for which PyTorch would return uninitialised memory: "
            "it is damaged: save the model again with torch.save"
        )
    stored = [member for member in members if member.compress_type == zipfile.ZIP_STORED]
    consistent = all(member.file_size == member.compress_size for member in stored)
    if not consistent or sum(member.file_size for member in members) > max(LEAST, TIMES_THE_FILE * size):
        raise InputError(
            f"{file} has members that claim to be larger than the file ({size:,} bytes), so it is damaged: "
            "save the model again with torch.save"
        )


def _check_sharing(file: Path, tensors: Iterable[Tensor]) -> None:
    """Raise InputError if tensors that share numbers are together much larger than the file."""
    plain = [tensor for tensor in tensors if _wrong(tensor) is None]
    asked = sum(tensor.numel() * tensor.element_size() for tensor in plain)
    if asked > max(LEAST, TIMES_THE_FILE * file.stat().st_size):
        raise InputError(
            f"{file} has tensors of {asked:,} bytes that share numbers in a file of {file.stat().st_size:,}: "
            "save them apart, torch.save({name: t.clone() for name, t in model.state_dict().items()}, FILE)"
        )

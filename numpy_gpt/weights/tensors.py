"""Safetensors files: data, never code. Read tensor by tensor, written atomically, with checksums inside.

The layout (https://github.com/huggingface/safetensors): the header's length in 8 bytes; the JSON header, with every
tensor's dtype, shape and offsets, and free metadata; the numbers, without gaps. The library validates headers and
writes files. The checksums are ours and are part of the metadata, where other readers ignore them: CRC32 is a JSON
object of each tensor's CRC-32, SHA256 the hash of the rest of the header.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import json_memory, parse_json
from numpy_gpt.io.files import replacing
from numpy_gpt.io.formats import foreign
from numpy_gpt.io.paths import check_regular
from numpy_gpt.typing import Array, Weights
from numpy_gpt.weights.stored import Stored

DTYPES: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "BF16": np.float32,  # NumPy lacks it: widened, which is exact
}
"""The format's name of a dtype -> the NumPy dtype it is read as."""

NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items() if name != "BF16"}

CRC32, SHA256 = "numpy-gpt.crc32", "numpy-gpt.sha256"

HEADER = 32 << 20
"""Bytes of memory that a header may take, or the size of its file if larger.

A training state has two tensors per parameter: with 300 layers its header takes 23 MiB.
"""

FIX = "it is damaged or another format: put an undamaged copy in its place"


def read_tensors(file: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Read the metadata and the tensors of a safetensors file; of the file, only the header is read.

    Checksums are verified if the file has them (then the metadata has SHA256): the header's here, the tensors' as they
    are read. Raises InputError if the file cannot be read, is damaged, or has a dtype that NumPy lacks.
    """
    from safetensors import SafetensorError, safe_open  # here, so that `import numpy_gpt` stays light

    try:
        stat, text, room = _header(file)
        with safe_open(file, framework="numpy") as checked:  # rejects inconsistent, overlapping or overflowing headers
            checked.keys()
        header = json.loads(text)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        words = foreign(file, "safetensors", fix="give a safetensors file, or put an undamaged copy in its place")
        why = f": {words}" if words else f" ({error}): {FIX}"
        raise InputError(f"{file} cannot be read as a safetensors file{why}") from error
    metadata: dict[str, str] = header.pop("__metadata__", None) or {}
    seal = metadata.pop(SHA256, None)
    if seal is not None and seal != _sha256(metadata, {name: (e["dtype"], e["shape"]) for name, e in header.items()}):
        raise InputError(f"the header of {file} has changed since it was written (its SHA-256 differs): {FIX}")
    checksums = _checksums(file, metadata.pop(CRC32, ""), header, room) if seal is not None else {}
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{file}: {name} is {entry['dtype']}, which NumPy lacks: convert it to F32 first")
        shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
        start = 8 + len(text) + entry["data_offsets"][0]
        read = partial(_read, file, stat, name, entry["dtype"], shape, start, checksums.get(name))
        tensors[name] = Stored(shape, dtype, read)
    return metadata | ({} if seal is None else {SHA256: seal}), tensors


def write_tensors(file: Path, tensors: Weights, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its checksums atomically: readers see the old file or the new.

    Raises OSError if it cannot be written, ValueError for a dtype or name that the format lacks, and InputError for so
    many tensors, or so much metadata, that `read_tensors` would refuse the header.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # the writer copies raw memory: a transposed view would be stored scrambled
    arrays = {name: np.asarray(a, order="C") for name, a in tensors.items()}
    with replacing(file) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # by the user's umask; the library makes files private
        try:
            save_file(arrays, beside, seal(arrays, metadata))
        except SafetensorError as error:  # how the library reports a full disk
            code = re.search(r"\(os error (\d+)\)", str(error))
            raise (OSError(int(code[1]), os.strerror(int(code[1]))) if code else OSError(str(error))) from error
        beside.chmod(mode)
        try:
            _header(beside)
        except ValueError as error:
            raise InputError(
                f"{file} is not written, since it could not be read again ({error}): it has {len(tensors):,} tensors; "
                "merge them into fewer, larger ones"
            ) from error


def seal(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with the checksums of these tensors and of itself. Raises InputError for unusable metadata."""
    for key, value in metadata.items():
        try:
            (key + value).encode()
            usable = key not in (CRC32, SHA256)
        except (TypeError, UnicodeEncodeError):
            usable = False
        if not usable:
            raise InputError(f"{key!r}: {value!r} cannot be stored as metadata: give strings that are valid Unicode")
    for name, array in tensors.items():
        if name == "__metadata__" or array.dtype not in NAMES:
            raise ValueError(f"a safetensors file cannot hold {name!r} as {array.dtype}")
    with_crcs = {**metadata, CRC32: json.dumps({name: _crc32(array) for name, array in tensors.items()})}
    header = {name: (NAMES[array.dtype], list(array.shape)) for name, array in tensors.items()}
    return with_crcs | {SHA256: _sha256(with_crcs, header)}


def _sha256(metadata: Mapping[str, str], header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([metadata, header], sort_keys=True).encode()).hexdigest()


def _header(file: Path) -> tuple[os.stat_result, bytes, int]:
    """The file's stat, its header, and the bytes of memory the header may take. Raises ValueError if it needs more."""
    check_regular(file)
    with file.open("rb") as f:
        stat = os.fstat(f.fileno())
        length = int.from_bytes(f.read(8), "little")
        if length > stat.st_size - 8:
            raise ValueError(f"its header of {length:,} bytes would not fit in its {stat.st_size:,}")
        room = max(HEADER, stat.st_size)
        if 4 * length > room:
            raise ValueError(f"its header takes {length:,} of its {stat.st_size:,} bytes")
        text = f.read(length)
    if (most := json_memory(text)) > room:  # before any parsing, the library's included
        raise ValueError(f"its header may become {most:,} bytes in memory, more than the {room:,} allowed")
    return stat, text, room


def _checksums(file: Path, text: str, header: Mapping[str, Any], room: int) -> dict[str, int]:
    """Each tensor's CRC-32 from the metadata. Raises InputError unless every tensor has one."""
    try:
        checksums = parse_json(text.encode(), room)
    except (ValueError, RecursionError):
        checksums = None
    complete = isinstance(checksums, dict) and checksums.keys() == header.keys()
    if not complete or not all(type(crc) is int for crc in checksums.values()):
        raise InputError(f"{file} has a checksum of its header but not of every tensor: {FIX}")
    return dict(checksums)


def _crc32(array: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _read(
    file: Path, stat: os.stat_result, name: str, kind: str, shape: tuple[int, ...], start: int, checksum: int | None
) -> Array:
    """Read and verify a tensor. Raises InputError if the file has changed since its header was read."""
    on_disk = np.dtype(np.uint16 if kind == "BF16" else DTYPES[kind]).newbyteorder("<")
    count = int(np.prod(shape, dtype=object))
    try:
        with file.open("rb") as f:
            now = os.fstat(f.fileno())
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (stat.st_ino, stat.st_size, stat.st_mtime_ns):
                raise InputError(f"{file} was replaced while it was being read: try again")
            f.seek(start)
            array = np.fromfile(f, on_disk, count)
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}): try again") from error
    if len(array) != count:
        raise InputError(f"{file} was cut short while it was being read: try again")
    if checksum is not None and _crc32(array) != checksum:
        raise InputError(f"{file} is damaged: the checksum of {name} is wrong: {FIX}")
    if kind == "BF16":  # the upper half of a float32
        wide = array.astype(np.uint32)
        wide <<= 16
        array = wide.view(np.float32)
    return array.astype(DTYPES[kind], copy=False).reshape(shape)

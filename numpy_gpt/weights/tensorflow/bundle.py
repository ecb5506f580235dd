"""TensorFlow's tensor bundles, the format of OpenAI's GPT-2, read with NumPy alone.

A bundle model.ckpt is model.ckpt.index and its shards, here just model.ckpt.data-00000-of-00001. The index is a sorted
table (table.py) whose values are protocol buffers (protobuf.py): under the key "" a BundleHeaderProto, under each
tensor's name its BundleEntryProto, with the shard and offset of its numbers, row by row and without gaps. A tensor
saved in slices has them under keys that start with a zero byte.

Sources: tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/framework/{types,tensor_shape,versions}.proto and
tensorflow/core/util/tensor_bundle/; the encoding of protocol buffers: protobuf.dev/programming-guides/encoding.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial
from glob import escape
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.io.formats import foreign
from numpy_gpt.typing import Array
from numpy_gpt.weights.stored import Stored
from numpy_gpt.weights.tensorflow.crc32c import crc32c, unmask
from numpy_gpt.weights.tensorflow.protobuf import BYTES, FIXED32, VARINT, UnreadableError, fields
from numpy_gpt.weights.tensorflow.table import read_table

BOOL, BFLOAT16 = 10, 14
REAL = {1: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 9: "i8", 17: "u2", 19: "f2", 22: "u4", 23: "u8"}
COMPLEX = {8: "c8", 18: "c16"}
IN_FILE = REAL | COMPLEX | {BOOL: "u1", BFLOAT16: "u2"}
"""TensorFlow's DataType -> NumPy dtype in the file. A bfloat16 is the upper half of a float32."""
AS_READ = REAL | COMPLEX | {BOOL: "?", BFLOAT16: "f4"}
"""TensorFlow's DataType -> NumPy dtype of the array returned."""

Order: TypeAlias = Literal["<", ">"]
"""Byte order of numbers: the lowest or the highest byte first."""

MAX_DIMS = 64
"""NumPy's limit."""

ENTRIES = 4 << 20
"""Bytes of memory that any index's entries may take, however short its files."""

ENTRY_BYTES = 1024
"""Most bytes that an entry and its `Stored` take in memory, besides the name and the axes."""

HEADER = {1: VARINT, 2: VARINT, 3: BYTES}  # num_shards, endianness, version
VERSION = {2: VARINT}  # min_consumer
ENTRY = {1: VARINT, 2: BYTES, 3: VARINT, 4: VARINT, 5: VARINT, 6: FIXED32, 7: BYTES}
SHAPE = {2: BYTES, 3: VARINT}  # dim, unknown_rank
DIM = {1: VARINT}  # size


class Entry(NamedTuple):
    """A tensor's BundleEntryProto, and its key, the name."""

    name: str
    kind: int
    """Its DataType."""
    shape: tuple[int, ...]
    shard: int
    offset: int
    """Offset and size are in bytes of the shard's file."""
    size: int
    masked_crc: int
    in_slices: bool


def read_bundle(prefix: Path) -> dict[str, Stored]:
    """The tensors of the bundle with this prefix (models/124M/model.ckpt), in the order of their names.

    bfloat16 is widened to float32. A tensor that was saved in slices or has a dtype NumPy lacks (given as void) does
    not affect the others: only its `read` raises InputError. Raises InputError, naming the file, if the index or a
    shard is missing or damaged; `read` does if the tensor's numbers are.
    """
    index = Path(f"{prefix}.index")
    if not index.is_file():
        raise InputError(f"{index} does not exist: give the prefix of a checkpoint that TensorFlow has saved")
    try:
        content, room = _content(index, prefix)
        table = read_table(content)
        shards, order = _header(*next(table, (b"", memoryview(b""))))
        entries = list(_within(room, (_entry(key, value) for key, value in table if not key.startswith(b"\0"))))
        files = _files(prefix, shards, entries)
    except (OSError, MemoryError) as error:
        raise InputError(f"{index} cannot be read ({error})") from error
    except UnreadableError as error:
        words = foreign(index, "empty", "text", fix="download it again")
        raise InputError(f"{index} cannot be read: {words}" if words else f"{index} {error}") from error
    return {entry.name: _stored(entry, files[entry.shard], order) for entry in entries}


def _content(index: Path, prefix: Path) -> tuple[bytes, int]:
    """The index, and the bytes of memory its entries may take: the size of the bundle's files, or ENTRIES."""
    size = index.stat().st_size
    shards = sum(shard.stat().st_size for shard in prefix.parent.glob(f"{escape(prefix.name)}.data-*"))
    room = max(ENTRIES, size + shards)
    if size > room // 2:
        raise UnreadableError(f"it has {size:,} bytes, too many for tensors of {shards:,} bytes")
    return index.read_bytes(), room


def _within(room: int, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield the entries. Raises UnreadableError once they would take more than `room` bytes of memory."""
    for entry in entries:
        room -= ENTRY_BYTES + 8 * len(entry.name) + 40 * len(entry.shape)
        if room < 0:
            raise UnreadableError("it names more tensors than its files can hold")
        yield entry


def _header(key: bytes, header: memoryview) -> tuple[int, Order]:
    """The number of shards, and their byte order."""
    found = dict(fields(header, HEADER)) if not key else {}
    if found.get(1, 0) < 1 or found.get(2, 0) > 1:
        raise UnreadableError("it has no header of a tensor bundle")
    version = dict(fields(found.get(3, header[:0]), VERSION))
    if version.get(2, 0) > 1:
        raise UnreadableError("it requires a newer reader", "save it again with TensorFlow's Saver, version 2")
    return found[1], ">" if found.get(2) else "<"


def _entry(key: bytes, value: memoryview) -> Entry:
    """Parse a tensor's entry. If its dtype is known and it is not in slices, its shape must match its size."""
    try:
        name = key.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"its key {key[:99]!r} is not UTF-8") from error
    found = dict(fields(value, ENTRY))
    kind, shard, offset, size, crc = (found.get(number, 0) for number in (1, 3, 4, 5, 6))
    entry = Entry(name, kind, _shape(name, found.get(2, value[:0])), shard, offset, size, crc, in_slices=7 in found)
    if kind in IN_FILE and not entry.in_slices:
        itemsize = np.dtype(IN_FILE[kind]).itemsize
        if entry.size != math.prod(entry.shape) * itemsize:
            raise UnreadableError(f"{name} of shape {entry.shape}, {itemsize} bytes per number, has {entry.size} bytes")
    return entry


def _shape(name: str, message: memoryview) -> tuple[int, ...]:
    """Parse a TensorShapeProto. Raises UnreadableError for unknown axes, or ones that NumPy cannot have."""
    dims: list[int] = []
    for number, value in fields(message, SHAPE):
        if number == 2 and len(dims) < MAX_DIMS:
            dims.append(dict(fields(value, DIM)).get(1, 0))
        elif number == 2 or value:
            raise UnreadableError(f"{name} has more than {MAX_DIMS} axes, or an unknown number")
    # even with an axis of length 0, NumPy multiplies the others (and up to 16 bytes per number)
    if math.prod(filter(None, dims)) >= 1 << 59:
        raise UnreadableError(f"the axes of {name} are too long")
    return tuple(dims)


def _files(prefix: Path, shards: int, entries: Iterable[Entry]) -> dict[int, Path]:
    """The files of the shards in use, after checking that every tensor lies within one and none overlap."""
    files: dict[int, Path] = {}
    end = room = 0
    for entry in sorted(entries, key=lambda entry: (entry.shard, entry.offset, entry.size)):
        if entry.shard >= shards:
            raise UnreadableError(f"{entry.name} is in shard {entry.shard} of {shards}")
        if entry.shard not in files:
            file = files[entry.shard] = Path(f"{prefix}.data-{entry.shard:05d}-of-{shards:05d}")
            if not file.is_file():
                raise InputError(f"{file} does not exist, but {prefix}.index needs it: download it as well")
            end, room = 0, file.stat().st_size
        if entry.offset < end:
            raise UnreadableError(f"{entry.name} overlaps another tensor")
        end = entry.offset + entry.size
        if end > room:
            why = foreign(file, fix="download it again") or "download it again"
            raise InputError(f"{file} has {room} bytes, but {entry.name} would end at {end}: {why}")
    return files


def _stored(entry: Entry, file: Path, order: Order) -> Stored:
    if entry.kind not in AS_READ:
        why = f"has TensorFlow's dtype {entry.kind}, which NumPy lacks"
        return Stored(entry.shape, np.dtype(np.void), partial(_refuse, entry, file, why))
    dtype = np.dtype(AS_READ[entry.kind])
    if entry.in_slices:
        return Stored(entry.shape, dtype, partial(_refuse, entry, file, "is saved in slices"))
    return Stored(entry.shape, dtype, partial(_read, entry, file, order))


def _refuse(entry: Entry, file: Path, why: str) -> Array:
    raise InputError(f"{file}: {entry.name} {why}: save the model again without that")


def _read(entry: Entry, file: Path, order: Order) -> Array:
    """Read one tensor's numbers and verify their checksum."""
    try:
        with file.open("rb") as f:
            f.seek(entry.offset)
            octets = np.fromfile(f, np.uint8, entry.size)
    except (OSError, MemoryError) as error:
        raise InputError(f"{entry.name} cannot be read from {file} ({error})") from error
    if octets.size < entry.size or crc32c(octets) != unmask(entry.masked_crc):
        raise InputError(f"{file} is damaged: the checksum of {entry.name} is wrong: download it again")
    stored = np.dtype(IN_FILE[entry.kind])
    raw = octets.view(stored.newbyteorder(order))
    if entry.kind == BFLOAT16:
        wide = raw.astype(np.uint32)
        wide <<= 16  # in place: peaks at three times the tensor's bytes, not five
        return wide.view(np.float32).reshape(entry.shape)
    numbers: Array = raw != 0 if entry.kind == BOOL else raw.astype(stored, copy=False)
    return numbers.reshape(entry.shape)

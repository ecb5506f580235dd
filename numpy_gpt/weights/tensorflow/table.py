"""LevelDB's sorted tables of keys and values, the container of TensorFlow's checkpoint index.

    file    = block … block, metaindex block, index block, footer of 48 bytes
    footer  = handle of the metaindex block, handle of the index block, zeros up to 40 bytes, MAGIC in 8 bytes
    handle  = offset, size, both varints (protobuf.py); a block's trailer is not part of its size
    block   = entry … entry, restarts of 4 bytes each, their number in 4 bytes
    trailer = compression in a byte (0: none), the masked CRC-32C of the block and that byte
    entry   = three varints (bytes shared with the key before, bytes of key that follow, bytes of value), key, value

The index block's values are the handles of the data blocks, in the order of their keys. A key is written in full at
every restart, for binary search, which a full read does not need. All other integers are little-endian.

Source: doc/table_format.md of github.com/google/leveldb, and tensorflow/core/lib/io/format.h.
"""

from collections.abc import Iterator

from numpy_gpt.weights.tensorflow.crc32c import crc32c, unmask
from numpy_gpt.weights.tensorflow.protobuf import UnreadableError, varint

MAGIC = 0xDB4775248B80FB57
FOOTER = 48
TRAILER = 5
SNAPPY = 1

RESTART_INTERVAL = 16
"""TensorFlow writes every 16th key in full, so all keys together have at most 16 times the bytes they do not share.

Without this limit, keys that each extend the one before by a byte would take time and memory quadratic in their number.
"""


def read_table(file: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The keys and values of a table, in key order. Raises UnreadableError for any unusable bytes."""
    if len(file) < FOOTER or int.from_bytes(file[-8:], "little") != MAGIC:
        raise UnreadableError("it does not end like TensorFlow's index files")
    blocks, footer = memoryview(file)[:-FOOTER], memoryview(file)[-FOOTER:-8]
    metaindex, at = _handle(footer, 0)
    index, _ = _handle(footer, at)
    _block(blocks, *metaindex)  # unused, but its checksum is verified
    end = 0
    previous: bytes | None = None
    for _, value in _entries(_block(blocks, *index)):
        (offset, size), _ = _handle(value, 0)
        if offset < end:  # else an index could name one block again and again
            raise UnreadableError(f"its block at {offset} overlaps the previous one")
        end = offset + size + TRAILER
        for key, content in _entries(_block(blocks, offset, size)):
            if previous is not None and key <= previous:
                raise UnreadableError(f"its key {key[:99]!r} is repeated or out of order")
            yield key, content
            previous = key


def _handle(buffer: memoryview, at: int) -> tuple[tuple[int, int], int]:
    """A block's offset and size in bytes, and the end of the handle."""
    offset, at = varint(buffer, at)
    size, at = varint(buffer, at)
    return (offset, size), at


def _block(blocks: memoryview, offset: int, size: int) -> memoryview:
    """A block's entries, without its restarts, after checking its checksum and that it is not compressed."""
    block = blocks[offset : offset + size + TRAILER]
    if len(block) < size + TRAILER:
        raise UnreadableError(f"its block at {offset} of {size} bytes reaches beyond its end")
    if crc32c(block[:-4]) != unmask(int.from_bytes(block[-4:], "little")):
        raise UnreadableError(f"the checksum of its block at {offset} is wrong")
    if block[size] == SNAPPY:
        raise UnreadableError(
            "it is compressed with Snappy", "save it again with TensorFlow's Saver, which does not compress"
        )
    if block[size]:
        raise UnreadableError(f"its block at {offset} is compressed in an unknown way ({block[size]})")
    restarts = int.from_bytes(block[max(size - 4, 0) : size], "little")
    if not 1 <= restarts <= size // 4 - 1:
        raise UnreadableError(f"its block at {offset} of {size} bytes cannot have {restarts} restarts")
    return block[: size - 4 * (restarts + 1)]


def _entries(block: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """The keys and values of a block without its restarts, each key completed with its shared prefix."""
    key, at = b"", 0
    in_full = unshared = 0  # bytes of the keys so far
    while at < len(block):
        shared, at = varint(block, at)
        own, at = varint(block, at)
        size, at = varint(block, at)
        if shared > len(key):
            raise UnreadableError(f"a key shares {shared} bytes with one of {len(key)}")
        if own + size > len(block) - at:
            raise UnreadableError(f"an entry of {own + size} bytes reaches beyond its block")
        in_full, unshared = in_full + shared + own, unshared + own
        if in_full > RESTART_INTERVAL * unshared:
            raise UnreadableError("its keys share more than TensorFlow's do")
        key = key[:shared] + block[at : at + own]
        yield key, block[at + own : at + own + size]
        at += own + size

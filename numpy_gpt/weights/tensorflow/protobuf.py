"""The part of protocol buffers that TensorFlow's checkpoints need, without a schema or a library.

    message = field … field
    field   = varint 8 * number + wire type, then the value: a varint, 8 or 4 bytes, or a varint and so many bytes
    varint  = seven bits per byte, the lowest first; the top bit is set in all bytes but the last

Fields that are 0 or empty are left out; if a field is repeated, the last one counts. An inner message is the bytes of
a field, which the caller parses: nothing here recurses.

Source: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator, Mapping
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class UnreadableError(ValueError):
    """Why a file cannot be read, and the fix: the rest of a sentence that starts with the file's name."""

    def __init__(self, why: str, fix: str = "it is damaged, download it again"):
        super().__init__(f"cannot be read ({why}): {fix}")


def varint(buffer: memoryview, at: int) -> tuple[int, int]:
    """The varint that starts at `at`, and its end. Raises UnreadableError if it is truncated, or 2^63 or more.

    Negative 64-bit numbers are stored with 2^64 added; none is valid here.
    """
    value = 0
    for k, octet in enumerate(buffer[at : at + 10]):
        value |= (octet & 0x7F) << 7 * k
        if octet < 0x80:
            if value >= 1 << 63:
                raise UnreadableError("a number is negative or 2^63 or more")
            return value, at + k + 1
    raise UnreadableError("a number is cut short or too long")


def fields(message: memoryview, wanted: Mapping[int, int]) -> Iterator[tuple[int, Any]]:
    """The wanted fields of a protocol buffer, in file order: number, and an int or the bytes of a BYTES field.

    wanted: number of the field -> its wire type. Others are skipped, since newer writers may add fields.
    """
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        number, written = tag >> 3, tag & 7
        value: int | memoryview
        if written == VARINT:
            value, at = varint(message, at)
        else:
            if written == BYTES:
                size, at = varint(message, at)
            elif written in (FIXED32, FIXED64):
                size = 4 if written == FIXED32 else 8
            else:
                raise UnreadableError(f"a field is written in an unknown way ({written})")
            value = message[at : at + size]
            if len(value) < size:
                raise UnreadableError("a field reaches beyond its end")
            at += size
            if written != BYTES:
                value = int.from_bytes(value, "little")
        if number in wanted:
            if written != wanted[number]:
                raise UnreadableError(f"field {number} is written in another way ({written})")
            yield number, value

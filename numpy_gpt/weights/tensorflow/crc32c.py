"""CRC-32C, the checksum of TensorFlow's checkpoints, in NumPy: as many bytes a second as table lookups allow.

A CRC reads its data as a polynomial over GF(2), the first bit the highest power, and is the remainder of its division
by P = x^32 + x^28 + … + 1, Castagnoli's polynomial (0x82F63B78: its coefficients below x^32, with that of x^31 in the
lowest bit, and so here all registers). Appending a zero bit multiplies by x: the register moves down by one, and P is
added if x^32 came up. So, with + for exclusive or, all that is needed is linear:

    Z_n r       = r x^(32 n) mod P                  the register r after n further words of zeros
    p(w)        = w, for one word of 32 bits
    p(a then b) = Z_|b| p(a) + p(b)                 |b| words in b
    register    = Z_1 p(data)

a and b need not be joined word by word. Two rows of n words are joined column by column, left column i with right
column i: each pair is n words apart, so one operator Z_n serves all of them. The row that this leaves is joined with
the next in the same way, and last with itself, its left half with its right half, down to one word. Zeros in front of
a register of 0 change nothing, so a short left row is joined with the end of the right one; the register that a CRC
starts from is added to the first word. An operator is a 32 × 32 matrix of bits, held as what it makes of each byte at
each of the four places in a register (Sarwate's table, four times); Z_2n is Z_n applied to its own tables.

Sources: RFC 3720, section 12.1 (the polynomial, the order of the bits, and the complement at both ends); M. Adler's
crc32_combine in zlib (appending zeros by squaring).
"""

from functools import cache
from typing import TypeVar

import numpy as np

from numpy_gpt.typing import Array

POLYNOMIAL = 0x82F63B78

WORD = np.dtype("<u4")
"""Four bytes of data as they stand in a register: the first of them lowest, whatever the machine's own order."""

ROW = 1 << 14
"""Words joined at once (64 KiB, 400 KB with the lookups' scratch): fewer cost more calls, more are no faster."""

Register = TypeVar("Register", int, Array)


def crc32c(data: bytes | memoryview | Array, crc: int = 0) -> int:
    """The CRC-32C of the bytes of data (any buffer without gaps), or of an earlier piece with this crc and data."""
    register = crc ^ 0xFFFFFFFF
    octets = np.frombuffer(data, np.uint8)
    odd = octets.size % WORD.itemsize
    for octet in octets[:odd].tolist():  # so that what is left is whole words, and may be any number of them
        register = _zero_bits(register ^ octet, 8)
    words = octets[odd:].view(WORD)
    if words.size:
        first = words.size % ROW or ROW
        row = words[:first].copy()
        row[0] ^= register
        for at in range(first, words.size, ROW):
            row = _joined(row, words[at : at + ROW])
        while row.size > 1:
            half = 1 << ((row.size - 1).bit_length() - 1)  # the largest power of two that leaves something to its left
            row = _joined(row[:-half], row[-half:])
        register = int(_advanced(row, _zero_words(1))[0])
    return register ^ 0xFFFFFFFF


def unmask(masked: int) -> int:
    """The CRC that TensorFlow stored as masked: turned right by 15 bits, and 0xa282ead8 added.

    It does so because a CRC over data that holds its own CRC checks little (tensorflow/core/lib/hash/crc32c.h).
    """
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def _joined(left: Array, right: Array) -> Array:
    """p of each column: left (at most n,) words, right (n,), n a power of two -> (n,), a new array."""
    joined = right.copy()
    joined[right.size - left.size :] ^= _advanced(left, _zero_words(right.size))
    return joined


def _advanced(registers: Array, operator: Array) -> Array:
    """Each of registers (n,) after the zeros of the operator (4, 256) -> (n,)."""
    places = registers.view(np.uint8).reshape(-1, 4)
    advanced: Array = operator[0].take(places[:, 0])
    for k in range(1, 4):
        advanced ^= operator[k].take(places[:, k])
    return advanced


@cache
def _zero_words(count: int) -> Array:
    """Z_count for a power of two (4, 256): entry [k, b] is what it makes of the byte b at place k."""
    if count > 1:
        half = _zero_words(count // 2)
        return _advanced(half.reshape(-1), half).reshape(half.shape)
    octets, places = np.arange(256, dtype=WORD), np.arange(4, dtype=WORD)
    return _zero_bits(octets << 8 * places[:, None], 32)


def _zero_bits(register: Register, count: int) -> Register:
    """The register, or each of an array of them, after so many zero bits: the definition, a bit at a time."""
    for _ in range(count):
        register = register >> 1 ^ (register & 1) * POLYNOMIAL
    return register

"""CRC-32C, the checksum of TensorFlow's checkpoints, in NumPy, as fast as table lookups allow.

A CRC reads its data as a polynomial over GF(2), the first bit being the highest power, and is its remainder modulo
Castagnoli's polynomial P = x^32 + x^28 + … + 1. P is written 0x82F63B78: its coefficients below x^32, that of x^31 in
the lowest bit, as in all registers here. Appending a zero bit multiplies by x: the register shifts down by one, and P
is added if x^32 appears. So, with + for exclusive or, every step is linear:

    Z_n r       = r x^(32 n) mod P                  the register r after n further words of zeros
    p(w)        = w, for one word of 32 bits
    p(a then b) = Z_|b| p(a) + p(b)                 |b| words in b
    register    = Z_1 p(data)

a and b need not be joined word by word. Two rows of n words are joined column by column, left column i with right
column i: each pair is n words apart, so one operator Z_n serves them all. The result is joined with the next row in
the same way; the last row is halved, its left half joined with its right, down to one word. Leading zeros leave a
register of 0 unchanged, so a short left row is joined with the end of the right one; a CRC's initial register is added
to the first word. An operator is a 32 × 32 matrix of bits, stored as its result for each byte at each of the four
places in a register (Sarwate's table, four times); Z_2n is Z_n applied to its own tables.

Sources: RFC 3720, section 12.1 (the polynomial, the order of the bits, and the complement at both ends); M. Adler's
crc32_combine in zlib (appending zeros by squaring).
"""

from functools import cache
from typing import TypeVar

import numpy as np

from numpy_gpt.typing import Array

POLYNOMIAL = 0x82F63B78

WORD = np.dtype("<u4")
"""Four bytes of data in a register's order: the first byte lowest, whatever the machine's byte order."""

ROW = 1 << 14
"""Words joined at once (64 KiB; 400 KB with the lookups' scratch): fewer need more calls, more are no faster."""

Register = TypeVar("Register", int, Array)


def crc32c(data: bytes | memoryview | Array, crc: int = 0) -> int:
    """The CRC-32C of data (any contiguous buffer), or of an earlier piece, whose CRC is crc, followed by data."""
    register = crc ^ 0xFFFFFFFF
    octets = np.frombuffer(data, np.uint8)
    odd = octets.size % WORD.itemsize
    for octet in octets[:odd].tolist():  # the rest is then full words, of any number
        register = _zero_bits(register ^ octet, 8)
    words = octets[odd:].view(WORD)
    if words.size:
        first = words.size % ROW or ROW
        row = words[:first].copy()
        row[0] ^= register
        for at in range(first, words.size, ROW):
            row = _joined(row, words[at : at + ROW])
        while row.size > 1:
            half = 1 << ((row.size - 1).bit_length() - 1)  # the largest power of two below the size
            row = _joined(row[:-half], row[-half:])
        register = int(_advanced(row, _zero_words(1))[0])
    return register ^ 0xFFFFFFFF


def unmask(masked: int) -> int:
    """The CRC that TensorFlow stored masked: rotated right by 15 bits, plus 0xa282ead8.

    Masking is needed since a CRC over data that contains CRCs checks little (tensorflow/core/lib/hash/crc32c.h).
    """
    turned = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (turned >> 17 | turned << 15) & 0xFFFFFFFF


def _joined(left: Array, right: Array) -> Array:
    """p of each column: left (at most n,) words, right (n,), n a power of two -> (n,), a new array."""
    joined = right.copy()
    joined[right.size - left.size :] ^= _advanced(left, _zero_words(right.size))
    return joined


def _advanced(registers: Array, operator: Array) -> Array:
    """registers (n,) with the zeros of the operator (4, 256) appended -> (n,)."""
    places = registers.view(np.uint8).reshape(-1, 4)
    advanced: Array = operator[0].take(places[:, 0])
    for k in range(1, 4):
        advanced ^= operator[k].take(places[:, k])
    return advanced


@cache
def _zero_words(count: int) -> Array:
    """Z_count (4, 256) for a power of two: entry [k, b] is its result for the byte b at place k."""
    if count > 1:
        half = _zero_words(count // 2)
        return _advanced(half.reshape(-1), half).reshape(half.shape)
    octets, places = np.arange(256, dtype=WORD), np.arange(4, dtype=WORD)
    return _zero_bits(octets << 8 * places[:, None], 32)


def _zero_bits(register: Register, count: int) -> Register:
    """A register, or an array of them, after `count` zero bits: the definition, bit by bit."""
    for _ in range(count):
        register = register >> 1 ^ (register & 1) * POLYNOMIAL
    return register

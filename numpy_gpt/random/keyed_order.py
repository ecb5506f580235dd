"""A pseudo-random order of n items that is computed, not stored: a permutation that needs the memory of its key.

A Feistel network permutes the numbers of 2 b bits: each round exchanges the two halves, after combining one of them (by
xor) with a function of the other and of the round's key, which can be undone whatever the function is. b is the least
with n <= 4^b. Cycle walking makes it a permutation of 0 ... n - 1: a result of n or more is permuted again, until it is
below n. The walk ends, because it follows a cycle that began below n, and takes fewer than four steps on average.

Sources: M. Luby and C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988;
J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", 2002 (cycle walking); G. Steele, D. Lea and C. Flood,
"Fast splittable pseudorandom number generators", 2014 (the mixing function).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from numpy_gpt.random.generator import Generator

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ROUNDS = 6
"""With four, 2.6 pairs of neighbours among 1,000 items stayed neighbours, averaged over 3,000 seeds; with six 2.0, the
average of uniform orders."""


class KeyedOrder:
    """An order of n items: order[i:j] are those at positions i to j - 1, int64, computed at each call.

    seed: a whole number from 0 to 2^63 - 1. The rounds' keys are the first r64 of Generator(seed), which uses the
    seed's low 32 bits, as does torch's generator for the permutation that this replaces.
    """

    def __init__(self, n: int, seed: int):
        self.shape = (n,)
        self.seed = seed
        self._half = np.uint64(max(1, -(-max(n - 1, 0).bit_length() // 2)))  # b
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = Generator(seed).random_uint64(ROUNDS)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, positions: slice) -> Ints:
        items = np.arange(*positions.indices(len(self)), dtype=np.uint64)
        items = self._permuted(items)
        while (beyond := items >= len(self)).any():
            items[beyond] = self._permuted(items[beyond])
        return items.astype(np.int64)

    def _permuted(self, numbers: Words) -> Words:
        """The Feistel network on numbers below 4^b."""
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half | right


def _mixed(words: Words) -> Any:
    """splitmix64's function of 64 bits: each bit of the result depends on all bits of the argument."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))

"""Upper limits of speed: the matrix products alone, on BLAS's own threads; reading the weights at memory speed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.machine import usable_cores
from numpy_gpt import GPTConfig
from numpy_gpt.typing import Array

ROWS = 64
"""Queries in a block of attention: using only keys up to the block's end skips most of the upper triangle."""

Product = tuple[Any, Any, Any]
"""a, b, out of matmul(a, b, out=out)."""


class MatrixProducts:
    """The matrix products of one training step (or forward pass) and nothing else, in np.matmul(out=).

    Forward, dx and dw of qkv (one product), out_proj, ff.0, ff.2 and head, with weights (out, in): x @ w.T, dy @ w and
    dy.T @ x. Attention's two (backward: four) per head, in blocks of ROWS queries over the lower triangle. Each layer
    has separate operands and results, as in the model, so a round starts with none of them in the cache; only the
    layers' scores share buffers. flops counts a multiply-add as two.
    """

    def __init__(self, config: GPTConfig, B: int, T: int, backward: bool = True):
        self._rng = np.random.default_rng(0)
        self.products: list[Product] = []
        self._scores: dict[tuple[int, ...], tuple[Array, Array, Array]] = {}  # p, ds, dp of a block, by shape
        C, N = config.emb_dim, B * T
        for _ in range(config.n_layers):
            for M, K in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
                self._linear(N, M, K, backward)
            self._attention(B * config.n_heads, T, config.head_size, backward)
        self._linear(N, config.vocab_size, C, backward)
        self.flops = sum(2 * out.size * a.shape[-1] for a, _, out in self.products)

    def run(self) -> None:
        for a, b, out in self.products:
            np.matmul(a, b, out=out)

    def in_torch(self) -> Callable[[], None]:
        """The same products on the same arrays in torch.matmul, which may use another BLAS."""
        tensors = [tuple(map(torch.from_numpy, product)) for product in self.products]

        def run() -> None:
            for a, b, out in tensors:
                torch.matmul(a, b, out=out)

        return run

    def _array(self, *shape: int) -> Array:
        return self._rng.standard_normal(shape, np.float32)

    def _linear(self, N: int, M: int, K: int, backward: bool) -> None:
        x, w, y = self._array(N, K), self._array(M, K), np.empty((N, M), np.float32)
        self.products.append((x, w.T, y))
        if backward:
            dy = self._array(N, M)
            self.products += [(dy, w, np.empty_like(x)), (dy.T, x, np.empty_like(w))]

    def _attention(self, heads: int, T: int, HS: int, backward: bool) -> None:
        q, k, v, dy = (self._array(heads, T, HS) for _ in range(4))
        dk, dv = np.empty_like(k), np.empty_like(v)
        for start in range(0, T, ROWS):
            rows, end = slice(start, start + ROWS), min(start + ROWS, T)
            shape = (heads, end - start, end)
            if shape not in self._scores:
                self._scores[shape] = self._array(*shape), self._array(*shape), self._array(*shape)
            p, ds, dp = self._scores[shape]
            keys, values = k[:, :end], v[:, :end]
            self.products += [(q[:, rows], keys.swapaxes(1, 2), ds), (p, values, np.empty_like(q[:, rows]))]
            if backward:
                self.products += [
                    (p.swapaxes(1, 2), dy[:, rows], dv[:, :end]),
                    (dy[:, rows], values.swapaxes(1, 2), dp),
                    (ds, keys, np.empty_like(q[:, rows])),
                    (ds.swapaxes(1, 2), q[:, rows], dk[:, :end]),
                ]


def step_flops(config: GPTConfig, B: int, T: int, backward: bool = True) -> int:
    """By formula: 2 · (12 L C² + V C) per token and pass, plus 4 C per layer, pass and computed pair of query and key.

    Three passes with backward, else one.
    """
    C, L, N = config.emb_dim, config.n_layers, B * T
    pairs = B * sum((min(start + ROWS, T) - start) * min(start + ROWS, T) for start in range(0, T, ROWS))
    return (3 if backward else 1) * (2 * N * (12 * L * C * C + config.vocab_size * C) + 4 * L * C * pairs)


class WeightStream:
    """Reads once all weights that decoding one token needs: linear layers and head, in float32.

    Two ways, each on as many Python threads as there are cores, with BLAS on one thread in each: `products`, a
    matrix-vector product with every weight, and `sums`, np.add.reduce over it. The faster gives the memory's rate.
    """

    def __init__(self, config: GPTConfig):
        C = config.emb_dim
        shapes = config.n_layers * [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] + [(config.vocab_size, C)]
        self.bytes = 4 * sum(M * K for M, K in shapes)
        self._threads = usable_cores()
        self._pool = ThreadPoolExecutor(self._threads)
        weights = [np.ones(shape, np.float32) for shape in shapes]
        self._shares = [[np.array_split(w, self._threads)[i] for w in weights] for i in range(self._threads)]
        self._vectors = {K: np.ones(K, np.float32) for _, K in shapes}

    def products(self, times: int) -> None:
        def read(share: list[Array]) -> None:
            for w in share * times:
                np.dot(w, self._vectors[w.shape[1]])

        self._read(read)

    def sums(self, times: int) -> None:
        def read(share: list[Array]) -> None:
            for w in share * times:
                np.add.reduce(w, axis=None)

        self._read(read)

    def _read(self, read: Callable[[list[Array]], None]) -> None:
        with threadpool_limits(1, user_api="blas"):
            for _ in self._pool.map(read, self._shares):
                pass


class LongArray:
    """An array too large for any cache, summed by all cores together: the memory's peak rate."""

    def __init__(self, gigabytes: float):
        self.bytes = int(gigabytes * 1e9)
        threads = usable_cores()
        self._parts = np.array_split(np.ones(self.bytes // 4, np.float32), threads)
        self._pool = ThreadPoolExecutor(threads)

    def read(self) -> None:
        list(self._pool.map(np.add.reduce, self._parts))

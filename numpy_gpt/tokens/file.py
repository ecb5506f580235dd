"""A file of token ids, read where and when they are needed: a run takes no more memory than its batches.

A memory map would take as little, but if its file is cut short, reading it kills the process (SIGBUS); a read can
report the error.
"""

import io
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.data import window_count
from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import check_regular, refusal
from numpy_gpt.typing import Array


class TokenFile:
    """The ids in a file, one after the other, in a little-endian dtype. len(file) is their number.

    It stays open, so a run continues if the file is replaced or deleted. Raises InputError if it cannot be read, or its
    size is not a multiple of an id's.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]):
        self.path, self.dtype = path, dtype.newbyteorder("<")
        try:
            check_regular(path)
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))  # Windows
            weakref.finalize(self, os.close, handle)
            size = os.fstat(handle).st_size
        except OSError as error:
            raise InputError(refusal(path, error)) from error
        if size % dtype.itemsize:
            raise InputError(
                f"{path} has {size:,} bytes, not a multiple of the {dtype.itemsize} of a token: it is cut short, or "
                "another file"
            )
        self._file = io.FileIO(handle, closefd=False)
        self._count = size // dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, ids: slice) -> Array:
        """The ids of a slice without a step: int64."""
        start, stop, _ = ids.indices(len(self))
        return self.stored(start, max(0, stop - start)).astype(np.int64)

    def stored(self, start: int, count: int) -> Array:
        """`count` ids from number `start` on, in the file's dtype. Raises InputError if the file lacks some of them."""
        ids = np.empty(count, self.dtype)
        left = ids.view(np.uint8).data
        try:
            self._file.seek(start * self.dtype.itemsize)
            while left and (read := self._file.readinto(left)):
                left = left[read:]
        except OSError as error:
            raise InputError(refusal(self.path, error)) from error
        if left:
            raise InputError(f"{self.path} was cut short while it was in use: restore it")
        return ids

    def windows(self, max_length: int, stride: int) -> tuple["FileWindows", "FileWindows"]:
        """The inputs and targets of data.sliding_windows, read when they are used. Raises InputError like it."""
        N = window_count(len(self), max_length, stride)
        return FileWindows(self, N, max_length, stride), FileWindows(self, N, max_length, stride, later=1)


class FileWindows:
    """N windows of T ids, one every `stride` ids, from id number `later` on: see data.Windows."""

    def __init__(self, file: TokenFile, N: int, T: int, stride: int, later: int = 0):
        self.shape = (N, T)
        self._file, self._stride, self._later = file, stride, later

    def __getitem__(self, rows: Array, /) -> Array:
        out = np.empty((len(rows), self.shape[1]), np.int64)
        for window, row in zip(out, rows.tolist(), strict=True):
            window[:] = self._file.stored(row * self._stride + self._later, len(window))
        return out

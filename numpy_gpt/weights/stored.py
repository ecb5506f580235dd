"""A tensor that lies in a file: its shape and dtype are known, its numbers are read when asked for."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from numpy_gpt.typing import Array, Float


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor, and how to read it.

    read gives a new array of this shape and dtype each time, which is the caller's; it raises InputError, naming the
    file and the tensor, if the file is damaged. Files are read, not mapped: a mapped file that something else cuts
    short ends the process with a bus error, which no code can turn into a sentence.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    read: Callable[[], Array]

    def astype(self, dtype: Float) -> "Stored":
        """The same, converted to dtype as it is read."""
        return replace(self, dtype=np.dtype(dtype), read=lambda: self.read().astype(dtype, copy=False))


class Lazy(Mapping[str, Array]):
    """Parameters as a mapping that reads a tensor each time it is looked up, and keeps none."""

    def __init__(self, tensors: Mapping[str, Stored]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

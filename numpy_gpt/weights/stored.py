"""A tensor that lies in a file: its shape and dtype are known, its numbers are read when they are asked for."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.errors import NonFiniteError
from numpy_gpt.typing import Array, Float


@dataclass(frozen=True)
class Stored:
    """What a file's header says of a tensor, and how to read it; np.asarray(stored) reads it too.

    read gives a new array of this shape and dtype each time, which is the caller's; it raises InputError, naming the
    file and the tensor, if the file is damaged. Files are read, not mapped: a mapped file that something else cuts
    short ends the process with a bus error, which no code can turn into a sentence.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def map(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> "Stored":
        """What becomes of it by `change`, which gives this shape."""
        return replace(self, shape=shape, read=lambda: change(self.read()))

    def astype(self, dtype: Float) -> "Stored":
        """The same, converted to dtype as it is read."""
        return replace(self, dtype=np.dtype(dtype), read=lambda: self.read().astype(dtype, copy=False))

    def finite(self, file: Path, name: str) -> "Stored":
        """The same; as it is read, a NaN or an infinity in it is an InputError that names it."""

        def checked(array: Array) -> Array:
            try:
                check_finite(array, name)
            except NonFiniteError as error:
                raise NonFiniteError(f"{file}: {error}: go back to weights from before that") from error
            return array

        return self.map(self.shape, checked)


def check_finite(array: Array, name: str) -> None:
    """Raise NonFiniteError, with the name and the place, if there is a NaN or an infinity in the array."""
    if array.size and not (np.isfinite(array.max()) and np.isfinite(array.min())):  # both tell of a NaN
        at = ", ".join(map(str, np.unravel_index(np.isfinite(array).argmin(), array.shape)))
        raise NonFiniteError(f"{name}[{at}] is NaN or infinite")

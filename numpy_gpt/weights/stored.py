"""A tensor in a file: its shape and dtype are known, its numbers are read on demand."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.errors import NonFiniteError
from numpy_gpt.typing import Array, Float


@dataclass(frozen=True)
class Stored:
    """A tensor's shape, dtype and reader; np.asarray(stored) reads it too.

    Each call of read returns a new array of this shape and dtype, owned by the caller. It raises InputError, naming the
    file and the tensor, if the file is damaged. Files are read, not mapped: if a mapped file is truncated, the process
    dies of a bus error that cannot be caught.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[], Array]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def map(self, shape: tuple[int, ...], change: Callable[[Array], Array]) -> "Stored":
        """The tensor with `change`, which returns this shape, applied as it is read."""
        return replace(self, shape=shape, read=lambda: change(self.read()))

    def astype(self, dtype: Float) -> "Stored":
        """The tensor converted to dtype as it is read."""
        return replace(self, dtype=np.dtype(dtype), read=lambda: self.read().astype(dtype, copy=False))

    def finite(self, file: Path, name: str) -> "Stored":
        """The tensor, whose read raises NonFiniteError, naming it, if it has a NaN or an infinity."""

        def checked(array: Array) -> Array:
            try:
                check_finite(array, name)
            except NonFiniteError as error:
                raise NonFiniteError(f"{file}: {error}: go back to weights from before that") from error
            return array

        return self.map(self.shape, checked)


def check_finite(array: Array, name: str) -> None:
    """Raise NonFiniteError, with the name and the index, if the array has a NaN or an infinity."""
    if array.size and not (np.isfinite(array.max()) and np.isfinite(array.min())):  # a NaN makes both NaN
        at = ", ".join(map(str, np.unravel_index(np.isfinite(array).argmin(), array.shape)))
        raise NonFiniteError(f"{name}[{at}] is NaN or infinite")

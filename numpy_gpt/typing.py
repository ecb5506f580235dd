"""Types shared by the package. Shapes are given in the docstrings: mypy cannot check them."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""An array of either float dtype, or of token ids."""

Params: TypeAlias = dict[str, Array]
"""Parameter (or gradient) name -> array, in the order of the model's state."""

Float: TypeAlias = type[np.float32] | type[np.float64] | np.dtype[Any]
"""The dtypes a model may have."""


class Tensor(Protocol):
    """Anything with a shape and a dtype that np.asarray reads as an array, for example a tensor still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array: ...


Weights: TypeAlias = Mapping[str, Array] | Mapping[str, Tensor]
"""Parameter name -> its array, or the tensor in a file to read it from."""

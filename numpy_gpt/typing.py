"""Type aliases shared by the package. Shapes stand in the docstrings: mypy cannot check them."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
"""An array of either float dtype, or of token ids."""

Params: TypeAlias = dict[str, Array]
"""Parameter (or gradient) name -> array, in the order of the model's state."""

Float: TypeAlias = type[np.float32] | type[np.float64] | np.dtype[Any]
"""The dtypes a model may have."""

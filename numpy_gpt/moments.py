"""What an optimiser's state may hold, whoever computed it."""

from typing import Any

import numpy as np

from numpy_gpt.errors import InputError
from numpy_gpt.typing import Array


def check_state(name: str, array: Array, dtype: np.dtype[Any]) -> None:
    """Raises InputError unless an optimiser can have reached this: t >= 0, finite moments, none of v negative."""
    integer = dtype.kind == "i"
    largest = 1 << 53 if integer else float(np.finfo(dtype).max)  # torch counts its steps in floating point
    least = 0 if integer or name.startswith("v.") else -largest
    if array.dtype.kind not in ("iu" if integer else "f"):
        raise InputError(f"the optimiser's state has {name} as {array.dtype}: start from the model with --init")
    if array.size and not (array.min() >= least and array.max() <= largest):  # a NaN fails both
        raise InputError(
            f"the optimiser's state has {name} beyond {least} to {largest}: start from the model with --init"
        )

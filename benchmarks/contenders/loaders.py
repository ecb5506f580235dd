"""Ways to load a checkpoint's file; each imports its packages before the clock starts."""

from collections.abc import Callable
from typing import Any


def with_numpy_gpt() -> Callable[[str], Any]:
    import safetensors  # noqa: F401 (imported before the clock starts)

    from numpy_gpt import load

    return load


def with_safetensors() -> Callable[[str], Any]:
    from safetensors.torch import load_file

    return load_file


def with_safetensors_reading() -> Callable[[str], Any]:
    from safetensors.torch import load_file

    def load_and_read(file: str) -> Any:
        tensors = load_file(file)
        return tensors, [float(tensor.sum()) for tensor in tensors.values()]

    return load_and_read


NUMPY = "numpy_gpt.load"

WAYS: dict[str, Callable[[], Callable[[str], Any]]] = {
    NUMPY: with_numpy_gpt,
    "safetensors.torch.load_file": with_safetensors,
    "safetensors.torch.load_file, all read": with_safetensors_reading,
}
"""Name -> a function that does the imports and returns the function that loads a file."""

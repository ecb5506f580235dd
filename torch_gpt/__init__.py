"""The same GPT in PyTorch: the reference for numpy_gpt's numbers, and the way to a GPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch_gpt.model import GPTModel, from_params, loss_and_grads, to_params

__all__ = ["GPTModel", "from_params", "loss_and_grads", "to_params"]


def __getattr__(name: str) -> Any:
    """Load the names above from torch_gpt.model on demand, so that torch-gpt can report a missing torch."""
    if name in __all__:
        from torch_gpt import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

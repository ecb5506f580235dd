"""The same GPT in PyTorch: the judge of numpy_gpt's numbers, and the way to a GPU."""

from torch_gpt.model import GPTModel, from_params, loss_and_grads, to_params

__all__ = ["GPTModel", "from_params", "loss_and_grads", "to_params"]

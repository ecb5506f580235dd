"""GPT-2 in NumPy: every forward and backward line by hand, with the numbers PyTorch gives."""

from numpy_gpt.config import GPTConfig
from numpy_gpt.decoding import generate
from numpy_gpt.model import GPT
from numpy_gpt.optim import AdamW
from numpy_gpt.random.generator import Generator
from numpy_gpt.trace import trace
from numpy_gpt.weights.checkpoint import load, save

__all__ = ["GPT", "AdamW", "GPTConfig", "Generator", "generate", "load", "save", "trace"]

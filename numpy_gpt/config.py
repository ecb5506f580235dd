"""The model's shape: the keys of the book's GPT_CONFIG_124M, checked once, and GPT-2's four sizes."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from numpy_gpt.errors import InputError

GPT2_SIZES: dict[str, dict[str, int]] = {
    "124M": {"emb_dim": 768, "n_layers": 12, "n_heads": 12},
    "355M": {"emb_dim": 1024, "n_layers": 24, "n_heads": 16},
    "774M": {"emb_dim": 1280, "n_layers": 36, "n_heads": 20},
    "1558M": {"emb_dim": 1600, "n_layers": 48, "n_heads": 25},
}
"""Radford et al. 2019, table 2; the names are the parameter counts of OpenAI's released files."""


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a GPT-2. The defaults are the book's GPT_CONFIG_124M (chapter 5).

    vocab_size (V) and context_length (longest T) in tokens; emb_dim (C) a multiple of n_heads (NH); n_layers (L).
    drop_rate is the probability that dropout zeroes an element, used in training only. qkv_bias gives the query, key
    and value projections a bias, as OpenAI's weights have. tie_weights uses the token embedding as output head too.

    Raises InputError (a ValueError) naming the key of an unusable value.
    """

    vocab_size: int = 50257
    context_length: int = 256
    emb_dim: int = 768
    n_heads: int = 12
    n_layers: int = 12
    drop_rate: float = 0.1
    qkv_bias: bool = False
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            value = self._plain(key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{key} must be a whole number of at least 1, not {value!r}")
        if self.emb_dim % self.n_heads:
            raise InputError(
                f"emb_dim {self.emb_dim} does not divide into {self.n_heads} heads: "
                "choose an n_heads that divides emb_dim"
            )
        rate = self._plain("drop_rate")
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise InputError(f"drop_rate must be a probability from 0 to 1, not {rate!r}")
        for key in ("qkv_bias", "tie_weights"):
            if not isinstance(self._plain(key), bool):
                raise InputError(f"{key} must be True or False, not {getattr(self, key)!r}")

    def _plain(self, key: str) -> Any:
        """The value of a key; a NumPy scalar is replaced by a Python number, for JSON."""
        value = getattr(self, key)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(self, key, value)
        return value

    @property
    def head_size(self) -> int:
        """HS = C / NH."""
        return self.emb_dim // self.n_heads

    @classmethod
    def gpt2(cls, size: str, **overrides: Any) -> "GPTConfig":
        """One of GPT-2's sizes: "124M", "355M", "774M" or "1558M", named by its parameter count (weights tied).

        Sets only the size and context_length 1024; dropout, bias and tying are off unless given.
        """
        if size not in GPT2_SIZES:
            raise InputError(f"unknown GPT-2 size {size!r}: choose one of {', '.join(GPT2_SIZES)}")
        return cls(**{"context_length": 1024, "drop_rate": 0.0} | GPT2_SIZES[size] | overrides)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values that checkpoints store."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GPTConfig":
        """The inverse of to_dict. Raises InputError for a key that is missing or unknown."""
        known = {field.name for field in fields(cls)}
        if wrong := known ^ values.keys():
            raise InputError(f"not a GPT configuration: {', '.join(sorted(wrong))} missing or unknown")
        return cls(**values)

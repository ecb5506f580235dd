"""The settings of a run: all that decides its numbers, and which of them a resumed run may change."""

import math
import sys
from dataclasses import dataclass, fields
from typing import Any

from numpy_gpt.config import GPT2_SIZES, GPTConfig
from numpy_gpt.errors import InputError
from numpy_gpt.tokenizer import ENCODINGS

TINY = {"emb_dim": 128, "n_layers": 2, "n_heads": 4}
"""The size called tiny: half a million parameters with the encoding bytes, a minute's training on a laptop."""

SIZES = {"tiny": TINY} | GPT2_SIZES
SIZE_NAMES = ("n_layers", "n_heads", "emb_dim")

ADDED = (*SIZE_NAMES, "tokens", "decay", "betas", "accumulate")
"""Settings that the run.json of earlier versions lacks; those runs had the defaults."""

DECAYS = ("all", "2d", "matrices")
"""Which parameters decay, see parameters.decayed_parameters."""


@dataclass(frozen=True)
class Settings:
    """All that decides a run's numbers. The defaults are the book's; `for_tiny` are those of the tiny model."""

    model: str = "124M"
    n_layers: int | None = None  # None: the model's; so too the next two
    n_heads: int | None = None
    emb_dim: int | None = None
    text: str | tuple[str, ...] = "python-manual"  # one, or several
    tokens: str | None = None  # a folder of tokens to learn instead of the text
    encoding: str = "gpt2"
    context_length: int = 256
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 2
    accumulate: int = 1
    stride: int | None = None  # None: the context length, so that windows do not overlap
    lr: float = 4e-4
    weight_decay: float = 0.1
    decay: str = "all"
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    clip: float | None = None
    drop_rate: float = 0.1
    tie_weights: bool = False
    qkv_bias: bool = False
    seed: int = 123
    eval_freq: int = 5
    eval_iter: int = 5
    prompt: str = "Every effort moves you"
    sample_tokens: int = 50

    @property
    def own_size(self) -> dict[str, int]:
        """What is set of the sizes that override the model's."""
        return {name: size for name in SIZE_NAMES if (size := getattr(self, name)) is not None}

    @property
    def name(self) -> str:
        """The model's name; of one with its own sizes, layers × features: "4x128"."""
        size = SIZES.get(self.model, {}) | self.own_size
        return f"{size['n_layers']}x{size['emb_dim']}" if self.own_size else self.model

    def config(self, vocab_size: int) -> GPTConfig:
        """The model these settings describe. Raises InputError for an unknown size."""
        if self.model not in SIZES:
            raise InputError(f"unknown model {self.model!r}: choose {', '.join(SIZES)}")
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=self.context_length,
            drop_rate=self.drop_rate,
            tie_weights=self.tie_weights,
            qkv_bias=self.qkv_bias,
            **SIZES[self.model] | self.own_size,
        )


for_tiny = Settings(
    model="tiny",
    encoding="bytes",
    context_length=64,
    epochs=2,
    max_steps=1001,
    batch_size=8,
    lr=4e-3,
    warmup_steps=100,
    clip=1.0,
    drop_rate=0.0,
    eval_freq=100,
    prompt="The statement",
    sample_tokens=160,
)

COUNTED_FROM_0 = ("epochs", "max_steps", "warmup_steps", "sample_tokens")
"""Settings that may be 0; the other counts are at least 1."""

MAY_CHANGE = {"epochs", "max_steps", "eval_freq", "eval_iter", "prompt", "accumulate"}
"""Settings that --resume may change. Changing the others would make it another run, as does accumulate with dropout."""


def check_settings(settings: Settings) -> None:
    """Raise ValueError for a setting of the wrong type, or with a value that no run can be started with."""
    for field in fields(Settings):
        name, value = field.name, getattr(settings, field.name)
        if value is None and field.name in (*SIZE_NAMES, "tokens", "max_steps", "stride", "clip"):
            continue
        if name in ("tie_weights", "qkv_bias"):
            right = type(value) is bool
        elif name == "betas":
            right = type(value) is tuple and len(value) == 2 and all(type(b) is float and 0 <= b < 1 for b in value)
        elif name == "decay":
            right = value in DECAYS
        elif name == "text" and type(value) is tuple:
            right = len(value) > 1 and all(type(each) is str for each in value)
        elif name in ("model", "text", "tokens", "encoding", "prompt"):
            right = type(value) is str
        elif name in ("lr", "weight_decay", "clip", "drop_rate"):
            least = 0.0 if name in ("weight_decay", "drop_rate") else math.ulp(0.0)
            right = type(value) in (int, float) and least <= value <= (1 if name == "drop_rate" else sys.float_info.max)
        else:
            least = {"seed": -(1 << 63), **dict.fromkeys(COUNTED_FROM_0, 0)}.get(name, 1)
            right = type(value) is int and least <= value < 1 << (64 if name == "seed" else 63)
        if not right:
            raise ValueError(f"its {name} is {str(value)[:80]!r}, which no run has")


def effective(settings: Settings, name: str) -> Any:
    """A setting's effective value, as a flag gives it.

    None for the text, the tokens and the vocabulary, which are compared by SHA-256 instead.
    """
    if name == "betas":
        return "{} {}".format(*settings.betas)
    if name == "stride":
        return settings.stride or settings.context_length
    if name in SIZE_NAMES:
        return (SIZES.get(settings.model, {}) | settings.own_size).get(name)
    return (
        None
        if name in ("text", "tokens") or (name == "encoding" and settings.encoding not in ENCODINGS)
        else getattr(settings, name)
    )

"""The work to measure: a model, a batch size, and batches of real text that never repeat."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from numpy_gpt import GPTConfig
from numpy_gpt.data import load_text
from numpy_gpt.errors import InputError
from numpy_gpt.io.finding import data_folder_file
from numpy_gpt.tokenizer import encode, get_encoding
from numpy_gpt.typing import Array


@dataclass(frozen=True)
class Job:
    """B windows of T tokens through a model of this configuration.

    judged: its ratios have limits and get a verdict, unlike those of the quick jobs.
    """

    model: str
    config: GPTConfig
    B: int
    T: int
    judged: bool = False

    def __str__(self) -> str:
        return f"{self.model}, B={self.B}, T={self.T}"


BOOK = Job("124M untied", GPTConfig(context_length=256, drop_rate=0.1), B=2, T=256, judged=True)
LONG = Job("124M untied", GPTConfig(context_length=1024, drop_rate=0.1), B=1, T=1024, judged=True)
GPU = Job("124M untied", LONG.config, B=8, T=1024)  # work enough for a GPU; the tuned model fits into 16 GB
SMALL = Job(  # after nanoGPT's CPU example: six layers of its baby GPT, and the 65 characters of its Shakespeare
    "6 × 384, V=65",
    GPTConfig(vocab_size=65, context_length=64, emb_dim=384, n_heads=6, n_layers=6, drop_rate=0.1),
    B=12,
    T=64,
    judged=True,
)
_TWO_LAYERS = {"vocab_size": 257, "emb_dim": 128, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
QUICK_BOOK = Job("2 × 128, V=257", GPTConfig(context_length=128, **_TWO_LAYERS), B=2, T=64)
QUICK_LONG = Job("2 × 128, V=257", GPTConfig(context_length=256, **_TWO_LAYERS), B=1, T=256)
QUICK_GPU = Job("2 × 128, V=257", QUICK_LONG.config, B=8, T=256)
QUICK_SMALL = Job("2 × 128, V=65", GPTConfig(context_length=64, **_TWO_LAYERS | {"vocab_size": 65}), B=4, T=64)


@dataclass(frozen=True)
class Text:
    """Token ids (n,) below the job's vocabulary, and the name of their text and encoding."""

    ids: Array
    name: str


def text_for(vocab_size: int) -> Text:
    """The story from $NUMPY_GPT_DATA in gpt2's encoding; if missing, Python's manual and bytes. Without a network.

    Below 257 tokens: one id for each of the commonest characters, and the last for all others.
    """
    story = data_folder_file("the-verdict.txt")
    name = "the-verdict" if isinstance(story, Path) and story.exists() else "python-manual"
    text = load_text(name)
    if vocab_size < 257:
        commonest = [c for c, _ in Counter(text).most_common(vocab_size - 1)]
        number = {c: i for i, c in enumerate(commonest)}
        return Text(np.array([number.get(c, vocab_size - 1) for c in text]), f"{name}, characters")
    if vocab_size >= 50257:
        try:
            return Text(encode(get_encoding("gpt2"), text), f"{name}, gpt2")
        except InputError:
            pass  # its vocabulary is not on this machine, and there is no network
    return Text(encode(get_encoding("bytes"), text), f"{name}, bytes")


def batches(job: Job, text: Text, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """Endless (x (B, T), y (B, T)): windows at random positions, so that each is new, and the same one token later."""
    if len(text.ids) <= job.T:
        raise InputError(f"{text.name} has {len(text.ids)} tokens, too few for a window of {job.T}")
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(text.ids) - job.T, size=job.B)
        windows = text.ids[starts[:, None] + np.arange(job.T + 1)]
        yield np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

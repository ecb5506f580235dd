"""Flags that several commands share, and the types of all, which refuse unusable values before any work."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from numpy_gpt.io.paths import kind_of
from numpy_gpt.tokenizer import ENCODINGS

LARGEST = 2**63 - 1
"""Largest count: NumPy's int64."""


class Finite(click.FloatRange):
    """A finite float within a range: comparisons alone let NaN through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class Count(click.IntRange):
    """An integer from `min` to the largest int64."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if number > LARGEST:
            self.fail(f"a number of {len(str(number))} digits is too large: choose one below 2^63.", param, ctx)
        return number


class SeedInt(click.types.IntParamType):
    """A seed that torch and Generator take."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not -(1 << 63) <= number < 1 << 64:
            self.fail(f"a seed must be from -2^63 to 2^64 - 1, not {number}.", param, ctx)
        return number


class Place(click.Path):
    """A path, existing or not, that the system can look up."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not os.fspath(value):  # pathlib reads it as the working directory
            self.fail("an empty path names nothing; . is the working directory.", param, ctx)
        kind_of(value)  # raises InputError
        return super().convert(value, param, ctx)


AT_LEAST_1 = Count(min=1)
LAYERS, FEATURES = Count(1, 10_000), Count(1, 1_000_000)
AT_LEAST_0 = Count(min=0)
NOT_NEGATIVE = Finite(min=0)
POSITIVE = Finite(min=0, min_open=True)
PROBABILITY = Finite(0, 1)
SHARE = Finite(0, 1, min_open=True)
BELOW_1 = Finite(0, 1, max_open=True)
SEED = SeedInt()
PATH = Place(path_type=Path)

ENCODING_HELP = f"How text becomes tokens: {' or '.join(ENCODINGS)}, or a folder with encoder.json and vocab.bpe."
ENCODING = click.option("--encoding", metavar="NAME|DIR", help=f"{ENCODING_HELP}  [default: the checkpoint's]")


def options(*each: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """All these options and arguments, in their order in --help."""

    def add(command: Any) -> Any:
        for option in reversed(each):
            command = option(command)
        return command

    return add


OF_NANOGPT = {
    "n_layer": "--n-layers",
    "n_head": "--n-heads",
    "n_embd": "--emb-dim",
    "block_size": "--context-length",
    "dropout": "--drop-rate",
    "learning_rate": "--lr",
    "max_iters": "--max-steps",
    "lr_decay_iters": "--max-steps",
    "warmup_iters": "--warmup-steps",
    "decay_lr": "--warmup-steps",
    "min_lr": "--warmup-steps",
    "bias": "--qkv-bias",
    "beta1": "--betas",
    "beta2": "--betas",
    "gradient_accumulation_steps": "--accumulate",
    "grad_clip": "--clip",
    "eval_interval": "--eval-freq",
    "eval_iters": "--eval-iter",
    "out_dir": "--out",
    "init_from": "--init",
    "dataset": "--text",
}
"""nanoGPT's names of settings (its train.py) -> the flags here, which an error suggests."""

OF_NANOGPTS_SAMPLE = {
    "start": "PROMPT",
    "num_samples": "--num-samples",
    "max_new_tokens": "--max-new-tokens",
    "top_k": "--top-k",
    "out_dir": "CHECKPOINT",
    "init_from": "CHECKPOINT",
}
"""The same for its sample.py, with the arguments here."""


def suggest_ours(error: click.NoSuchOption) -> click.NoSuchOption:
    """The error, or for nanoGPT's name of a setting one that suggests the command's flag or argument for it."""
    if error.ctx is None:
        return error
    known = {name for param in error.ctx.command.params for name in (*param.opts, param.human_readable_name)}
    theirs = error.option_name.lstrip("-").replace("-", "_")
    for names in (OF_NANOGPT, OF_NANOGPTS_SAMPLE):
        if (ours := names.get(theirs, "")) in known:
            shown = repr(ours) if ours.startswith("-") else f"the argument {ours}"
            said = f"No such option {error.option_name!r}. Did you mean {shown}?"
            return click.NoSuchOption(error.option_name, said, ctx=error.ctx)
    return error

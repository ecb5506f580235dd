"""python -m benchmarks streams: torch's random streams drawn by NumPy and by torch, in turn.

A ratio is NumPy's time divided by torch's of the same pair; the median over the pairs is the result, the range shows
how noisy the machine was. Before timing, both must draw the same bits.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from numpy_gpt import Generator, GPTConfig
from numpy_gpt.block import Dropout
from numpy_gpt.cli.flags import AT_LEAST_1
from numpy_gpt.parameters import initial_parameters
from torch_gpt.model import GPTModel


class Case(NamedTuple):
    """One piece of work: ours and theirs each draw it after seeding, and return arrays that must be equal."""

    name: str
    ours: Callable[[Generator], list[np.ndarray]]
    theirs: Callable[[], list[Any]]


def mask_shapes(config: GPTConfig, B: int) -> list[tuple[int, ...]]:
    """Shapes of all dropout masks of a training step on B windows of the full context."""
    T = config.context_length
    x, probabilities = (B, T, config.emb_dim), (B, config.n_heads, T, T)
    return [x] + config.n_layers * [probabilities, x, x]


def cases(config: GPTConfig, B: int) -> Iterator[Case]:
    """Initial parameters, a training step's dropout masks, and a token drawn from the full vocabulary."""
    rate = config.drop_rate
    shapes = mask_shapes(config, B)
    p = np.random.default_rng(0).dirichlet(np.ones(config.vocab_size)).astype(np.float32)[None]

    def masks(rng: Generator) -> list[np.ndarray]:
        drop = Dropout(rate, rng, np.float32)
        return [mask for mask in map(drop.mask, shapes) if mask is not None]

    yield Case(
        "initial parameters",
        lambda rng: list(initial_parameters(config, rng).values()),
        lambda: [*GPTModel(config).parameters()],
    )
    yield Case(
        f"{len(shapes)} dropout masks of a training step",
        masks,
        lambda: [torch.empty(shape).bernoulli_(1 - rate).div_(1 - rate) for shape in shapes],  # like torch's dropout
    )
    yield Case(
        f"a token out of {config.vocab_size:,}",
        lambda rng: [rng.multinomial(p)],
        lambda: [torch.multinomial(torch.from_numpy(p), 1)],
    )


def measure(case: Case, pairs: int) -> list[tuple[float, float]]:
    """(NumPy's, torch's) seconds of each pair, after an untimed one whose bits are compared.

    Raises AssertionError if the two draw different bits.
    """
    torch.manual_seed(123)
    want, got = case.theirs(), case.ours(Generator(123))
    assert len(got) == len(want), f"{case.name}: {len(got)} arrays, torch has {len(want)}"
    for ours, theirs in zip(got, want, strict=True):
        assert ours.tobytes() == theirs.detach().numpy().tobytes(), f"{case.name}: other bits than torch's"
    del got, want
    times = []
    for _ in range(pairs):
        begin = time.perf_counter()
        case.ours(Generator(123))
        middle = time.perf_counter()
        torch.manual_seed(123)
        case.theirs()
        times.append((middle - begin, time.perf_counter() - middle))
    return times


@click.command()
@click.option("--pairs", type=AT_LEAST_1, default=9, show_default=True, help="Timed pairs of each case.")
def main(pairs: int) -> None:
    """Time torch's random streams in NumPy and in torch, in turn, at the size of the book's run.

    The last line has all results as JSON.
    """
    console = Console(highlight=False)
    table = Table("", "NumPy, s", "torch, s", "ratio (median)", "range")
    figures: dict[str, Any] = {"machine": machine(), "pairs": pairs}
    for case in cases(GPTConfig(), B=2):
        times = measure(case, pairs)
        ours, theirs = (statistics.median(each) for each in zip(*times, strict=True))
        ratios = sorted(a / b for a, b in times)
        ratio = statistics.median(ratios)
        table.add_row(case.name, f"{ours:.4f}", f"{theirs:.4f}", f"{ratio:.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
        figures[case.name] = {"numpy_seconds": ours, "torch_seconds": theirs, "ratio": ratio, "ratios": ratios}
    console.print(figures["machine"], soft_wrap=True)
    console.print(table)
    click.echo(json.dumps(figures))

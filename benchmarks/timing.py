"""The clock: contenders in turn, after a warm-up, in an idle process; medians, spreads, and ratios pair by pair."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

WARM_UPS = 2
"""Rounds that are not counted, for allocating buffers, choosing kernels and compiling code."""


@dataclass(frozen=True)
class Spread:
    """Median of the measurements, their middle half (q1 to q3), and their range."""

    median: float
    q1: float
    q3: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
        return cls(median, q1, q3, min(values), max(values))


@dataclass(frozen=True)
class Contender:
    """run(round) does the work of one round, its result is ignored; wait() returns when a device has finished it."""

    run: Callable[[int], Any]
    wait: Callable[[], None] = lambda: None


def interleaved(
    contenders: Mapping[str, Contender],
    rounds: int,
    tick: Callable[[str], None] = lambda name: None,
    warm_ups: int = WARM_UPS,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in turn: A B C, B C A, C A B, … after warm_ups uncounted rounds.

    run receives the round's number, counted from the first warm-up, so that all do the same work in a round.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(warm_ups + rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            tick(name)
            contender = contenders[name]
            contender.wait()
            settle()
            begin = time.perf_counter()
            contender.run(i)
            contender.wait()
            seconds = time.perf_counter() - begin
            if i >= warm_ups:
                times[name].append(seconds)
    return times


def settle(slice_seconds: float = 0.01, patience: float = 1.0) -> None:
    """Wait until no thread of this process is running.

    After a product OpenBLAS's worker threads spin for 0.1 s waiting for the next one (torch's OpenMP: 0.01 s), on the
    cores that the next contender needs. Spinning counts as process time, so the process is idle once that stops
    increasing. patience: seconds after which to continue anyway.
    """
    give_up = time.perf_counter() + patience
    while time.perf_counter() < give_up:
        before = time.process_time()
        time.sleep(slice_seconds)
        if time.process_time() - before < 0.1 * slice_seconds:
            return


def ratio(times: dict[str, list[float]], numerator: str, denominator: str) -> tuple[float, Spread]:
    """Ratio of the medians, and the ratios round by round."""
    a, b = times[numerator], times[denominator]
    return statistics.median(a) / statistics.median(b), Spread.of([x / y for x, y in zip(a, b, strict=True)])


@contextmanager
def cores(n: int) -> Iterator[None]:
    """Limit NumPy's BLAS, torch, and (on Linux) every present and future thread to n cores."""
    torch_threads, here = torch.get_num_threads(), _affinity()
    _set_affinity(sorted(here)[:n])
    torch.set_num_threads(n)
    try:
        with threadpool_limits(n):
            yield
    finally:
        torch.set_num_threads(torch_threads)
        _set_affinity(sorted(here))


def _affinity() -> set[int]:
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set()


def _set_affinity(numbers: list[int]) -> None:
    """Set the affinity of every thread of this process; later threads inherit it."""
    tasks = Path("/proc/self/task")
    if numbers and tasks.exists():
        for task in tasks.iterdir():
            os.sched_setaffinity(int(task.name), numbers)

"""PyTorch on the GPU: speed, the error beside it, MFU and peak memory, of one way to run it at a time.

One at a time, because together they would fill a GPU and share one peak. A round is STEPS steps in a row, on batches
that are already on the GPU, and ends when the GPU is done: as in training, kernels are queued while earlier ones run.
Seconds are per step.

MFU (model FLOPs utilisation) is the rate of the operations that the model needs, counted as in `numpy-gpt info`, as a
share of the GPU's peak in this precision; in float32, of its peak without tensor cores.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.cards import peaks
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import Job
from benchmarks.machine import accelerator
from benchmarks.results import Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved
from numpy_gpt.typing import Params

STEPS = 10
"""Steps of a round."""

OUT_OF_MEMORY = "out of GPU memory"


@dataclass(frozen=True)
class Work:
    """What every backend does on a job, from these initial parameters.

    batches: NumPy arrays, used in turn. check(backend): the figures of its error; raises DisagreementError if that is
    too large. step(backend, batch): the work to time; its result is kept in Measured. flops: per token.
    """

    job: Job
    params: Params
    batches: list[tuple[Any, ...]]
    check: Callable[[TorchBackend], dict[str, float]]
    step: Callable[[TorchBackend, tuple[Any, ...]], Any]
    flops: int


@dataclass(frozen=True)
class Measured:
    """Seconds per step, round by round, every step's result, warm-ups included, and the row's figures.

    Or a note that says why there are none.
    """

    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def row(self, case: str, name: str) -> Row:
        return Row(case, name, Spread.of(self.seconds) if self.seconds else None, self.figures, note=self.note)


def measure(work: Work, settings: Settings, report: Report) -> dict[str, Measured]:
    """Each of the settings' GPU ways, by name."""
    found = {}
    total = len(settings.gpus) * (WARM_UPS + settings.runs)
    with report.progress(f"{work.job}, GPU", total) as tick:
        for way in settings.gpus:
            try:
                found[str(way)] = _measure(way, work, settings.runs, tick)
            except RuntimeError as error:  # OutOfMemoryError, the compiler's, or cuBLAS's
                if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
                    raise
                found[str(way)] = Measured(note=OUT_OF_MEMORY)
            _free()
    return found


def _measure(way: Way, work: Work, runs: int, tick: Callable[[str], None]) -> Measured:
    backend = TorchBackend(way, work.job.config, work.params)
    errors = work.check(backend)
    batches = [tuple(map(backend.tensor, batch)) for batch in work.batches]

    results: list[Any] = []

    def steps(i: int) -> None:
        results.extend(work.step(backend, batches[j % len(batches)]) for j in range(STEPS * i, STEPS * (i + 1)))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = interleaved({backend.name: Contender(steps, backend.synchronise)}, runs, tick)[backend.name]
    seconds = [each / STEPS for each in times]
    rate = work.job.B * work.job.T / Spread.of(seconds).median
    figures = {"tokens/s": rate} | errors
    if (peak := (peaks(accelerator()) or {}).get(way.precision)) is not None:
        figures["MFU"] = work.flops * rate / (1e12 * peak)
    if torch.cuda.is_available():
        figures["GPU GB"] = torch.cuda.max_memory_allocated() / 1e9
    return Measured(seconds, results, figures)


def _free() -> None:
    """Return the last backend's memory to the GPU."""
    gc.collect()  # a backend refers to itself
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

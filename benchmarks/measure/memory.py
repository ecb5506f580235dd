"""Peak memory of a training step, and of attention as T grows, each measured in a separate process."""

import json

from benchmarks.contenders.torch_backends import Way
from benchmarks.jobs import BOOK, QUICK_BOOK, Job
from benchmarks.peak_memory import in_own_process
from benchmarks.results import Limits, Ratio, Report, Row
from benchmarks.settings import Settings

LIMITS = {str(Way("book")): Limits(0.6), str(Way("tuned")): Limits(0.95)}

LENGTHS = (256, 512, 1024, 2048, 4096)
LINEAR = 1.25
"""Memory counts as linear in T if it grows by at most this factor more than T."""


def run(settings: Settings, report: Report) -> None:
    """The book's step, and attention from 256 to 4096 tokens with the heads of 124M."""
    job, lengths = (QUICK_BOOK, LENGTHS[:3]) if settings.quick else (BOOK, LENGTHS)
    measure_step(job, settings, report)
    measure_attention(job, lengths, report)


def measure_step(job: Job, settings: Settings, report: Report) -> None:
    """Peak resident memory (on CUDA: allocated) of a few training steps without dropout."""
    ways = [Way("tuned"), Way("book"), *filter(_on_cuda_in_float32, settings.gpus)]
    backends = {"NumPy": "NumPy"} | {str(way): f"{way.style} {way.device}" for way in ways}
    peaks = {}
    with report.progress(f"memory, {job}", len(backends)) as tick:
        for name, argument in backends.items():
            tick(name)
            arguments = (argument, json.dumps(job.config.to_dict()), str(job.B), str(job.T))
            peaks[name] = in_own_process("step", *arguments)
    case, rows = f"peak memory of a step, {job}, dropout 0", []
    for name, found in peaks.items():
        figures = {"peak GB": found["peak"] / 1e9, "before GB": found["before"] / 1e9}
        ratios = {}
        if name == "NumPy":
            ratios = {
                f"NumPy / {other}": Ratio(
                    found["peak"] / peaks[other]["peak"], limits=LIMITS.get(other, Limits()) if job.judged else Limits()
                )
                for other in peaks
                if other != name
            }
        rows.append(Row(case, name, figures=figures, ratios=ratios))
    rows += settings.absent_rows(case, _on_cuda_in_float32)
    report.add(rows, "resident memory of the process; before: libraries loaded, nothing done")


def _on_cuda_in_float32(way: Way) -> bool:
    return way.device == "cuda" and way.precision == "float32" and not way.compiled


def measure_attention(job: Job, lengths: tuple[int, ...], report: Report) -> None:
    """Memory of NumPy's attention, forward and backward, beyond its inputs, for one sequence of each length."""
    heads, size = str(job.config.n_heads), str(job.config.head_size)
    extra = {}
    with report.progress("memory of attention", len(lengths)) as tick:
        for T in lengths:
            tick(f"T = {T}")
            found = in_own_process("attention", heads, str(T), size)
            extra[T] = found["peak"] - found["before"]
    case = f"memory of attention, {heads} heads of {size}, T = {lengths[0]} to {lengths[-1]}"
    growth, longer = extra[lengths[-1]] / max(extra[lengths[0]], 1), lengths[-1] // lengths[0]
    limit = Limits(LINEAR * longer) if job.judged else Limits()
    rows = []
    for T, taken in extra.items():
        ratios = {f"growth as T grows {longer} ×": Ratio(growth, limits=limit)} if lengths[-1] == T else {}
        rows.append(Row(case, f"NumPy, T = {T}", None, {"peak GB": taken / 1e9, "bytes/token": taken / T}, ratios))
    report.add(rows, f"beyond its inputs; {verdict(growth, longer)} in T")


def verdict(growth: float, longer: int) -> str:
    """Classify memory that grew by the factor `growth` while T grew by the factor `longer`."""
    return "linear" if growth <= LINEAR * longer else "more than linear"

"""The step's ratio as a function of T, of B and of the number of cores."""

from benchmarks.contenders.agreement import check, truth
from benchmarks.contenders.backends import NumPyBackend
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import LONG, QUICK_LONG, Job, batches, text_for
from benchmarks.machine import usable_cores
from benchmarks.results import Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, cores, interleaved, ratio

ROUNDS = 3
"""Timed rounds per point: few, because there are many points."""


def run(settings: Settings, report: Report) -> None:
    """T from 64 to 1024 at B = 1, B from 1 to 8 at T = 128, cores from 1 to all at B = 2, T = 256 (quick: fewer)."""
    if settings.quick:
        measure(QUICK_LONG, [(1, 64), (1, 256)], [(2, 64)], (1, 64), report)
    else:
        lengths = [(1, T) for T in (64, 128, 256, 512, 1024)]
        measure(LONG, lengths, [(B, 128) for B in (1, 2, 4, 8)], (2, 256), report)


def measure(
    job: Job,
    lengths: list[tuple[int, int]],
    sizes: list[tuple[int, int]],
    on_cores: tuple[int, int],
    report: Report,
) -> None:
    """Add rows of one model at several (B, T), and at one of them on 1, 2, … cores. The job's B and T are ignored."""
    text = text_for(job.config.vocab_size)
    numpy = NumPyBackend(job.config)
    tuned = TorchBackend(Way("tuned"), job.config, numpy.model.params)
    x, y = next(batches(Job(job.model, job.config, 1, lengths[0][1]), text))
    want = truth(job.config, numpy.model.params, x, y)
    for backend in (numpy, tuned):
        check(backend, job.config, x, y, want)
    del want
    points = [("T", B, T, usable_cores()) for B, T in lengths] + [("B", B, T, usable_cores()) for B, T in sizes]
    points += [("cores", *on_cores, n) for n in range(1, usable_cores() + 1)]
    cases: dict[str, list[Row]] = {}
    for variable, B, T, n in points:
        stream = batches(Job(job.model, job.config, B, T), text)
        fresh = [next(stream) for _ in range(WARM_UPS + ROUNDS)]
        contenders = {
            backend.name: Contender(lambda i, backend=backend, fresh=fresh: backend.step(*fresh[i], False))
            for backend in (numpy, tuned)
        }
        at = f"B={B}, T={T}, cores={n}"
        with cores(n), report.progress(f"scaling, {at}", 2 * len(fresh)) as tick:
            times = interleaved(contenders, ROUNDS, tick)
        case = f"step as {variable} grows, {job.model}, dropout 0"
        for name, each in times.items():
            spread = Spread.of(each)
            ratios = {f"{at}: NumPy / {tuned.name}": Ratio(*ratio(times, name, tuned.name))} if name == "NumPy" else {}
            row = Row(case, f"{name}, {at}", spread, {"tokens/s": B * T / spread.median}, ratios)
            cases.setdefault(case, []).append(row)
    for rows in cases.values():
        report.add(rows, text.name)

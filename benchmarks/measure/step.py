"""A training step: loss, every gradient, AdamW, on a fresh batch of real text.

Up to three measurements on the same contenders: dropout off, on, and (off again) after touching every row of the token
embedding once, so that no time is saved on rows whose moments are still zero.

The first also times numpy_gpt/plain.py: the same formulas without optimisation.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.contenders import agreement
from benchmarks.contenders.backends import Backend, NumPyBackend, PlainBackend
from benchmarks.contenders.torch_backends import NOT_HERE, TorchBackend, Way
from benchmarks.jobs import BOOK, LONG, QUICK_BOOK, QUICK_LONG, QUICK_SMALL, SMALL, Job, batches, text_for
from benchmarks.measure.ceilings import MatrixProducts
from benchmarks.results import NOT_MEASURED, Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved, ratio

TUNED, BOOKS = str(Way("tuned")), str(Way("book"))
FORMS = PLAIN, DROPOUT, TOUCHED = "dropout 0", "dropout 0.1", "dropout 0, every row touched"
PRODUCTS, TORCH_PRODUCTS = "NumPy's matrix products", "torch's matrix products"

LIMITS = {
    (BOOK, PLAIN): {TUNED: Limits(1.10, 0.95), BOOKS: Limits(0.75, 0.55), PRODUCTS: Limits(1.45, 1.25)},
    (BOOK, DROPOUT): {BOOKS: Limits(0.80, 0.65)},
    (LONG, PLAIN): {TUNED: Limits(1.10, 1.0)},
    (SMALL, PLAIN): {TUNED: Limits(1.0)},
}


def run(settings: Settings, report: Report) -> None:
    """The book's job in all forms; the long window and the small model without dropout."""
    book, *others = (QUICK_BOOK, QUICK_LONG, QUICK_SMALL) if settings.quick else (BOOK, LONG, SMALL)
    measure(book, FORMS, settings, report)
    for job in others:
        measure(job, (PLAIN, TOUCHED), settings, report)


def measure(job: Job, forms: tuple[str, ...], settings: Settings, report: Report) -> None:
    """Add one job's cases to the report. Raises DisagreementError before anything is timed.

    forms: of FORMS, in their order, because touched rows stay touched.
    """
    text = text_for(job.config.vocab_size)
    stream = batches(job, text)
    backends, errors = agreeing(job, settings, *next(stream), report)
    for form in forms:
        if form != PLAIN:  # plain.py takes several times as long, so it is timed only once
            backends = [backend for backend in backends if backend.name != PlainBackend.name]
        if form == TOUCHED:
            for backend in backends:
                backend.touch_every_row()
        fresh = [next(stream) for _ in range(WARM_UPS + settings.runs)]
        rows = np.unique([x for x, _ in fresh]).size
        share = (
            f"{text.name}; the batches touch {rows:,} of {job.config.vocab_size:,} embedding rows "
            f"({rows / job.config.vocab_size:.1%}), {np.mean([np.unique(x).size for x, _ in fresh]):.0f} each"
        )
        report.add(_timed(job, form, backends, errors, fresh, settings, report), share)


def agreeing(
    job: Job, settings: Settings, x: np.ndarray, y: np.ndarray, report: Report
) -> tuple[list[Backend], dict[str, agreement.Errors]]:
    """All backends of the settings on this job, each compared with float64 on one batch, and their errors by name."""
    ways = [Way("tuned"), *([Way("tuned", compiled=True)] if settings.compiled else []), Way("book"), *settings.gpus]
    with report.progress(f"{job}: agreement", 2 + len(ways)) as tick:
        numpy = NumPyBackend(job.config)
        backends: list[Backend] = [numpy, PlainBackend(job.config)]
        tick("float64")
        want = agreement.truth(job.config, numpy.model.params, x, y)
        for way in ways:
            tick(str(way))
            backends.append(TorchBackend(way, job.config, numpy.model.params))
        errors = {}
        for backend in backends:
            errors[backend.name] = agreement.check(backend, job.config, x, y, want)
    return backends, errors


def _timed(
    job: Job,
    form: str,
    backends: list[Backend],
    errors: dict[str, agreement.Errors],
    fresh: list[tuple[np.ndarray, np.ndarray]],
    settings: Settings,
    report: Report,
) -> Iterator[Row]:
    dropout = form == DROPOUT
    losses: dict[str, list[float]] = {backend.name: [] for backend in backends}

    def contender(backend: Backend) -> Contender:
        return Contender(lambda i: losses[backend.name].append(backend.step(*fresh[i], dropout)), backend.synchronise)

    products = MatrixProducts(job.config, job.B, job.T)
    in_torch = products.in_torch()
    contenders = {backend.name: contender(backend) for backend in backends}
    contenders[PRODUCTS] = Contender(lambda i: products.run())
    contenders[TORCH_PRODUCTS] = Contender(lambda i: in_torch())
    rounds = WARM_UPS + settings.runs
    with report.progress(f"step, {job}, {form}", rounds * len(contenders)) as tick:
        times = interleaved(contenders, settings.runs, tick)
    if form == PLAIN:  # after a step with dropout, each has used different masks
        alike = [backend.name for backend in backends if backend.precision == "float32"]
        agreement.check_training({name: [float(loss) for loss in losses[name]] for name in alike})

    case = f"step, {job}, {form}"
    floor = Spread.of(times[PRODUCTS]).median
    limits = LIMITS.get((job, form), {})
    for name, each in times.items():
        spread = Spread.of(each)
        figures = {"of products": floor / spread.median}
        if name in losses:
            figures |= {"tokens/s": job.B * job.T / spread.median}
            figures |= {"grad error": errors[name].gradient, "loss error": errors[name].loss}
        else:
            figures["GFLOP/s"] = products.flops / spread.median / 1e9
        ratios = {}
        if name == NumPyBackend.name:
            ratios = {
                f"NumPy / {other}": Ratio(*ratio(times, name, other), limits.get(other, Limits()))
                for other in times
                if other not in (name, TORCH_PRODUCTS)
            }
        yield Row(case, name, spread, figures, ratios)
    if not settings.gpus:
        for way in NOT_HERE:
            yield Row(case, str(way), note=NOT_MEASURED)

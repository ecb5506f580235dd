"""A training step: loss, every gradient, AdamW, on a fresh batch of real text.

Up to three measurements on the same contenders: dropout off, on, and (off again) after touching every row of the token
embedding once, so that no time is saved on rows whose moments are still zero.

The first also times numpy_gpt/plain.py: the same formulas without optimisation.

On a GPU (gpu.py) the third is left out, since there the rows make no difference; one more job is measured only there.
"""

from collections.abc import Iterator

import numpy as np

from benchmarks.contenders import agreement
from benchmarks.contenders.backends import SEED, Backend, NumPyBackend, PlainBackend
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import (
    BOOK,
    GPU,
    LONG,
    QUICK_BOOK,
    QUICK_GPU,
    QUICK_LONG,
    QUICK_SMALL,
    SMALL,
    Job,
    batches,
    text_for,
)
from benchmarks.measure import gpu
from benchmarks.measure.ceilings import MatrixProducts
from benchmarks.results import Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved, ratio
from numpy_gpt import GPT
from numpy_gpt.cli.info import forward_flops
from numpy_gpt.typing import Array, Params

TUNED, BOOKS = str(Way("tuned")), str(Way("book"))
FORMS = PLAIN, DROPOUT, TOUCHED = "dropout 0", "dropout 0.1", "dropout 0, every row touched"
PRODUCTS, TORCH_PRODUCTS = "NumPy's matrix products", "torch's matrix products"

LIMITS = {
    (BOOK, PLAIN): {TUNED: Limits(1.10, 0.95), BOOKS: Limits(0.75, 0.55), PRODUCTS: Limits(1.45, 1.25)},
    (BOOK, DROPOUT): {BOOKS: Limits(0.80, 0.65)},
    (LONG, PLAIN): {TUNED: Limits(1.10, 1.0)},
    (SMALL, PLAIN): {TUNED: Limits(1.0)},
}

Batch = tuple[Array, Array]
"""x and y, (B, T) each."""


def run(settings: Settings, report: Report) -> None:
    """The book's job in all forms; the long window and the small model without dropout; on a GPU a larger job."""
    book, *others = (QUICK_BOOK, QUICK_LONG, QUICK_SMALL) if settings.quick else (BOOK, LONG, SMALL)
    measure(book, FORMS, settings, report)
    for job in others:
        measure(job, (PLAIN, TOUCHED), settings, report)
    if settings.gpus:
        measure_on_gpu(QUICK_GPU if settings.quick else GPU, settings, report)


def measure(job: Job, forms: tuple[str, ...], settings: Settings, report: Report) -> None:
    """Add one job's cases to the report. Raises DisagreementError before anything is timed on the CPU.

    forms: of FORMS, in their order, because touched rows stay touched.
    """
    text = text_for(job.config.vocab_size)
    stream = batches(job, text)
    checked = next(stream)
    fresh = {form: [next(stream) for _ in range(WARM_UPS + settings.runs)] for form in forms}
    numpy = NumPyBackend(job.config)
    params = numpy.model.params  # as drawn, until NumPy takes its first step
    want = agreement.truth(job.config, params, *checked)
    backends, errors = agreeing(job, numpy, checked, want, settings, report)
    on_gpu = {
        form: gpu.measure(_work(job, form, params, checked, want, fresh[form]), settings, report)
        for form in forms
        if form != TOUCHED
    }
    del want
    for form in forms:
        if form != PLAIN:  # plain.py takes several times as long, so it is timed only once
            backends = [backend for backend in backends if backend.name != PlainBackend.name]
        if form == TOUCHED:
            for backend in backends:
                backend.touch_every_row()
        rows = np.unique([x for x, _ in fresh[form]]).size
        share = (
            f"{text.name}; the batches touch {rows:,} of {job.config.vocab_size:,} embedding rows "
            f"({rows / job.config.vocab_size:.1%}), {np.mean([np.unique(x).size for x, _ in fresh[form]]):.0f} each"
        )
        report.add(_timed(job, form, backends, errors, fresh[form], on_gpu.get(form, {}), settings, report), share)


def measure_on_gpu(job: Job, settings: Settings, report: Report) -> None:
    """Add a case without NumPy, for a job that would take it many seconds a step.

    The errors are those of one window, repeated B times: the truth in float64 takes gigabytes even for one.
    """
    text = text_for(job.config.vocab_size)
    stream = batches(job, text)
    x, y = (ids[:1] for ids in next(stream))
    fresh = [next(stream) for _ in range(WARM_UPS + settings.runs)]
    params = GPT(job.config, SEED).params
    want = agreement.truth(job.config, params, x, y)
    work = _work(job, PLAIN, params, (x.repeat(job.B, axis=0), y.repeat(job.B, axis=0)), want, fresh)
    case = f"step, {job}, {PLAIN}"
    rows = [each.row(case, name) for name, each in gpu.measure(work, settings, report).items()]
    report.add(rows + settings.absent_rows(case), text.name)


def agreeing(
    job: Job, numpy: NumPyBackend, checked: Batch, want: agreement.Truth, settings: Settings, report: Report
) -> tuple[list[Backend], dict[str, agreement.Errors]]:
    """All backends on the CPU, each compared with float64 on one batch, and their errors by name."""
    with report.progress(f"{job}: agreement", len(settings.cpu)) as tick:
        backends: list[Backend] = [numpy, PlainBackend(job.config)]
        for way in settings.cpu:
            tick(str(way))
            backends.append(TorchBackend(way, job.config, numpy.model.params))
        errors = {}
        for backend in backends:
            errors[backend.name] = agreement.check(backend, job.config, *checked, want)
    return backends, errors


def _work(job: Job, form: str, params: Params, checked: Batch, want: agreement.Truth, fresh: list[Batch]) -> gpu.Work:
    return gpu.Work(
        job,
        params,
        fresh,
        check=lambda backend: _figures(agreement.check(backend, job.config, *checked, want)),
        step=lambda backend, batch: backend.step(*batch, form == DROPOUT),
        flops=3 * forward_flops(job.config, job.T),
    )


def _figures(errors: agreement.Errors) -> dict[str, float]:
    return {"grad error": errors.gradient, "loss error": errors.loss}


def _timed(
    job: Job,
    form: str,
    backends: list[Backend],
    errors: dict[str, agreement.Errors],
    fresh: list[Batch],
    on_gpu: dict[str, gpu.Measured],
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
        alike = {backend.name: losses[backend.name] for backend in backends if backend.precision == "float32"}
        alike |= {str(way): on_gpu[str(way)].results for way in settings.gpus if way.precision == "float32"}
        agreement.check_training(
            {name: [float(loss) for loss in each[:rounds]] for name, each in alike.items() if each}
        )
    times |= {name: each.seconds for name, each in on_gpu.items() if each.seconds}

    case = f"step, {job}, {form}"
    floor = Spread.of(times[PRODUCTS]).median
    limits = LIMITS.get((job, form), {})
    for name, each in times.items():
        spread = Spread.of(each)
        figures = {"of products": floor / spread.median}
        if name in losses:
            figures |= {"tokens/s": job.B * job.T / spread.median} | _figures(errors[name])
        elif name in on_gpu:
            figures = on_gpu[name].figures
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
    yield from (each.row(case, name) for name, each in on_gpu.items() if each.note)
    if form != TOUCHED:
        yield from settings.absent_rows(case)

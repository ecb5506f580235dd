"""The forward pass alone: logits of a fresh batch, nothing kept for a backward pass, no dropout."""

from benchmarks.contenders import agreement
from benchmarks.contenders.backends import Backend, NumPyBackend, PlainBackend
from benchmarks.contenders.torch_backends import NOT_HERE, TorchBackend, Way
from benchmarks.jobs import BOOK, QUICK_BOOK, Job, batches, text_for
from benchmarks.measure.ceilings import MatrixProducts
from benchmarks.results import NOT_MEASURED, Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved, ratio

PRODUCTS = "NumPy's matrix products"
TUNED = Limits(1.20, 1.0)


def run(settings: Settings, report: Report) -> None:
    """The book's job."""
    measure(QUICK_BOOK if settings.quick else BOOK, settings, report)


def measure(job: Job, settings: Settings, report: Report) -> None:
    """Add the case's rows to the report. Raises DisagreementError before anything is timed."""
    text = text_for(job.config.vocab_size)
    stream = batches(job, text)
    x, _ = next(stream)
    numpy = NumPyBackend(job.config)
    ways = [Way("tuned"), Way("book"), *settings.gpus]
    backends: list[Backend] = [numpy, PlainBackend(job.config)]
    backends += [TorchBackend(way, job.config, numpy.model.params) for way in ways]
    errors = agreement.check_logits(backends, job.config, numpy.model.params, x)
    fresh = [next(stream)[0] for _ in range(WARM_UPS + settings.runs)]

    def contender(backend: Backend) -> Contender:
        return Contender(lambda i: backend.forward(fresh[i]), backend.synchronise)

    products = MatrixProducts(job.config, job.B, job.T, backward=False)
    contenders = {backend.name: contender(backend) for backend in backends}
    contenders[PRODUCTS] = Contender(lambda i: products.run())
    with report.progress(f"forward, {job}", len(fresh) * len(contenders)) as tick:
        times = interleaved(contenders, settings.runs, tick)

    case, rows = f"forward, {job}", []
    floor = Spread.of(times[PRODUCTS]).median
    for name, each in times.items():
        spread = Spread.of(each)
        figures = {"of products": floor / spread.median}
        if name in errors:
            figures |= {"tokens/s": job.B * job.T / spread.median, "logit error": errors[name]}
        else:
            figures["GFLOP/s"] = products.flops / spread.median / 1e9
        ratios = {}
        if name == numpy.name:
            limits = {str(Way("tuned")): TUNED} if job.judged else {}
            ratios = {
                f"NumPy / {other}": Ratio(*ratio(times, name, other), limits.get(other, Limits()))
                for other in times
                if other != name
            }
        rows.append(Row(case, name, spread, figures, ratios))
    if not settings.gpus:
        rows += [Row(case, str(way), note=NOT_MEASURED) for way in NOT_HERE]
    report.add(rows, text.name)

"""The forward pass alone: logits of a fresh batch, nothing kept for a backward pass, no dropout.

On a GPU, each way is timed alone and uses the same few batches (gpu.py).
"""

from benchmarks.contenders import agreement
from benchmarks.contenders.backends import Backend, NumPyBackend, PlainBackend
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import BOOK, QUICK_BOOK, Job, batches, text_for
from benchmarks.measure import gpu
from benchmarks.measure.ceilings import MatrixProducts
from benchmarks.results import Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import WARM_UPS, Contender, Spread, interleaved, ratio
from numpy_gpt.cli.info import forward_flops

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
    params = numpy.model.params
    backends: list[Backend] = [numpy, PlainBackend(job.config)]
    backends += [TorchBackend(way, job.config, params) for way in settings.cpu]
    errors = agreement.check_logits(backends, job.config, params, x)
    fresh = [next(stream)[0] for _ in range(WARM_UPS + settings.runs)]

    def contender(backend: Backend) -> Contender:
        return Contender(lambda i: backend.forward(fresh[i]), backend.synchronise)

    products = MatrixProducts(job.config, job.B, job.T, backward=False)
    contenders = {backend.name: contender(backend) for backend in backends}
    contenders[PRODUCTS] = Contender(lambda i: products.run())
    with report.progress(f"forward, {job}", len(fresh) * len(contenders)) as tick:
        times = interleaved(contenders, settings.runs, tick)
    work = gpu.Work(
        job,
        params,
        [(tokens,) for tokens in fresh],
        check=lambda backend: {"logit error": agreement.check_logits([backend], job.config, params, x)[backend.name]},
        step=lambda backend, batch: backend.forward(*batch).shape,  # the logits themselves would fill the GPU
        flops=forward_flops(job.config, job.T),
    )
    on_gpu = gpu.measure(work, settings, report)
    times |= {name: each.seconds for name, each in on_gpu.items() if each.seconds}

    case, rows = f"forward, {job}", []
    floor = Spread.of(times[PRODUCTS]).median
    for name, each in times.items():
        spread = Spread.of(each)
        figures = {"of products": floor / spread.median}
        if name in errors:
            figures |= {"tokens/s": job.B * job.T / spread.median, "logit error": errors[name]}
        elif name in on_gpu:
            figures = on_gpu[name].figures
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
    rows += [each.row(case, name) for name, each in on_gpu.items() if each.note]
    rows += settings.absent_rows(case)
    report.add(rows, text.name)

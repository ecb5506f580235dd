"""Greedy decoding of one sequence: tokens per second, and the share of the rate at which memory delivers the weights.

With one sequence, a token uses each weight once, so no decoder can be faster than reading them; that reading is timed
in turn with the decoders. The book's decoder sends the full window through the model for every token. Tuned PyTorch is
not included: it would need a key-value cache, which torch does not provide.
"""

import numpy as np

from benchmarks.contenders.agreement import DisagreementError
from benchmarks.contenders.backends import Backend, NumPyBackend
from benchmarks.contenders.torch_backends import TorchBackend, Way
from benchmarks.jobs import BOOK, QUICK_BOOK, Job, text_for
from benchmarks.measure.ceilings import LongArray, WeightStream
from benchmarks.results import Limits, Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import Contender, Spread, interleaved, ratio

BOOKS = str(Way("book"))
PROMPT = 4
"""Tokens of the prompt."""

OF_MEMORY = "of the rate at which memory delivers the weights"
"""The rate of the faster of the two ways to read them."""

AGAINST_BOOKS, AGAINST_STREAM = Limits(15, better="higher"), Limits(0.9, better="higher")


def run(settings: Settings, report: Report) -> None:
    """200 tokens of the book's model (quick: 40 of the small one)."""
    job, tokens = (QUICK_BOOK, 40) if settings.quick else (BOOK, 200)
    measure(job, tokens, settings, report)


def check_tokens(generated: dict[str, np.ndarray]) -> None:
    """Raise DisagreementError naming the backend and the first token that differs from the first backend's."""
    (first, want), *others = generated.items()
    for name, got in others:
        if not np.array_equal(got, want):
            at = int(np.flatnonzero(got[0] != want[0])[0]) if got.shape == want.shape else min(got.size, want.size)
            raise DisagreementError(f"{name}: other tokens than {first}'s from position {at} on")


def measure(job: Job, new_tokens: int, settings: Settings, report: Report) -> None:
    """Add the case's rows to the report. Raises DisagreementError, before anything is timed, if tokens differ."""
    text = text_for(job.config.vocab_size)
    prompt = text.ids[None, :PROMPT]
    numpy = NumPyBackend(job.config)
    ways = [Way("book"), *(way for way in settings.gpus if way.style == "book")]
    backends: list[Backend] = [numpy, *(TorchBackend(way, job.config, numpy.model.params) for way in ways)]
    check_tokens({b.name: b.generate(prompt, new_tokens) for b in backends if b.precision == "float32"})

    def contender(backend: Backend) -> Contender:
        return Contender(lambda i: backend.generate(prompt, new_tokens), backend.synchronise)

    stream, long_array, passes = WeightStream(job.config), LongArray(0.1 if settings.quick else 1.0), new_tokens // 10
    contenders = {backend.name: contender(backend) for backend in backends}
    products, sums, reading = f"weights @ vector, {passes} ×", f"sums of weights, {passes} ×", "sum of a long array"
    contenders[products] = Contender(lambda i: stream.products(passes))
    contenders[sums] = Contender(lambda i: stream.sums(passes))
    contenders[reading] = Contender(lambda i: long_array.read())
    # the check above already ran each once; the book's decoder takes a minute for 200 tokens of 124M
    rounds = min(settings.runs, 3)
    with report.progress(f"decode, {job}", (rounds + 1) * len(contenders)) as tick:
        times = interleaved(contenders, rounds, tick, warm_ups=1)

    case, rows = f"decode, {job.model}, B=1, {new_tokens} tokens", []
    spreads = {name: Spread.of(each) for name, each in times.items()}
    fastest = min((products, sums), key=lambda name: spreads[name].median)
    stream_rate = passes * stream.bytes / spreads[fastest].median  # bytes/s
    moved = {products: passes * stream.bytes, sums: passes * stream.bytes, reading: long_array.bytes}
    for name, spread in spreads.items():
        rate = moved.get(name, new_tokens * stream.bytes) / spread.median
        figures = {} if name in moved else {"tokens/s": new_tokens / spread.median}
        if name in moved or name == numpy.name:  # the book's decoder is not limited by reading weights
            figures |= {"GB/s": rate / 1e9, "of streaming": rate / stream_rate}
        ratios = {}
        if name == numpy.name:
            of_pairs = ratio(times, fastest, name)[1]
            scale = new_tokens / passes  # each side's passes over the weights
            share = Spread(*(scale * each for each in vars(of_pairs).values()))
            against = ratio(times, BOOKS, name)
            ratios = {
                OF_MEMORY: Ratio(rate / stream_rate, share, AGAINST_STREAM if job.judged else Limits(better="higher")),
                "NumPy's tokens/s / book's": Ratio(*against, AGAINST_BOOKS if job.judged else Limits(better="higher")),
            }
        rows.append(Row(case, name, spread, figures, ratios))
    rows += settings.absent_rows(case, lambda way: way.style == "book")
    report.add(rows, f"{text.name}; weights read once for every token: {stream.bytes / 1e9:.3f} GB")

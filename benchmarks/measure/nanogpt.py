"""nanoGPT's example for a CPU, trained to its end on the same batches: seconds, and the loss on the validation text.

The settings are those of its README: 4 layers, 4 heads, 128 features, characters, 2,000 steps of 12 windows of 64.
"""

from dataclasses import replace
from time import perf_counter

import torch

from benchmarks.contenders.backends import NumPyBackend
from benchmarks.contenders.nano_gpt import NanoLearner
from benchmarks.results import Ratio, Report, Row
from benchmarks.settings import Settings
from benchmarks.timing import Spread, ratio
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.settings import Settings as RunSettings
from numpy_gpt.train import Learner, undrawn_loss
from torch_gpt.train import TorchLearner

EXAMPLE = RunSettings(
    model="tiny",
    n_layers=4,
    n_heads=4,
    emb_dim=128,
    encoding="chars",
    context_length=64,
    batch_size=12,
    max_steps=2000,
    lr=1e-3,
    warmup_steps=100,
    clip=1.0,
    betas=(0.9, 0.99),
    weight_decay=0.1,
    decay="2d",
    drop_rate=0.0,
)

NUMPY, TORCH, NANO = NumPyBackend.name, "torch_gpt", "nanoGPT's model"
TURN = 50
"""Steps that each makes in turn: so a busy machine slows all of them."""


def run(settings: Settings, report: Report) -> None:
    """All three, in turn; quick: 100 steps."""
    example = replace(EXAMPLE, max_steps=100) if settings.quick else EXAMPLE
    steps, batches = example.max_steps or 0, Batches(example)
    config = example.config(batches.encoding.n_vocab)
    cpu = {"device": torch.device("cpu")}
    learners: dict[str, Learner] = {
        NUMPY: NumpyLearner(config, example, steps),
        TORCH: TorchLearner(config, example, steps, **cpu),
        NANO: NanoLearner(config, example, steps, **cpu),
    }
    loader, validation = batches.loaders(learners[NUMPY])
    order = list(_epochs(loader, steps))
    times: dict[str, list[float]] = {name: [] for name in learners}
    losses: dict[str, list[float]] = {name: [] for name in learners}
    case = f"nanoGPT's example, {steps} steps"
    with report.progress(case, len(learners) * -(-steps // TURN)) as tick:
        for start in range(0, steps, TURN):
            for name, learner in learners.items():
                tick(name)
                begun = perf_counter()
                for step in range(start, min(start + TURN, steps)):
                    losses[name].append(learner.train_step(*order[step], step)[0])
                times[name].append((perf_counter() - begun) / (min(start + TURN, steps) - start))
    rows = []
    for name, learner in learners.items():
        figures = {
            "tokens/s": example.batch_size * example.context_length / Spread.of(times[name]).median,
            "val loss": undrawn_loss(learner, validation, len(validation)),
        }
        ratios = {}
        if name == NUMPY:
            figures["apart"] = max(abs(a - b) for a, b in zip(losses[NUMPY], losses[TORCH], strict=True))
            ratios = {f"NumPy / {other}": Ratio(*ratio(times, name, other)) for other in (TORCH, NANO)}
        rows.append(Row(case, name, Spread.of(times[name]), figures, ratios))
    report.add(rows, f"{example.text}, characters; apart: the largest difference of a step's loss from {TORCH}'s")


def _epochs(loader, steps):
    """The first `steps` batches, epoch after epoch."""
    while steps > 0:
        for batch in loader:
            if steps > 0:
                yield batch
            steps -= 1

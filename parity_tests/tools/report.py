"""Measures the errors of every operation and of complete models, NumPy's and torch's.

In float32 the truth is torch's float64 answer to the same float32 inputs. In float64 no better truth is available, so
the measure is the distance between NumPy and torch. A tensor's error is its largest, relative to its largest element
(for a model's gradients: to the largest gradient). The share is of the budget in judge/compare.py.
"""

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from numpy_gpt import GPTConfig
from parity_tests.judge import compare, models
from parity_tests.judge.operations import OPERATIONS, our_answer, torch_answers
from parity_tests.judge.strategies import ModelCase, OperationCase

LENGTHS = (8, 64, 256)
SCALES = (0.01, 0.3, 1.0, 3.0)
DEPTHS = (1, 2, 4, 8, 12)
DTYPES = ("float32", "float64")
SHAPE = {"B": 2, "C": 64, "I": 64, "O": 64, "V": 500, "NH": 4, "HS": 16, "past": 0, "start": 0, "rest": 0}
CASES = 128
"""Cases for the float32 rule: those of the test suite."""


@dataclass(frozen=True)
class Row:
    """One tensor's errors against float64; in float64, NumPy's distance from torch and that of torch's two attentions.

    torch is None in float64 where torch has only one implementation; share is None for a model in float32, which has
    another rule.
    """

    operation: str
    tensor: str
    dtype: str
    depth: int | None
    T: int
    scale: float
    numpy: float
    torch: float | None
    share: float | None

    @property
    def ratio(self):
        """NumPy's error over torch's; None if torch's is 0 or unknown."""
        return None if not self.torch else self.numpy / self.torch


def _largest(a):
    return float(np.abs(np.asarray(a, np.float64)).max())


def _most(numbers):
    """The largest number, or NaN if any is NaN: Python's max could drop it."""
    return float(np.max(list(numbers)))


def operation_rows(operation, dtype, T, scale):
    """Rows for an operation's tensors; torch's error is its implementations' largest (attention has two or three)."""
    inputs = OPERATIONS[operation].inputs(OperationCase({**SHAPE, "T": T}, scale=scale, dtype=dtype))
    got, scales = our_answer(operation, inputs), OPERATIONS[operation].scales(**inputs)
    truth = next(iter(torch_answers(operation, inputs).values()))
    answers = list(torch_answers(operation, inputs, getattr(torch, dtype)).values())
    others = answers if dtype == "float32" else answers[1:]
    limit = 64 * float(np.finfo(dtype).eps)
    for tensor, want in truth.items():
        error, size, S = np.abs(np.asarray(got[tensor], np.float64) - want), _largest(want) or 1.0, scales[tensor]
        share = (
            0.0 if S is None else float(np.divide(error, limit * S, where=error != 0, out=np.zeros_like(error)).max())
        )
        torchs = _most(_largest(answer[tensor] - want) for answer in others) / size if others else None
        yield Row(operation, tensor, dtype, None, T, scale, _largest(error) / size, torchs, share)


def model_rows(dtype, depth, T, scale):
    """Rows for a model of this depth: logits, loss and the worst gradient."""
    case = ModelCase(GPTConfig(200, T, 48, 4, depth, drop_rate=0.0), B=2, T=T, scale=scale, dtype=dtype)
    truth = models.torch_answers(case, "plain", torch.float64)
    model, batch = case.model(), case.batch()
    loss, grads = model.loss_and_grads(*batch)
    got = {"logits": model(batch[0]), "loss": loss} | {f"d {name}": grad for name, grad in grads.items()}
    ways = ("plain", "sdpa") if dtype == "float32" else ("sdpa",)
    others = [models.torch_answers(case, way, getattr(torch, dtype)) for way in ways]
    kinds = {"logits": ["logits"], "loss": ["loss"], "gradients": [name for name in truth if name.startswith("d ")]}
    for kind, tensors in kinds.items():
        size = max(_largest(truth[name]) for name in tensors)

        def worst(answer, tensors=tensors, size=size):
            return _most(_largest(answer[name] - np.asarray(truth[name], np.float64)) for name in tensors) / size

        numpys, torchs = worst(got), _most(map(worst, others))
        budget = compare.MODEL.factor * float(np.finfo(np.float64).eps)
        share = numpys / budget if dtype == "float64" and kind != "loss" else None
        yield Row("model", kind, dtype, depth, T, scale, numpys, torchs, share)


def cases(quick=False):
    """The measurements: functions that yield rows, and their arguments."""
    lengths, scales, depths = (LENGTHS, SCALES, DEPTHS) if not quick else (LENGTHS[:2], SCALES[1:2], DEPTHS[:2])
    for operation in OPERATIONS:
        if operation == "dropout":  # exact, as the suite asserts
            continue
        for dtype in DTYPES:
            yield from ((operation_rows, (operation, dtype, T, scale)) for T in lengths for scale in scales)
    for dtype in DTYPES:
        yield from ((model_rows, (dtype, depth, T, scale)) for depth in depths for T in lengths for scale in scales)


def sort(case):
    """The label of one of `cases`: its operation, or the kind of model."""
    measure, (first, *_) = case
    return first if measure is operation_rows else f"models, {first}"


def worst_rows(rows):
    """For every tensor, the float32 row with the largest ratio and the float64 row with the largest share or error.

    A NaN counts as worse than any number.
    """
    worst = {}
    for row in rows:
        numbers = (row.ratio if row.dtype == "float32" else row.share) or 0.0, row.numpy
        badness = any(map(math.isnan, numbers)), *(0.0 if math.isnan(x) else x for x in numbers)
        key = (row.operation, row.tensor, row.dtype)
        if key not in worst or badness > worst[key][0]:
            worst[key] = badness, row
    return [row for _, row in worst.values()]


def float32_rule(quick=False):
    """Tensor kind -> 95th percentile of NumPy's error over torch's: without dropout and with 0.1, weights up to 1."""
    count = 6 if quick else CASES
    return {
        f"dropout {rate:g}": models.float32_percentiles([models.float32_case(i, drop_rate=rate) for i in range(count)])
        for rate in (0.0, 0.1)
    }


def machine():
    """A line that describes the machine and the versions."""
    return (
        f"{platform.machine()}, NumPy {np.__version__}, Python {platform.python_version()}, "
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})"
    )


def write_json(path, rows, rule):
    """Write every row, the float32 rule and the machine."""
    figures = [asdict(row) | {"ratio": row.ratio} for row in rows]
    Path(path).write_text(json.dumps({"machine": machine(), "rows": figures, "float32 rule": rule}, indent=1) + "\n")


def draw(path, rows):
    """Plot NumPy's and torch's float32 errors of a model's logits and gradients against depth and T."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    models = [row for row in rows if row.operation == "model" and row.dtype == "float32"]
    scale = sorted({row.scale for row in models})[len({row.scale for row in models}) // 2 - 1]
    depths, lengths = sorted({row.depth for row in models}), sorted({row.T for row in models})
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, label, key, fixed, at in (
        (panels[0], "layers", "depth", "T", lengths[len(lengths) // 2]),
        (panels[1], "T, tokens", "T", "depth", depths[len(depths) // 2]),
    ):
        for tensor, marker in (("logits", "o"), ("gradients", "s")):
            line = [r for r in models if r.tensor == tensor and r.scale == scale and getattr(r, fixed) == at]
            xs = [getattr(row, key) for row in line]
            axes.plot(xs, [row.numpy for row in line], f"C0{marker}-", label=f"{tensor}, NumPy")
            axes.plot(xs, [row.torch for row in line], f"C1{marker}--", label=f"{tensor}, PyTorch")
        axes.axhline(float(np.finfo(np.float32).eps), color="0.6", linewidth=0.8)
        axes.text(xs[0], float(np.finfo(np.float32).eps), "eps ", va="bottom", color="0.4", fontsize=8)
        axes.set(xscale="log", yscale="log", xlabel=label, xticks=xs, xticklabels=xs)
        axes.set_title(f"{fixed} = {at}", fontsize=10)
        axes.minorticks_off()
    panels[0].set_ylabel("largest error / largest number, float32")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Error against float64 of a GPT of width 48, weights of scale {scale:g}", fontsize=11)
    figure.savefig(path, dpi=150)

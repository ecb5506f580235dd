"""Checks of torch on another device in float32: no worse than torch on the CPU, and as near to NumPy as that implies.

The rule is that of float32 in judge/models.py, with the device's torch in NumPy's place: over all cases, the 95th
percentile of its error against float64 is at most twice the budget, which the CPU's torch sets. NumPy keeps to the same
rule, so the two may differ by the sum, four times the budget.
"""

from contextlib import contextmanager

import numpy as np
import torch

from parity_tests.judge import compare
from parity_tests.judge.models import errors_by_kind, float32_budget, numpy_answers, torch_answers

LIMITS = {"error": 2, "distance from NumPy": 4}
"""What is measured -> the largest 95th percentile of its ratio to the budget."""

ATTENTIONS = ("plain", "sdpa")


@contextmanager
def full_precision():
    """Products of float32 in float32: TF32 off, and no sums in fewer bits than the operands' product."""
    products, precision = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    torch.set_float32_matmul_precision("highest")
    for name in names:
        setattr(products, name, False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        for name, value in before.items():
            setattr(products, name, value)


def float32_ratios(case, device):
    """(measure, attention, tensor kind) -> its ratio to the budget, for a float32 case; measures: those of LIMITS."""
    want = torch_answers(case, "plain", torch.float64)
    budget, numpys = float32_budget(case, want), numpy_answers(case)
    ratios = {}
    for attention in ATTENTIONS:
        with full_precision():
            got = torch_answers(case, attention, torch.float32, device)
        for measure, reference in zip(LIMITS, (want, numpys), strict=True):
            for kind, error in errors_by_kind(got, reference).items():
                ratios[measure, attention, kind] = error / budget[kind]
    return ratios


class Float32Rule:
    """Collects the ratios of many cases, then judges them together."""

    def __init__(self, device):
        self.device = device
        self._ratios: dict = {}

    def add(self, case):
        for key, ratio in float32_ratios(case, self.device).items():
            self._ratios.setdefault(key, []).append((ratio, case))

    def failures(self):
        """A line for each tensor kind whose 95th percentile is above its limit, with the case that is worst in it."""
        wrong = []
        for (measure, attention, kind), found in self._ratios.items():
            value, limit = float(np.percentile([ratio for ratio, _ in found], 95)), LIMITS[measure]
            title = f"torch on {self.device}: float32: 95th percentile of {measure} / the CPU's error, at most {limit}"
            compare.record(title, f"{kind} ({attention})", value)
            if not value <= limit:
                worst = max(found, key=lambda each: (np.isnan(each[0]), each[0]))[1]
                wrong.append(f"{kind} ({attention}): {measure} {value:.3g}x the budget, at most {limit}; {worst}")
        return wrong

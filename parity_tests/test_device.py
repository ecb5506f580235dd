"""numpy_gpt against torch on another device: pytest --device cuda. Without the option, torch on the CPU.

Logits, loss and every gradient, with both attentions. In float64 the budget is the one of the CPU; in float32, without
TF32, it is the CPU's error.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from numpy_gpt import GPTConfig
from numpy_gpt.errors import InputError
from parity_tests.judge import compare, devices, models, strategies
from parity_tests.judge.models import check_model, torch_answers
from parity_tests.judge.strategies import ModelCase
from torch_gpt.model import loss_and_grads
from torch_gpt.train import check_dtype

ROOT = Path(__file__).parent.parent

CASES = 100
"""At least 60, so that the 95th percentile is not the largest of a few."""

UP_TO_1 = st.integers(0, 100).map(lambda i: 10 ** (i / 50 - 2))
"""Scales of weights from 1e-2 to 1, log-uniform: models with larger ones amplify rounding at random."""


@pytest.mark.parametrize("attention", devices.ATTENTIONS)
def test_float64_matches_torch_on_the_device(attention, device):
    try:
        check_dtype("float64", device)
    except InputError as error:
        pytest.skip(str(error))

    @settings(max_examples=50)
    @given(case=strategies.model_cases())
    @example(ModelCase(GPTConfig(2, 1, 4, 2, 1, 0.0, qkv_bias=True), B=1, T=1))
    @example(ModelCase(GPTConfig(301, 150, 48, 3, 2, 0.0), B=3, T=150, scale=0.2))
    def holds(case):
        with compare.recorded_for(f"torch on {device}"):
            check_model(case, attention, device)

    holds()


def test_float32_on_the_device_is_no_worse_than_on_the_cpu(device):
    rule = devices.Float32Rule(device)

    @settings(max_examples=CASES)
    @given(case=strategies.model_cases(scales=UP_TO_1))
    def add(case):
        rule.add(replace(case, dtype="float32", layout="C"))

    add()
    for i in range(12):  # wider and longer than Hypothesis's
        rule.add(models.float32_case(i))
    failures = rule.failures()
    assert failures == [], "\n".join(failures)


# The checks themselves


@pytest.fixture
def on_device(monkeypatch):
    """Puts a function in the place of torch_answers where that is asked for the device's answers."""
    real = devices.torch_answers

    def put(answers):
        def chosen(case, attention, dtype, *device):
            return (answers if device else real)(case, attention, dtype, *device)

        monkeypatch.setattr(compare, "record", lambda *_: None)
        monkeypatch.setattr(devices, "torch_answers", chosen)

    return put


def fails_float32(cases):
    """The rule's failures on the first cases, of which there must be some."""
    rule = devices.Float32Rule("cpu")
    for i in range(cases):
        rule.add(models.float32_case(i))
    failures = rule.failures()
    assert failures, "the rule sees no failure"
    return failures


@pytest.mark.parametrize("name", ["logits", "loss", "d trf_blocks.0.att.W_key.weight", "d tok_emb.weight"])
@pytest.mark.parametrize("factor", [1 + 1e-4, np.nan])
def test_wrong_float32_answer_on_the_device_is_found(name, factor, on_device):
    def wrong(*asked):
        found = torch_answers(*asked)
        return found | {name: found[name] * np.float32(factor)}

    on_device(wrong)
    lines, kind = fails_float32(6), compare.kind(name)
    starts = [f"{kind} ({attention}): {measure} " for attention in devices.ATTENTIONS for measure in devices.LIMITS]
    assert sorted(line.partition("x the budget, at most")[0].rpartition(" ")[0] + " " for line in lines) == sorted(
        starts
    )


def test_tf32_on_the_device_is_found(on_device, monkeypatch):
    """Rounds the operands of the linear layers' forward products to TF32's 10 bits."""
    linear = functional.linear

    def rounded(x):
        bits = x.detach().contiguous().view(torch.int32)
        return x + (((bits + 0x1000) & ~0x1FFF).view(torch.float32) - x).detach()

    def in_tf32(*asked):
        with monkeypatch.context() as patch:
            patch.setattr(functional, "linear", lambda x, w, b=None: linear(rounded(x), rounded(w), b))
            return torch_answers(*asked)

    on_device(in_tf32)
    assert {line.partition(" (")[0] for line in fails_float32(12)} >= {"logits", "loss", "d tok_emb.weight"}


def test_wrong_float64_gradient_on_the_device_is_found(monkeypatch):
    def wrong(*asked):
        loss, grads = loss_and_grads(*asked)
        return loss, grads | {"pos_emb.weight": grads["pos_emb.weight"] * (1 + 1e-9)}

    monkeypatch.setattr(compare, "record", lambda *_: None)
    monkeypatch.setattr(models, "loss_and_grads", wrong)
    with pytest.raises(AssertionError, match=r"d pos_emb\.weight"):
        check_model(ModelCase(models.SMALL), "sdpa", "cpu")


def test_tf32_is_off_during_the_checks():
    torch.set_float32_matmul_precision("high")
    products = torch.backends.cuda.matmul
    try:
        with devices.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not products.allow_tf32
            assert not products.allow_bf16_reduced_precision_reduction
        assert torch.get_float32_matmul_precision() == "high"
        assert products.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")


def test_absent_device_is_a_usage_error():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "parity_tests/test_device.py"]
    done = subprocess.run([*command, "--device", "cuda:99"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    said = r"ERROR: --device: device cuda:99 is not available here: choose one of .*cpu"
    assert re.fullmatch(said, done.stderr.strip()), done.stderr

"""The book's printed figures, from NumPy alone."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import GPT, GPTConfig, chapter5, generate
from numpy_gpt.chapter5 import Figure, close, probabilities, same
from numpy_gpt.cli import main
from numpy_gpt.tokenizer import decode, encode, get_encoding


@pytest.fixture(scope="module")
def book():
    """The chapter's figures, with full digits where torch was run again on a CPU."""
    folder = os.environ.get("NUMPY_GPT_DATA")
    if not folder:
        pytest.skip("needs chapter5.json and the story: set NUMPY_GPT_DATA")
    return json.loads(Path(folder, "chapter5.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def untrained():
    return GPT(GPTConfig(), seed=123)


@pytest.mark.slow
def test_the_initial_parameters_are_torchs(book, untrained):
    digest = hashlib.sha256()
    for array in untrained.params.values():
        digest.update(array.tobytes())
    assert digest.hexdigest() == book["initial_parameters_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_the_untrained_figures_are_the_books(book, untrained):
    """Straight from the public interface, without the code of the command chapter5."""
    figures = book["untrained"]
    encoding = get_encoding("gpt2")
    ids = generate(untrained, encode(encoding, figures["prompt"])[None], 10)
    assert decode(encoding, ids[0]) == figures["greedy_10"]
    inputs, targets = np.array(figures["inputs"]), np.array(figures["targets"])
    logits = untrained(inputs)
    assert logits.argmax(-1).tolist() == figures["argmax"]
    z = logits.astype(np.float64)
    log_probs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    at_target = np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    assert [f"{p:.4f}" for p in at_target.ravel()] == [f"{p:.4f}" for p in figures["log_probas"]]
    # five printed digits, and one float32 step of a logarithm near 10: the first probability lies on a rounding edge
    printed = np.array(figures["target_probas"])
    half_digit = 0.5e-4 * 10.0 ** np.floor(np.log10(printed))
    assert np.all(np.abs(np.exp(at_target) - printed) <= half_digit + printed * 2.0**-20)
    loss = untrained.loss(inputs, targets)
    assert f"{loss:.4f}" == f"{figures['cross_entropy']:.4f}"
    assert abs(np.exp(float(loss)) - figures["perplexity"]) <= 0.05


@pytest.mark.slow
def test_chapter5_agrees_with_torch_out_of_reach(book):
    code = "import sys; sys.modules['torch'] = None; from numpy_gpt.cli import main; main(['chapter5'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "every figure agrees" in result.stdout
    loaders = book["loaders"]
    for figure in ("initial_train_loss_printed_cuda", "initial_val_loss"):
        assert f"printed  {loaders[figure]}" in result.stdout


def test_a_figure_that_is_off_is_said_and_fails(monkeypatch):
    shown = [same(4, "tokens", 5, 5), Figure(5, "loss", "1.0", "2.0", False)]
    monkeypatch.setattr(chapter5, "figures", lambda text: iter(shown))
    result = CliRunner().invoke(main, ["chapter5"])
    assert result.exit_code == 1
    assert result.output.count("OFF") == 1
    assert "1 figure is off" in result.output
    monkeypatch.setattr(chapter5, "figures", lambda text: iter(shown[:1]))
    result = CliRunner().invoke(main, ["chapter5"])
    assert result.exit_code == 0
    assert "every figure agrees" in result.output


def test_what_counts_as_agreeing():
    assert same(1, "shape", "(2, 3)", (2, 3)).agrees
    assert not same(1, "shape", "(2, 3)", (3, 2)).agrees
    assert close(1, "loss", "10.5", 10.5 + 9e-6, 1e-5, "").agrees
    assert not close(1, "loss", "10.5", 10.5 - 2e-5, 1e-5, "").agrees
    assert probabilities(1, "p", ["7.4541e-05"], np.array([7.45405e-05])).agrees
    assert not probabilities(1, "p", ["7.4541e-05"], np.array([7.4539e-05])).agrees
    assert not probabilities(1, "p", ["1.0000e-05", "4.7559e-06"], np.array([1e-5, 4.7561e-06])).agrees

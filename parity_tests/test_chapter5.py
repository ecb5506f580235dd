"""The book's printed figures, reproduced with NumPy alone."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import GPT, Generator, GPTConfig, generate
from numpy_gpt.book import chapter5
from numpy_gpt.book.chapter5 import Figure
from numpy_gpt.book.figures import PRINTED, TOY_LOGITS, Printed, close, losses, probabilities, sample
from numpy_gpt.cli.main import main
from numpy_gpt.console import one_line
from numpy_gpt.decoding import softmax
from numpy_gpt.errors import InputError
from numpy_gpt.random.generator import PLATFORMS
from numpy_gpt.runs.settings import Settings
from numpy_gpt.tokenizer import decode, encode, get_encoding
from parity_tests.judge import compare

FIGURES = json.loads(Path(__file__).with_name("chapter5_figures.json").read_text(encoding="utf-8"))
"""The chapter's figures, with full digits where torch was rerun on a CPU. Contains no texts."""


@pytest.fixture
def story():
    if not os.environ.get("NUMPY_GPT_DATA"):
        pytest.skip("needs the story: set NUMPY_GPT_DATA")


@pytest.fixture(scope="module")
def untrained():
    return GPT(GPTConfig(), seed=123)


def without_torch(code, timeout):
    """The output of this code in a Python process that cannot import torch."""
    code = f"import sys; sys.modules['torch'] = None\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_initial_parameters_match_torch():
    code = """
import hashlib
from numpy_gpt import GPT, GPTConfig
digest = hashlib.sha256()
for array in GPT(GPTConfig(), seed=123).params.values():
    digest.update(array.tobytes())
print(digest.hexdigest())
"""
    assert without_torch(code, timeout=1200).strip() == FIGURES["initial_parameters_sha256"]


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_untrained_figures_match_the_book(untrained):
    """Use the public interface directly, without the code of the command chapter5."""
    figures = FIGURES["untrained"]
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
    # five printed digits, plus one float32 step of a logarithm near 10: the first probability is on a rounding edge
    printed = np.array(figures["target_probas"])
    half_digit = 0.5e-4 * 10.0 ** np.floor(np.log10(printed))
    assert np.all(np.abs(np.exp(at_target) - printed) <= half_digit + printed * 2.0**-20)
    loss = untrained.loss(inputs, targets)
    assert f"{loss:.4f}" == f"{figures['cross_entropy']:.4f}"
    assert abs(np.exp(float(loss)) - figures["perplexity"]) <= 0.05


def blocks(output):
    """`chapter5`'s output as (cell, figure) -> {"printed": text, "NumPy": text, …, "": verdict}."""
    found, here = {}, {}
    for line in output.split("\n\n")[0].splitlines():
        if line.startswith("    "):
            name = line[4:11].strip()
            if name in ("printed", "NumPy", "torch"):
                here[name] = line[13:]
            else:
                here[""] = line[4:]
        else:
            here = found.setdefault(tuple(line.split("  ", 1)), {})
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads", "story")
def test_full_chapter_with_numpy_alone():
    """Ten epochs with dropout: every loss within 5e-5 of torch's own run, every text word for word."""
    output = without_torch("from numpy_gpt.cli.main import main; main(['chapter5'])", timeout=3600)
    assert f"every figure agrees ({len(PRINTED)} of {len(PRINTED)})" in output
    found = blocks(output)
    assert len(found) == len(PRINTED)
    assert len(FIGURES["training"]["rows_cpu"]) == 18
    for row in FIGURES["training"]["rows_cpu"]:
        got = found["5.2", f"losses after step {row['step']}"]["NumPy"]
        epoch, step, *losses = re.fullmatch(r"Ep (\d+) \(Step (\d+)\): Train loss (\S+), Val loss (\S+)", got).groups()
        assert (int(epoch), int(step)) == (row["epoch"], row["step"])
        error = max(abs(float(ours) - row[name]) for ours, name in zip(losses, ("train_loss", "val_loss"), strict=True))
        compare.record("the book's ten epochs: |NumPy's loss - torch's|, at most 5e-5", f"step {step}", error)
        assert error <= 5e-5, f"step {step}: {losses}, torch has {row}"
    samples = texts_of_training(PRINTED)
    assert len(samples) == 12
    for name in samples:
        assert found[PRINTED[name].where, PRINTED[name].what]["NumPy"] == one_line(PRINTED[name].text)


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads", "story")
def test_torch_has_its_own_column():
    result = subprocess.run([sys.executable, "-m", "numpy_gpt", "chapter5", "--quick"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    found = blocks(result.stdout)
    of_the_text = {(PRINTED[name].where, PRINTED[name].what) for name in chapter5.OF_THE_TEXT & set(PRINTED)}
    for name, columns in found.items():
        assert set(columns) == {"printed", "NumPy", ""} | ({"torch"} if name not in of_the_text else set())
    quick = [name for name in PRINTED if not name.startswith(("step", "epoch", "greedy 25", "top-k"))]
    assert [(PRINTED[name].where, PRINTED[name].what) for name in quick] == list(found)
    assert f"every figure agrees ({len(quick)} of {len(quick)})" in result.stdout
    assert PLATFORMS in result.stdout
    differ = [name for name, row in found.items() if name not in of_the_text and row["torch"] != row["NumPy"]]
    assert differ, "the columns are separate calculations, so some digits must differ"


def test_printed_figures_match_the_json():
    """chapter5_figures.json is an independent transcript of the chapter, with full digits where torch was rerun."""
    untrained, loaders, training, decoding = (FIGURES[key] for key in ("untrained", "loaders", "training", "decoding"))
    inputs = (untrained["prompt"], untrained["inputs"], untrained["targets"])
    assert (Settings().prompt, chapter5.INPUTS.tolist(), chapter5.TARGETS.tolist()) == inputs
    values = {
        "greedy 10": untrained["greedy_10"],
        "argmax": [[[i] for i in row] for row in untrained["argmax"]],
        "argmax text": untrained["argmax_row0_text"],
        "probas 0": untrained["target_probas"][0],
        "probas 1": untrained["target_probas"][1],
        "log probas": untrained["log_probas"],
        "cross-entropy": untrained["cross_entropy"],
        "perplexity": untrained["perplexity"],
        "story": FIGURES["text"]["sha256"],
        "characters": FIGURES["text"]["characters"],
        "tokens": FIGURES["text"]["gpt2_tokens"],
        "train tokens": loaders["train_tokens"],
        "val tokens": loaders["val_tokens"],
        "train batches": str(loaders["train_batches"] * [((2, 256), (2, 256))]),
        "val batches": str(loaders["val_batches"] * [((2, 256), (2, 256))]),
        "train loss": loaders["initial_train_loss_printed_cuda"],
        "val loss": loaders["initial_val_loss"],
        "toy top 3": decoding["toy_top3_probas"],
    }
    values |= {f"step {row['step']}": [row["train_loss"], row["val_loss"]] for row in training["rows_cpu"]}
    counts = decoding["toy_multinomial_1000_seed123_counts_by_temperature"]
    values |= {f"toy {float(temperature)}": str(each) for temperature, each in counts.items()}
    assert list(TOY_LOGITS) == decoding["toy_logits"]
    for name, value in values.items():
        assert PRINTED[name].agrees(value), (name, PRINTED[name].text, value)
    for row in training["rows_cpu"]:
        line = f"Train loss {row['train_loss']:.3f}, Val loss {row['val_loss']:.3f}"
        assert PRINTED[f"step {row['step']}"].text == f"Ep {row['epoch']} (Step {row['step']:06d}): {line}"
    not_in_it = {"mean", "negative mean", "target text", "all tokens"} | {n for n in PRINTED if "shape" in n}
    assert set(PRINTED) == set(values) | not_in_it | set(texts_of_training(PRINTED))


def texts_of_training(names):
    """Names of the trained model's texts: passages of the story, not in the JSON file."""
    return [name for name in names if name.startswith(("epoch", "greedy 25", "top-k"))]


def check_part(part, whole, where=""):
    """Assert that every figure of part is in whole, at the same path."""
    if isinstance(part, dict):
        for key, value in part.items():
            assert key in whole, f"{where}/{key}"
            check_part(value, whole[key], f"{where}/{key}")
    else:
        assert part == whole, f"{where}: {part}, should be {whole}"


def test_figures_and_texts_match_the_full_transcript():
    """Check against chapter5.json in NUMPY_GPT_DATA, if present; the file is not public."""
    path = Path(os.environ.get("NUMPY_GPT_DATA", ""), "chapter5.json")
    if not path.is_file():
        return
    book = json.loads(path.read_text(encoding="utf-8"))
    check_part({name: value for name, value in FIGURES.items() if name != "source"}, book)
    decoding = book["decoding"]
    texts = {
        "greedy 25": decoding["greedy_25_cpu"],
        "top-k 25": decoding["top_k25_temperature1.4_seed123_15_tokens_cpu"],
    }
    texts |= {f"epoch {i}": text for i, text in enumerate(book["training"]["greedy_50_after_each_epoch_cpu"], 1)}
    assert set(texts) == set(texts_of_training(PRINTED))
    for name, text in texts.items():
        assert PRINTED[name].agrees(text), (name, PRINTED[name].text, text)
        assert one_line(PRINTED[name].text) == one_line(text)


def test_draws_from_the_toy_vocabulary():
    """1,000 single draws at each temperature, from the softmax directly."""
    toy = FIGURES["decoding"]
    for temperature, counts in toy["toy_multinomial_1000_seed123_counts_by_temperature"].items():
        rng, p = Generator(123), softmax(np.array([toy["toy_logits"]], np.float32) / np.float32(temperature))[0]
        drawn = [toy["toy_vocabulary"][rng.multinomial(p)[0]] for _ in range(1000)]
        assert [drawn.count(word) for word in toy["toy_vocabulary"]] == counts


def invoke_on(monkeypatch, *shown):
    monkeypatch.setattr(chapter5, "figures", lambda *args: iter(shown))
    return CliRunner().invoke(main, ["chapter5"])


def test_figure_off_is_reported_and_fails(monkeypatch):
    tokens, loss = Printed("In [24]", "tokens", "5"), close("In [30]", "loss", "1.5", 1e-5, "± 1e-5")
    both = Figure(tokens, {"NumPy": 5, "torch": 5})
    result = invoke_on(monkeypatch, both, Figure(loss, {"NumPy": 2.0, "torch": 1.5}))
    assert result.exit_code == 1
    lines = ["In [30]  loss", "    printed  1.5", "    NumPy    2.0", "    torch    1.5", "    NumPy OFF (± 1e-5)"]
    assert "\n".join(lines) in result.output
    assert "figures off: 1 of 2 in NumPy\n" in result.output
    result = invoke_on(monkeypatch, Figure(tokens, {"NumPy": 5, "torch": 6}), Figure(tokens, {"NumPy": 7, "torch": 6}))
    assert result.exit_code == 1
    assert "torch OFF" in result.output
    assert "NumPy and torch OFF" in result.output
    assert "figures off: 2 of 2 in torch, 1 of 2 in NumPy" in result.output
    assert PLATFORMS in result.output
    result = invoke_on(monkeypatch, Figure(tokens, {"NumPy": 5}))
    assert result.exit_code == 0
    assert "every figure agrees (1 of 1)" in result.output


@pytest.mark.parametrize("flags", [[], ["--no-torch"], ["--quick"]])
def test_flags_of_chapter5(monkeypatch, flags):
    seen = []
    monkeypatch.setattr(chapter5, "figures", lambda *args: seen.append(args[1:3]) or [])
    assert CliRunner().invoke(main, ["chapter5", *flags]).exit_code == 0
    assert seen == [("--quick" in flags, "--no-torch" not in flags)]


def test_failing_torch_replay_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="--no-torch"):
        list(chapter5.torch_replay("the-verdict", quick=True))


def test_other_text_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("I had always thought Jack Gisburn rather a cheap genius")
    result = CliRunner().invoke(main, ["chapter5", "--no-torch", "--text", str(short)])
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"Error: {short} is not the chapter's story, the basis of its figures: give the story, or omit --text\n"
    )


def test_columns_of_different_lengths_fail(monkeypatch):
    """A column that ends early must not count as agreement."""
    monkeypatch.setattr(chapter5, "replay", lambda *args: (item for item in [("tokens", 5145), ("characters", 20479)]))
    monkeypatch.setattr(chapter5, "torch_replay", lambda *args: (item for item in [("tokens", 5145)]))
    with pytest.raises(ValueError, match="shorter"):
        list(chapter5.figures("", True, True, lambda text: None))


def test_torch_has_no_column_for_text_figures(monkeypatch):
    """Properties of the text are not computed by torch; a loss is."""
    items = [("tokens", 5145), ("train batches", "[]"), ("train loss", 10.9)]
    monkeypatch.setattr(chapter5, "replay", lambda *args: (item for item in items))
    monkeypatch.setattr(chapter5, "torch_replay", lambda *args: (item for item in items))
    found = [set(figure.found) for figure in chapter5.figures("", True, True, lambda text: None)]
    assert found == [{"NumPy"}, {"NumPy"}, {"NumPy", "torch"}]


def test_readme_states_the_platform_limits():
    """The README uses the same wording as chapter5's output."""
    assert PLATFORMS in (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_agreement_rules():
    assert Printed("", "shape", "(2, 3)").agrees((2, 3))
    assert not Printed("", "shape", "(2, 3)").agrees((3, 2))
    assert close("", "loss", "10.5", 1e-5, "").agrees(10.5 + 9e-6)
    assert not close("", "loss", "10.5", 1e-5, "").agrees(10.5 - 2e-5)
    assert not close("", "loss", "10.5", 1e-5, "").agrees(math.nan)
    assert probabilities("", "p", ["7.4541e-05"]).agrees([7.45405e-05])
    assert not probabilities("", "p", ["7.4541e-05"]).agrees([7.4539e-05])
    assert not probabilities("", "p", ["1.0000e-05", "4.7559e-06"]).agrees([1e-5, 4.7561e-06])
    line = losses(5, 1, "8.111", "8.339")
    assert line.agrees([8.11046, 8.33954])
    assert not line.agrees([8.11040, 8.339])
    assert not line.agrees([8.111, 8.33956])
    assert sample("", "", "a\n\nb").agrees("a\n\nb")
    assert not sample("", "", "a\n\nb").agrees("a  b")

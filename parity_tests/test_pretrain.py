"""Pretraining end to end through the commands: both backends, resuming, stopping, and refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch

from numpy_gpt import GPT, Generator, GPTConfig, load, save
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.runs.evaluation import mean_loss
from numpy_gpt.runs.folder import _sha256 as run_sha256
from numpy_gpt.runs.losses import COLUMNS, Losses
from numpy_gpt.runs.settings import ADDED, Settings
from numpy_gpt.weights.checkpoint import load_training
from parity_tests.judge.runs import SMALL, check_refused, invoke, pretrain, rows, snapshot
from torch_gpt.cli import main as torch_main
from torch_gpt.train import choose_device, learning_rates

brief = pytest.mark.usefixtures("brief_runs")


def losses(out):
    return np.array([[float(row[k]) for k in ("train_loss", "val_loss", "step_loss")] for row in rows(out)])


def test_run_writes_its_folder(tmp_path, text):
    out = tmp_path / "run"
    output = pretrain(numpy_main, text, out, "--epochs", 2)
    assert {p.name for p in out.iterdir()} == {"best", "checkpoint", "losses.csv", "losses.png", "run.json"}
    assert (out / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    table = rows(out)
    assert tuple(table[0]) == COLUMNS
    assert [int(row["step"]) for row in table] == list(range(0, 14, 2))
    assert [int(row["epoch"]) for row in table] == [1, 1, 1, 1, 2, 2, 2]
    assert [int(row["tokens_seen"]) for row in table] == [64 * (step + 1) for step in range(0, 14, 2)]
    assert all(repr(float(row[k])) == row[k] for row in table for k in ("train_loss", "val_loss", "learning_rate"))
    assert losses(out)[-1, 1] < losses(out)[0, 1]
    for row in table:
        line = rf"Ep {row['epoch']} \(Step {int(row['step']):06d}\): Train loss {float(row['train_loss']):.3f}, "
        pace = "" if row["step"] == "0" else r"   \S+ tokens/s, \d:\d\d:\d\d left"
        assert re.search(line + rf"Val loss {float(row['val_loss']):.3f}{pace}\n", output)
    assert output.count("The statement") == 4  # untrained, after each of two epochs, and sampled
    assert load(out).config.context_length == 16


@brief
def test_evaluation_is_the_mean_over_batches(tmp_path, text):
    """Recompute the last row's validation loss from that step's checkpoint."""
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 3, "--drop-rate", 0.3, "--seed", 7)
    model, ids = load(out), np.frombuffer(text.read_bytes()[450:], np.uint8).astype(int)
    windows = np.array([ids[i : i + 17] for i in range(0, len(ids) - 16, 16)])  # 3 windows: one batch
    assert float(rows(out)[-1]["val_loss"]) == float(model.loss(windows[:, :-1], windows[:, 1:]))


@brief
@pytest.mark.parametrize("flags", [[], ["--warmup-steps", 3, "--clip", 0.5]], ids=["constant", "warm-up and clipping"])
@pytest.mark.parametrize(("drop_rate", "attention"), [(0, "plain"), (0.2, "plain"), (0.2, "sdpa")])
def test_numpy_and_torch_train_alike_from_one_seed(tmp_path, text, flags, drop_rate, attention):
    """Each side draws its own weights, batch order (evaluations draw too) and dropout masks."""
    common = ["--epochs", 2, "--drop-rate", drop_rate, "--seed", 5, *flags]
    ours = pretrain(numpy_main, text, tmp_path / "numpy", *common)
    theirs = pretrain(torch_main, text, tmp_path / "torch", *common, "--attention", attention, "--device", "cpu")
    a, b = losses(tmp_path / "numpy"), losses(tmp_path / "torch")
    assert a.shape == (7, 3)
    assert np.abs(a - b).max() < 5e-5
    rates = [[float(row["learning_rate"]) for row in rows(tmp_path / side)] for side in ("numpy", "torch")]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)

    def lines(output):
        return [re.sub(r"   \S+ tokens/s, .* left", "", line) for line in output.splitlines()[1:] if "/" not in line]

    assert lines(ours) == lines(theirs)


OWN_SIZE = ["--n-layers", 3, "--n-heads", 2, "--emb-dim", 24]


@brief
def test_both_train_a_model_of_an_own_size(tmp_path, text):
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        output = pretrain(command, text, tmp_path / name, *OWN_SIZE, "--epochs", 1, "--drop-rate", 0.2)
        assert "model     3x24: 34,224 parameters, 3 layers × 24, 2 heads, context 16" in output
    assert np.abs(losses(tmp_path / "numpy") - losses(tmp_path / "torch")).max() < 5e-5
    config = load(tmp_path / "torch").config
    assert (config.n_layers, config.n_heads, config.emb_dim, config.vocab_size) == (3, 2, 24, 257)


@brief
def test_a_size_overrides_the_named_models(tmp_path, text):
    flags = ["--model", "124M", "--encoding", "bytes", "--n-layers", 1, "--emb-dim", 24]
    output = pretrain(numpy_main, text, tmp_path / "run", *flags, "--max-steps", 1)
    assert "1 layers × 24, 12 heads" in output


@brief
@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
def test_own_size_is_resumed_and_inherited(tmp_path, text, command):
    out = tmp_path / "run"
    pretrain(command, text, out, *OWN_SIZE, "--max-steps", 2)
    resumed = invoke(command, "pretrain", "--resume", out, "--max-steps", 4)
    assert resumed.exit_code == 0, resumed.output
    assert int(rows(out)[-1]["step"]) == 2
    check_refused(invoke(command, "pretrain", "--resume", out, "--n-layers", 2), "started with --n-layers 3, not 2")
    assert "started with --n-heads" not in invoke(command, "pretrain", "--resume", out, "--n-heads", 2).output
    init = ["pretrain", "--text", text, "--init", out, "--max-steps", 1]
    check_refused(invoke(command, *init, "--emb-dim", 32), "its --emb-dim is 24, not 32")
    check_refused(invoke(command, *init, "--model", "124M"), "its --model is 3x24, not 124M")
    other = invoke(command, *init, *OWN_SIZE, "--batch-size", 4, "--out", tmp_path / "other")
    assert other.exit_code == 0, other.output
    assert load(tmp_path / "other").config == load(out).config
    again = invoke(command, "pretrain", "--resume", tmp_path / "other", "--max-steps", 2)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("--n_layer=4", "--n-layers"), ("--block_size=8", "--context-length"), ("--n-embd", "--emb-dim")],
)
def test_nanogpts_flags_are_answered_with_ours(command, theirs, ours):
    result = invoke(command, "pretrain", theirs)
    assert result.exit_code == 2
    assert f"No such option '{theirs.partition('=')[0]}'. Did you mean '{ours}'?" in result.output


@brief
def test_both_train_with_betas_and_part_of_the_decay(tmp_path, text):
    flags = ["--epochs", 1, "--lr", 0.01, "--betas", 0.8, 0.9, "--decay", "matrices", "--weight-decay", 0.5]
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        pretrain(command, text, tmp_path / name, *flags)
    numpys = losses(tmp_path / "numpy")
    assert np.abs(numpys - losses(tmp_path / "torch")).max() < 5e-5
    for changed in (["--decay", "all"], ["--betas", 0.8, 0.99]):
        pretrain(numpy_main, text, tmp_path / changed[0], *flags, *changed)
        assert np.abs(numpys - losses(tmp_path / changed[0])).max() > 1e-3
    check_refused(
        invoke(numpy_main, "pretrain", "--resume", tmp_path / "numpy", "--betas", 0.9, 0.9),
        "started with --betas 0.8 0.9, not 0.9 0.9",
    )


@brief
def test_accumulated_batches_are_those_of_the_other_backend_and_of_one_part(tmp_path, text):
    flags = ["--epochs", 1, "--clip", 0.5]
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        pretrain(command, text, tmp_path / name, *flags, "--accumulate", 2)
        pretrain(command, text, tmp_path / f"{name} with dropout", *flags, "--accumulate", 4, "--drop-rate", 0.3)
    pretrain(numpy_main, text, tmp_path / "one", *flags)
    numpys = losses(tmp_path / "numpy")
    assert np.abs(numpys - losses(tmp_path / "torch")).max() < 5e-5
    assert np.abs(numpys - losses(tmp_path / "one")).max() < 5e-5
    dropped = losses(tmp_path / "numpy with dropout")
    assert np.abs(dropped - losses(tmp_path / "torch with dropout")).max() < 5e-5
    assert np.abs(dropped - numpys).max() > 1e-3
    resumed = invoke(numpy_main, "pretrain", "--resume", tmp_path / "numpy", "--accumulate", 1, "--epochs", 2)
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
def test_accumulation_that_does_not_divide_the_batch_is_refused(tmp_path, text, command):
    result = invoke(command, "pretrain", "--text", text, "--batch-size", 6, "--accumulate", 4, "--out", tmp_path / "o")
    check_refused(result, "--batch-size 6 is not divisible by --accumulate 4: choose a multiple of 4")
    assert not (tmp_path / "o").exists()


@brief
def test_a_run_without_later_settings_is_resumed(tmp_path, text):
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 1)
    values = json.loads((out / "run.json").read_text())
    for name in ADDED:
        del values["settings"][name]
    values["sha256"] = run_sha256(values["settings"], values["text_sha256"])
    (out / "run.json").write_text(json.dumps(values))
    result = invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 2)
    assert result.exit_code == 0, result.output


@brief
def test_init_starts_both_from_the_same_weights(tmp_path, text):
    config = GPTConfig(257, 16, emb_dim=24, n_heads=3, n_layers=2, drop_rate=0.0, qkv_bias=True, tie_weights=True)
    init = tmp_path / "init.safetensors"
    save(GPT(config, seed=9), init)
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        flags = ["--context-length", "16", "--batch-size", "4", "--eval-freq", "2", "--init", init, "--epochs", 1]
        result = invoke(command, "pretrain", "--text", text, "--out", tmp_path / name, *flags)
        assert result.exit_code == 0, result.output
    assert np.abs(losses(tmp_path / "numpy") - losses(tmp_path / "torch")).max() < 5e-5
    assert load(tmp_path / "torch").config == config


@brief
def test_float64_and_sdpa_in_torch(tmp_path, text):
    common = ["--max-steps", 3, "--drop-rate", 0]
    pretrain(torch_main, text, tmp_path / "plain", *common, "--attention", "plain", "--dtype", "float64")
    pretrain(torch_main, text, tmp_path / "sdpa", *common, "--attention", "sdpa", "--dtype", "float64")
    assert np.abs(losses(tmp_path / "plain") - losses(tmp_path / "sdpa")).max() < 1e-11
    assert load(tmp_path / "sdpa").dtype == np.float64
    pretrain(torch_main, text, tmp_path / "bf16", *common, "--dtype", "bfloat16")
    assert 0 < np.abs(losses(tmp_path / "bf16") - losses(tmp_path / "sdpa")).max() < 0.1


@brief
@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
@pytest.mark.parametrize("stop", [3, 7], ids=["within an epoch", "between epochs"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, text, command, stop):
    flags = ["--epochs", 2, "--drop-rate", 0.2, "--warmup-steps", 2, "--save-freq", 5]
    flags += ["--attention", "plain"] if command is torch_main else []
    pretrain(command, text, tmp_path / "whole", *flags)
    # the cosine depends on the number of steps, so stop the run as Ctrl-C does, not with --max-steps
    out = tmp_path / "parts"

    real = Losses.append

    def stopping(self, step, seconds):
        real(self, step, seconds)
        if step.step + 1 >= stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Losses, "append", stopping)
        result = invoke(command, "pretrain", "--text", text, "--out", out, *SMALL, *flags)
    assert result.exit_code == 130, result.output
    assert f"Resume with: --resume {out}" in result.output
    more = ["--attention", "plain"] if command is torch_main else []
    result = invoke(command, "pretrain", "--resume", out, *more)
    assert result.exit_code == 0, result.output
    assert [{**row, "seconds": ""} for row in rows(out)] == [{**row, "seconds": ""} for row in rows(tmp_path / "whole")]
    whole, parts = load(tmp_path / "whole").params, load(out).params
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)
    state = load_training(out)
    assert all(array.tobytes() == state[name].tobytes() for name, array in load_training(tmp_path / "whole").items())


@brief
def test_each_backend_resumes_the_others_run(tmp_path, text):
    flags = ["--epochs", 2, "--drop-rate", 0.2]
    torch_flags = ["--attention", "plain", "--device", "cpu"]
    pretrain(numpy_main, text, tmp_path / "whole", *flags)
    for first, second in ((numpy_main, torch_main), (torch_main, numpy_main)):
        out = tmp_path / first.name / str(first is torch_main)
        pretrain(first, text, out, *flags, "--max-steps", 5, *(torch_flags if first is torch_main else []))
        more = torch_flags if second is torch_main else []
        result = invoke(second, "pretrain", "--resume", out, "--max-steps", 14, *more)
        assert result.exit_code == 0, result.output
        assert np.abs(losses(out) - losses(tmp_path / "whole")).max() < 5e-5


@brief
def test_rows_beyond_the_checkpoint_are_removed(tmp_path, text):
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 4)
    with (out / "losses.csv").open("a") as f:
        f.write("6,1,448,1.0,1.0,1.0,0.002,1.0\n")  # as after a kill between a row and the next save
    assert invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 7).exit_code == 0
    assert [int(row["step"]) for row in rows(out)] == [0, 2, 4, 6]
    assert float(rows(out)[-1]["train_loss"]) != 1.0


@brief
def test_zero_steps_saves_the_untrained_model(tmp_path, text):
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 0, "--seed", 3)
    expected = GPT(load(out).config, seed=3).params
    assert all(np.array_equal(p, expected[name]) for name, p in load(out).params.items())


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(tmp_path, text):
    out = tmp_path / "run"
    args = ["pretrain", "--text", str(text), "--out", str(out), *SMALL, "--epochs", "100000"]
    process = subprocess.Popen([sys.executable, "-m", "numpy_gpt", *args], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "losses.csv").exists():
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Resume with: --resume" in output
    assert (out / "losses.png").exists()
    assert load(out).config.context_length == 16


def test_evaluate_is_the_mean_over_all_tokens(tmp_path, text):
    config = GPTConfig(257, 16, emb_dim=8, n_heads=2, n_layers=1)
    save(GPT(config, seed=4), tmp_path, about={"encoding": "bytes"})
    result = invoke(numpy_main, "evaluate", tmp_path, "--text", text)
    assert result.exit_code == 0, result.output
    ids = np.frombuffer(text.read_bytes(), np.uint8).astype(int)
    model, total = load(tmp_path, dtype=np.float64), 0.0
    for i in range(0, len(ids) - 1, 16):
        y = ids[i + 1 : i + 17]
        total += float(model.loss(ids[None, i : i + len(y)], y[None])) * len(y)
    found = {line.split()[0]: line.split()[1] for line in result.output.splitlines()}
    assert found["tokens"] == "499"
    assert mean_loss(model.loss, ids, 16, batch_size=3) == pytest.approx(total / 499, rel=1e-13)
    assert float(found["loss"]) == pytest.approx(total / 499, abs=6e-5)
    assert float(found["perplexity"]) == pytest.approx(np.exp(total / 499), rel=1e-5)


@brief
def test_evaluate_uses_the_runs_validation_part(tmp_path, text):
    pretrain(numpy_main, text, tmp_path / "run", "--max-steps", 1)
    output = invoke(numpy_main, "evaluate", tmp_path / "run").output
    assert f"the last 10% of {text}" in output
    assert "tokens      49 (bytes)" in output


def test_generate_prints_what_generate_returns(tmp_path):
    from numpy_gpt import generate
    from numpy_gpt.console import printable

    model = GPT(GPTConfig(257, 16, emb_dim=8, n_heads=2, n_layers=1), seed=4)
    save(model, tmp_path, about={"encoding": "bytes"})
    flags = ["--max-new-tokens", 30, "--temperature", 1.3, "--top-k", 40, "--top-p", 0.9, "--seed", 8]
    output = invoke(numpy_main, "generate", tmp_path, "Hello", *flags).output
    ids = generate(model, [list(b"Hello")], 30, 1.3, 40, 0.9, eos_id=256, rng=Generator(8))[0]
    assert output == printable(bytes(ids.tolist()).decode(errors="replace")) + "\n"


def test_control_characters_do_not_reach_the_terminal():
    from numpy_gpt.console import one_line, printable

    assert printable("a\x1b[31mb\x07\ufffd é\n\t") == "a·[31mb·· é\n\t"
    assert one_line("a\nb\rc\td") == "a b·c d"


def test_info_counts(tmp_path):
    output = invoke(numpy_main, "info", "--model", "124M").output
    # the book's chapter 4: 163,009,536 with a separate output head, 124,412,160 without; context 1024
    assert re.search(r"^trf_blocks\.\{0…11\}\.att\.W_query\.weight +768 × 768 +12 × 589,824$", output, re.M)
    assert output.count("att.W_query.weight") == 1
    assert "162,419,712 (with a tied output head 123,822,336)" in output
    model = GPT(GPTConfig(257, 16, emb_dim=8, n_heads=2, n_layers=1))
    save(model, tmp_path)
    output = invoke(numpy_main, "info", tmp_path).output
    assert f"parameters           {sum(p.size for p in model.params.values()):,} " in output
    for name, p in model.params.items():
        assert re.search(rf"^{re.escape(name)} +{' × '.join(map(str, p.shape))} +{p.size:,}$", output, re.M), name


def test_info_of_an_own_size(tmp_path):
    output = invoke(numpy_main, "info", *OWN_SIZE).output
    model = GPT(GPTConfig(257, 64, emb_dim=24, n_heads=2, n_layers=3))
    assert f"parameters           {sum(p.size for p in model.params.values()):,} " in output
    huge = invoke(numpy_main, "info", "--model", "1558M", "--n-layers", 10_000).output
    assert "n_heads=25, n_layers=10000" in huge
    assert len(huge.splitlines()) < 40


BAD = {
    "heads that do not divide": (["--n-heads", "3"], "emb_dim 128 does not divide into 3 heads"),
    "no layers": (["--n-layers", "0"], "0 is not in the range"),
    "absurdly many layers": (["--n-layers", "1000000000000"], "is not in the range"),
    "an absurd width": (["--emb-dim", "4000000000"], "is not in the range"),
    "resume with another size": (["--resume", "{tmp}/run", "--emb-dim", "64"], "started with --emb-dim 128, not 64"),
    "init of another width": (["--init", "{tmp}/run", "--emb-dim", "64"], "--emb-dim is 128, not 64"),
    "unknown corpus": (["--text", "the-verdikt"], "neither a known text nor a file"),
    "unknown encoding": (["--encoding", "gpt5"], "unknown encoding 'gpt5'"),
    "unknown model": (["--model", "125M"], "'125M' is not one of 'tiny', '124M'"),
    "a seed too large": (["--seed", "18446744073709551616"], "2^64 - 1, not 18446744073709551616"),
    "a seed too small": (["--seed", "-9223372036854775809"], "2^64 - 1, not -9223372036854775809"),
    "a folder with a binary file as text": (["--text", "{tmp}/run"], "best/model.safetensors is not UTF-8 text"),
    "binary text": (["--text", "{tmp}/binary"], "NUL bytes"),
    "text that is not UTF-8": (["--text", "{tmp}/latin1"], "is not UTF-8"),
    "text too short": (["--text", "{tmp}/short"], "too short"),
    "context longer than the text": (["--context-length", "5000"], "choose a shorter --context-length"),
    "batch larger than the text": (["--batch-size", "5000"], "choose a smaller --batch-size"),
    "empty prompt": (["--prompt", ""], "prompt is empty"),
    "lr beyond float32": (["--lr", "1e308"], "choose smaller ones"),
    "decay beyond float32": (["--weight-decay", "1e308"], "choose smaller ones"),
    "resume of nothing": (["--resume", "{tmp}/nowhere"], "nowhere does not exist: give the folder of a run"),
    "resume of a save that is not there": (["--resume", "{tmp}/run/checkpoint-10"], "saves of this run are checkpoint"),
    "probability": (["--drop-rate", "1.5"], "is not in the range"),
    "out is a file": (["--out", "{tmp}/short"], "exists and is not empty"),
    "out is another folder": (["--out", "{tmp}/other"], "exists and is not empty"),
    "out is a run": (["--out", "{tmp}/run"], "already holds a run"),
    "resume of no run": (["--resume", "{tmp}/other"], "is not the folder of a run"),
    "resume with another seed": (["--resume", "{tmp}/run", "--seed", "5"], "started with --seed 123, not 5"),
    "resume and init": (["--resume", "{tmp}/run", "--init", "{tmp}/run"], "leave out --init and --out"),
    "init from nowhere": (["--init", "{tmp}/nowhere"], "does not exist"),
    "init of another context": (["--init", "{tmp}/run", "--context-length", "8"], "--context-length is 16, not 8"),
    "init of another size": (["--init", "{tmp}/run", "--model", "124M"], "--model is tiny, not 124M"),
    "init tied": (["--init", "{tmp}/run", "--tie-weights"], "--tie-weights is False, not True"),
    "init of another vocabulary": (["--init", "{tmp}/run", "--encoding", "gpt2"], "choose its own --encoding"),
    "init from a text": (["--init", "{tmp}/short"], "cannot be read as a safetensors file"),
}


@pytest.fixture(scope="session")
def bad_place(tmp_path_factory, text):
    place = tmp_path_factory.mktemp("bad")
    (place / "binary").write_bytes(bytes(range(128)) * 50)
    (place / "latin1").write_bytes("é".encode("latin-1") * 500)
    (place / "short").write_text("short")
    (place / "other").mkdir()
    (place / "other" / "precious").write_text("keep me")
    pretrain(numpy_main, text, place / "run", "--max-steps", 1)
    return place


@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", BAD)
def test_pretrain_refuses(bad_place, text, monkeypatch, case, command):
    args, message = BAD[case]
    args = [a.replace("{tmp}", str(bad_place)) for a in args]
    before = snapshot(bad_place)
    monkeypatch.chdir(bad_place)
    base = [] if {"--text", "--resume"} & set(args) else ["--text", text]
    check_refused(invoke(command, "pretrain", *base, *SMALL, *args, "--max-steps", 1), message)
    assert snapshot(bad_place) == before
    assert {p.name for p in bad_place.iterdir()} == {"binary", "latin1", "short", "other", "run"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate", "{tmp}/nowhere"], "does not exist"),
        (["evaluate", "{tmp}/other"], "has no checkpoint in it"),
        (["evaluate", "{tmp}/run", "--text", "{tmp}/binary"], "NUL bytes"),
        (["generate", "{tmp}/run", ""], "prompt is empty"),
        (["generate", "{tmp}/run", "a", "--top-k", "5"], "give a --temperature above 0"),
        (["generate", "{tmp}/run", "a", "--top-k", "0"], "is not in the range"),
        (["generate", "{tmp}/short", "a"], "cannot be read as a safetensors file"),
        (["info"], "give either a CHECKPOINT or a size: --model NAME"),
        (["info", "{tmp}/run", "--n-layers", "2"], "give either a CHECKPOINT or a size"),
        (["chapter5", "--text", "{tmp}/nowhere"], "neither a known text nor a file"),
        (["chapter6"], "No such command"),
    ],
)
def test_other_commands_refuse(bad_place, args, message):
    check_refused(invoke(numpy_main, *(a.replace("{tmp}", str(bad_place)) for a in args)), message)


@brief
def test_resume_refuses_a_changed_text(tmp_path, text):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    pretrain(numpy_main, copy, tmp_path / "run", "--max-steps", 1)
    copy.write_text(copy.read_text() + "more")
    before = snapshot(tmp_path)
    check_refused(invoke(numpy_main, "pretrain", "--resume", tmp_path / "run"), "is not the text that")
    assert snapshot(tmp_path) == before


@brief
def test_resume_refuses_a_checkpoint_without_training_state(tmp_path, text):
    pretrain(numpy_main, text, tmp_path / "run", "--max-steps", 1)
    checkpoint = tmp_path / "run" / "checkpoint"
    (state,) = checkpoint.glob("training-*")
    state.unlink()
    check_refused(invoke(numpy_main, "pretrain", "--resume", tmp_path / "run"), "training state, is missing")
    save(load(checkpoint), checkpoint)
    check_refused(invoke(numpy_main, "pretrain", "--resume", tmp_path / "run"), "no training state to resume from")


@brief
@pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("missing", "message"), [("rng", "the checkpoint "), ("optimizer.m.pos_emb.weight", "pos_emb.weight")]
)
def test_unrestorable_training_state_changes_nothing(tmp_path, text, command, missing, message):
    """Not even run.json, which would name other settings, or losses.csv."""
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 3)
    state = {name: array for name, array in load_training(out).items() if name != missing}
    save(load(out), out / "checkpoint", training=state)
    with (out / "losses.csv").open("a") as f:
        f.write("6,1,448,1.0,1.0,1.0,0.002,1.0\n")  # as after a kill between a row and the next save
    before = snapshot(out)
    check_refused(invoke(command, "pretrain", "--resume", out, "--max-steps", 5), message)
    assert snapshot(out) == before


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert choose_device().type == best
    result = invoke(torch_main, "pretrain", "--device", "toaster")
    check_refused(result, "unknown device 'toaster'")
    result = invoke(torch_main, "pretrain", "--device", "cuda:99")
    check_refused(result, "device cuda:99 is not available here")


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    check_refused(invoke(torch_main, "pretrain", "--device", "cpu", "--compile"), "install g++")


def test_gpt2_defaults_match_the_book():
    settings = Settings()
    config = settings.config(50257)
    assert config == GPTConfig()  # the book's GPT_CONFIG_124M
    book = {"lr": 4e-4, "weight_decay": 0.1, "epochs": 10, "batch_size": 2, "eval_freq": 5, "eval_iter": 5, "seed": 123}
    assert {key: getattr(settings, key) for key in book} == book
    assert (settings.warmup_steps, settings.clip, settings.stride) == (0, None, None)
    assert [*islice(learning_rates(4e-4, 0, 3), 3)] == [4e-4] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("all_threads")
def test_gpt2_124m_on_the_story_agrees_with_torch(tmp_path):
    """One epoch of the book's run without dropout, from equal weights: all losses agree to four decimals."""
    if not os.environ.get("NUMPY_GPT_DATA"):
        pytest.skip("needs the story: set NUMPY_GPT_DATA")
    save(GPT(GPTConfig(drop_rate=0.0)), tmp_path / "init.safetensors")
    flags = ["--text", "the-verdict", "--model", "124M", "--context-length", 256, "--batch-size", 2, "--epochs", 1]
    flags += ["--drop-rate", 0, "--init", tmp_path / "init.safetensors"]
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        result = invoke(command, "pretrain", *flags, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    a, b = losses(tmp_path / "numpy"), losses(tmp_path / "torch")
    assert a.shape == (2, 3)
    assert np.abs(a - b).max() < 5e-5

"""How runs begin and end: divergence, signals, reports that fail, races for a folder, and what --resume may change."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from numpy_gpt import GPT, GPTConfig, load, save
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.console import Report
from numpy_gpt.errors import DivergedError, InputError
from numpy_gpt.runs import folder as run
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.folder import Run
from numpy_gpt.runs.learner import NumpyLearner
from numpy_gpt.runs.losses import Losses
from numpy_gpt.runs.pretrain import pretrain as pretrain_job
from numpy_gpt.runs.settings import for_tiny
from numpy_gpt.weights.checkpoint import load_training, read_header
from parity_tests.judge.checkpoints import check_same_bits
from parity_tests.judge.runs import SMALL, check_refused, invoke, pretrain, snapshot
from torch_gpt.cli import main as torch_main
from torch_gpt.train import TorchLearner

pytestmark = pytest.mark.usefixtures("brief_runs")

BOTH = pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])


def step_of(folder):
    return int(load_training(folder)["loop.counters"][0])


@BOTH
@pytest.mark.parametrize("flags", [[], ["--save-freq", 1, "--keep", 3]], ids=["one save", "every step"])
def test_diverging_run_keeps_its_last_finite_state(tmp_path, text, command, flags):
    out = tmp_path / "run"
    flags = ["--lr", "1e36", "--warmup-steps", 0, "--drop-rate", 0.1, *flags]
    result = invoke(command, "pretrain", "--text", text, "--out", out, *SMALL, *flags)
    assert result.exit_code == 3, result.output
    found = re.search(r"training has diverged: in step (\d+) the (loss|gradients' norm) is (nan|inf)", result.output)
    assert found, result.output
    assert "learning rate 1e+36" in result.output
    assert result.stderr.startswith("Error: training has diverged") or "Traceback" not in result.output
    assert step_of(out) == int(found[1])
    assert all(np.isfinite(p).all() for p in load(out).params.values())
    for kept in out.glob("checkpoint-*"):
        load(kept)
    again = invoke(command, "pretrain", "--resume", out)
    assert again.exit_code == 3
    assert found[0] in again.output, "the resumed run does not diverge at the same step"


@pytest.mark.parametrize("make", [NumpyLearner, TorchLearner])
@pytest.mark.parametrize("kind", ["loss", "norm"])
def test_nonfinite_step_changes_nothing(make, kind):
    """Not the parameters, nor the moments, nor the random state, although masks had been drawn."""
    import torch

    config = GPTConfig(11, 6, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.3)
    more = {} if make is NumpyLearner else {"device": torch.device("cpu")}
    params = GPT(config).params
    if kind == "loss":
        params["out_head.weight"][0] = 3e38
    else:  # a finite loss whose gradient overflows on the way to the embeddings
        params["final_norm.scale"][:] = 1e30
        params["out_head.weight"] *= np.float32(1e-30)
        for name in ("tok_emb.weight", "pos_emb.weight"):
            params[name] *= np.float32(1e-30)
    learner = make(config, for_tiny, 10, params, **more)
    x = np.arange(12).reshape(2, 6) % 11
    before = {n: p.tobytes() for n, p in (learner.params() | learner.state()).items()}
    with (
        pytest.raises(DivergedError, match=r"in step 4 the (loss|gradients' norm) is (nan|inf)"),
        np.errstate(all="ignore"),
    ):
        learner.train_step(x, x, 4)
    assert {n: p.tobytes() for n, p in (learner.params() | learner.state()).items()} == before


def test_nonfinite_weights_after_the_last_step_are_not_saved(tmp_path, text, monkeypatch):
    """No later step would detect them."""
    out = tmp_path / "run"
    pretrain(numpy_main, text, out, "--max-steps", 3)
    want = load(out).params
    real = NumpyLearner.train_step

    def poisoned(self, x, y, step):
        done = real(self, x, y, step)
        self.model.params["final_norm.shift"][2] = np.inf
        return done

    monkeypatch.setattr(NumpyLearner, "train_step", poisoned)
    result = invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 4)
    assert result.exit_code == 3, result.output
    assert "diverged: after 4 steps nothing was saved: final_norm.shift[2] is NaN or infinite" in result.output
    assert f"the state after 3 steps is saved: --resume {out}" in result.output
    check_same_bits(load(out).params, want)


@pytest.mark.parametrize("what", ["step", "line", "sample", "append"])
def test_failing_loop_saves_first(tmp_path, text, monkeypatch, what):
    """A report, sample or row fails at step 5 or later, without --save-freq."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    flags = ["--epochs", 2, "--drop-rate", 0.1]
    pretrain(numpy_main, text, whole, *flags)
    owner, name = {
        "step": (Report, "step"),
        "line": (Report, "line"),
        "sample": (NumpyLearner, "sample"),
        "append": (Losses, "append"),
    }[what]
    real, steps = getattr(owner, name), []
    monkeypatch.setattr(
        NumpyLearner, "train_step", lambda self, *args, f=NumpyLearner.train_step: steps.append(1) or f(self, *args)
    )

    def failing(self, *args, **kwargs):
        if len(steps) >= 5:
            raise RuntimeError("the report fails")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    flagged = {"text": str(text), "context_length": 16, "batch_size": 4, "stride": 16, "eval_freq": 2, "eval_iter": 2}
    flagged |= {"epochs": 2, "drop_rate": 0.1}
    with pytest.raises(RuntimeError, match="the report fails"):
        pretrain_job(flagged, NumpyLearner, "", out=out)
    made = len(steps)
    monkeypatch.undo()
    assert step_of(out) == made >= 5
    result = invoke(numpy_main, "pretrain", "--resume", out)
    assert result.exit_code == 0, result.output
    check_same_bits(load(out).params, load(whole).params)


def test_failing_plot_does_not_end_the_run(tmp_path, text, monkeypatch):
    def fail(self, *_):
        raise ImportError("no matplotlib here")

    monkeypatch.setattr(Losses, "plot", fail)
    output = pretrain(numpy_main, text, tmp_path / "run", "--max-steps", 2)
    assert "note: losses.png could not be drawn (no matplotlib here)" in output
    assert output.splitlines()[-1] == f"Saved {tmp_path / 'run'}: checkpoint, best, losses.csv"


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGHUP], 129),
        ([signal.SIGINT, signal.SIGTERM], 130),
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGINT], 129),
    ],
)
def test_signals_save_and_stop(tmp_path, text, monkeypatch, numbers, code):
    """Also a second signal of another kind, as when a terminal closes or the system shuts down."""
    out = tmp_path / "run"
    real, left = NumpyLearner.train_step, list(numbers)

    def signalled(self, x, y, step):
        if step == 3:
            while left:
                os.kill(os.getpid(), left.pop(0))
        return real(self, x, y, step)

    monkeypatch.setattr(NumpyLearner, "train_step", signalled)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    result = invoke(numpy_main, "pretrain", "--text", text, "--out", out, *SMALL)
    assert result.exit_code == code, result.output
    assert f"Stopped after 4 steps; everything is saved. Resume with: --resume {out}" in result.output
    assert step_of(out) == 4
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_second_ctrl_c_stops_at_once(tmp_path, text, monkeypatch):
    out = tmp_path / "run"
    real = NumpyLearner.train_step

    def twice(self, x, y, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, x, y, step)

    monkeypatch.setattr(NumpyLearner, "train_step", twice)
    result = invoke(numpy_main, "pretrain", "--text", text, "--out", out, *SMALL, "--save-freq", 2)
    assert result.exit_code != 0
    assert f"Stopped at once; the state after 2 steps is saved: --resume {out} --save-freq 2" in result.output
    assert step_of(out) == 2


def test_run_in_another_thread_handles_no_signals(tmp_path, text):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(pretrain(numpy_main, text, tmp_path / "r", "--max-steps", 1))
    )
    thread.start()
    thread.join()
    assert results


def test_ignored_hangup_stays_ignored(tmp_path, text, monkeypatch):
    real = NumpyLearner.train_step

    def signalled(self, x, y, step):
        os.kill(os.getpid(), signal.SIGHUP)
        return real(self, x, y, step)

    monkeypatch.setattr(NumpyLearner, "train_step", signalled)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        pretrain(numpy_main, text, tmp_path / "run", "--max-steps", 3)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert step_of(tmp_path / "run") == 3


def test_unnamed_runs_never_share_a_folder(tmp_path, text, monkeypatch):
    """Another process takes the first free number between the check and the creation."""
    from numpy_gpt.runs import folder as run

    monkeypatch.chdir(tmp_path)
    real = run.taken
    others = []

    def slower(folder):
        if len(others) < 3:
            others.append(folder)
            folder.mkdir(parents=True)
            (folder / "run.json").write_text("another's")
        return real(folder)

    monkeypatch.setattr(run, "taken", slower)
    result = invoke(numpy_main, "pretrain", "--text", text, *SMALL, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert "run       runs/tiny-words-4" in result.output
    assert [(folder / "run.json").read_text() for folder in others] == ["another's"] * 3
    assert [p.name for folder in others for p in folder.iterdir()] == ["run.json"] * 3


def test_run_begun_meanwhile_is_untouched(tmp_path, text):
    out = tmp_path / "run"
    batches = Batches(replace(for_tiny, text=str(text), context_length=8))
    with Run.create(out, for_tiny, batches) as first:
        before = snapshot(out)
        check_refused(
            invoke(numpy_main, "pretrain", "--out", out, "--text", text, *SMALL), "already holds a run without a save"
        )
        check_refused(invoke(numpy_main, "pretrain", "--resume", out), "ended before its first save")
        with pytest.raises(InputError, match="already holds a run"):
            first._begin(batches)  # as on file systems without locks
    assert snapshot(out) == before


def moved(tmp_path, text, name="run"):
    place = tmp_path / "first"
    place.mkdir()
    (place / "words.txt").write_bytes(text.read_bytes())
    pretrain(numpy_main, place / "words.txt", place / name, "--max-steps", 1)
    return place.rename(tmp_path / "second")


def test_run_moved_with_its_text_resumes(tmp_path, text):
    place = moved(tmp_path, text)
    result = invoke(numpy_main, "pretrain", "--resume", place / "run", "--max-steps", 2)
    assert result.exit_code == 0, result.output
    assert json.loads((place / "run" / "run.json").read_text())["settings"]["text"] == str(place / "words.txt")
    assert invoke(numpy_main, "evaluate", place / "run").exit_code == 0
    (place / "words.txt").rename(tmp_path / "elsewhere")
    check_refused(invoke(numpy_main, "pretrain", "--resume", place / "run"), "pass its path with --text FILE")
    result = invoke(
        numpy_main, "pretrain", "--resume", place / "run", "--max-steps", 3, "--text", tmp_path / "elsewhere"
    )
    assert result.exit_code == 0, result.output
    (tmp_path / "elsewhere").write_text("other")
    result = invoke(numpy_main, "pretrain", "--resume", place / "run", "--text", tmp_path / "elsewhere")
    check_refused(result, "too short")
    (tmp_path / "elsewhere").write_text("other " * 500)
    result = invoke(numpy_main, "pretrain", "--resume", place / "run", "--text", tmp_path / "elsewhere")
    check_refused(result, "is not the text that")


def test_moved_run_is_evaluated_on_its_own_text(tmp_path, text, monkeypatch):
    """Its text lies next to it; another file of that name is in the working directory."""
    place = moved(tmp_path, text)
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "words.txt").write_text("other " * 500)
    monkeypatch.chdir(tmp_path / "cwd")
    for part in ("run", "run/best", "run/checkpoint/model.safetensors"):
        result = invoke(numpy_main, "evaluate", place / part)
        assert result.exit_code == 0, result.output
        assert f"the last 10% of {place / 'words.txt'}" in result.output
    result = invoke(numpy_main, "pretrain", "--resume", place / "run", "--max-steps", 2)
    assert result.exit_code == 0, result.output
    (place / "words.txt").unlink()
    check_refused(
        invoke(numpy_main, "evaluate", place / "run"), "was not found: restore it, or evaluate all of another"
    )


def test_changed_text_is_refused_in_evaluation(tmp_path, text):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text.read_bytes())
    pretrain(numpy_main, copy, tmp_path / "run", "--max-steps", 1)
    assert invoke(numpy_main, "evaluate", tmp_path / "run").exit_code == 0
    copy.write_text(copy.read_text() + "more")
    for place in ("run", "run/checkpoint", "run/best", "run/best/model.safetensors"):
        check_refused(invoke(numpy_main, "evaluate", tmp_path / place), "is not the text that")
    assert invoke(numpy_main, "evaluate", tmp_path / "run", "--text", copy).exit_code == 0


def test_checkpoint_with_another_runs_vocabulary_is_refused(tmp_path, text):
    """The checkpoint identifies its vocabulary by SHA-256, wherever the folder is copied."""
    from parity_tests.judge.weights import FIXTURE

    ids = json.loads((FIXTURE / "encoder.json").read_text(encoding="utf-8"))
    ids["r"], ids["s"] = ids["s"], ids["r"]
    words = shutil.copytree(FIXTURE, tmp_path / "words")
    (words / "encoder.json").write_text(json.dumps(ids), encoding="utf-8")
    for name, encoding in (("one", FIXTURE), ("two", words)):
        pretrain(numpy_main, text, tmp_path / name, "--encoding", encoding, "--max-steps", 1)
    shutil.copytree(tmp_path / "one" / "best", tmp_path / "two" / "other")
    for command in (["generate", "A"], ["evaluate"]):
        args = [command[0], tmp_path / "two" / "other", *command[1:]]
        check_refused(invoke(numpy_main, *args), "is not the one that")
    assert invoke(numpy_main, "generate", tmp_path / "two" / "best", "A", "--max-new-tokens", 1).exit_code == 0
    result = invoke(numpy_main, "pretrain", "--resume", tmp_path / "one", "--encoding", FIXTURE, "--max-steps", 2)
    assert result.exit_code == 0, result.output


def test_flag_with_the_same_value_is_accepted(tmp_path, text):
    out = tmp_path / "run"
    flags = ["--context-length", 16, "--batch-size", 4, "--eval-freq", 2, "--eval-iter", 2, "--max-steps", 1]
    assert invoke(numpy_main, "pretrain", "--text", text, "--out", out, *flags).exit_code == 0
    result = invoke(numpy_main, "pretrain", "--resume", out, "--stride", 16, "--text", text, "--seed", 123)
    assert result.exit_code == 0, result.output
    check_refused(invoke(numpy_main, "pretrain", "--resume", out, "--stride", 8), "was started with --stride 16, not 8")


@pytest.mark.parametrize(
    ("flags", "steps", "said"),
    [
        (["--max-steps", 20], 20, None),  # the default of two epochs would be 14
        (["--epochs", 3], 21, None),
        ([], 14, None),
        (["--max-steps", 20, "--epochs", 1], 7, "7 steps (--epochs 1 ends it before --max-steps 20)"),
        (["--max-steps", 5, "--epochs", 1], 5, "5 steps (--max-steps 5 ends it before --epochs 1, 7 steps)"),
        (["--max-steps", 7, "--epochs", 1], 7, None),
        (["--max-steps", 5], 5, None),
    ],
)
def test_explicit_epochs_and_steps_are_respected(tmp_path, text, flags, steps, said):
    out = tmp_path / "run"
    output = pretrain(numpy_main, text, out, *flags)
    assert step_of(out) == steps
    assert (said or f"; {steps} steps\n") in output


def test_explicit_epochs_override_default_steps(tmp_path, text):
    from numpy_gpt.runs.pretrain import prepare

    flags = {"text": str(text), "context_length": 16, "batch_size": 4}
    assert prepare(flags | {"epochs": 500}, None, None).total_steps == 3500
    assert prepare(flags | {"max_steps": 3000}, None, None).total_steps == 3000


def test_partial_losses_are_noted(tmp_path, text):
    out = tmp_path / "run"
    output = pretrain(numpy_main, text, out, "--max-steps", 1)
    assert "The losses are over" not in output, "all batches are evaluated"
    result = invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 2, "--eval-iter", 1)
    assert "The losses are over" not in result.output
    flags = ["--context-length", 4, "--batch-size", 2, "--eval-iter", 2, "--max-steps", 1, "--text", text]
    result = invoke(numpy_main, "pretrain", *flags, "--out", tmp_path / "more")
    assert "The losses are over 2 batches, of 6 for validation; over all of them: numpy-gpt evaluate" in result.output


@BOTH
def test_padded_vocabulary_is_trained(tmp_path, text, command):
    """The model has more ids than the encoding: the text contains none of them, and none is sampled."""
    config = GPTConfig(300, 16, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0)
    model = GPT(config)
    model.params["out_head.weight"][257:] *= 100
    save(model, tmp_path / "init", about={"encoding": "bytes"})
    result = invoke(
        command, "pretrain", "--init", tmp_path / "init", "--text", text, "--out", tmp_path / "run", *SMALL[:2],
        "--batch-size", 4, "--max-steps", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run").config.vocab_size == 300


def test_failed_start_leaves_no_folder(tmp_path, text, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(NumpyLearner, "__init__", fail)
    result = CliRunner().invoke(
        numpy_main, ["pretrain", "--text", str(text), "--out", str(tmp_path / "a" / "run"), *SMALL]
    )
    assert result.exit_code != 0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_signals_in_a_real_process(tmp_path, text):
    """Send each signal during training, the next one to the resumed run."""
    out = tmp_path / "run"
    args = ["--text", str(text), "--out", str(out), *SMALL, "--epochs", "100000"]
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "numpy_gpt", "pretrain", *args], stdout=subprocess.PIPE, text=True
        )
        while "Ep 2" not in process.stdout.readline() and process.poll() is None:
            pass
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.returncode == 128 + number
        assert "everything is saved" in output
        assert read_header(out).about["step"] == str(step_of(out))
        args = ["--resume", str(out)]


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_save_on_full_disk_names_the_resumable_state(tmp_path, text, monkeypatch):
    """The safetensors library has its own error message for a full disk."""
    import resource

    out, save_params = tmp_path / "run", run.save_params

    def short_of_room(*args, **kwargs):
        if len(kwargs["training"]) and int(kwargs["training"]["loop.counters"][0]) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        save_params(*args, **kwargs)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(run, "save_params", short_of_room)
    try:
        result = invoke(numpy_main, "pretrain", "--text", text, "--out", out, *SMALL, "--save-freq", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert result.exit_code == 2
    assert (
        f"cannot save to {out / 'checkpoint'}: File too large; choose another place; "
        f"the state after 2 steps is saved: --resume {out} --save-freq 1" in result.output
    )
    monkeypatch.undo()
    assert step_of(out) == 2
    assert invoke(numpy_main, "pretrain", "--resume", out, "--max-steps", 4).exit_code == 0

"""A run's folder: which saves are kept, and how damage is handled."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from numpy_gpt import load
from numpy_gpt.cli.main import main
from numpy_gpt.runs.folder import Run
from numpy_gpt.weights.checkpoint import load_training, read_header
from numpy_gpt.weights.tensors import write_tensors
from parity_tests.judge.checkpoints import check_same_bits, room_for
from parity_tests.judge.runs import SMALL, check_refused, invoke, pretrain, snapshot

pytestmark = pytest.mark.usefixtures("brief_runs")

FIXTURE = Path(__file__).parent / "fixtures" / "tiny_gpt2"


def steps(folder):
    return sorted(int(save.name.split("-")[1]) for save in folder.glob("checkpoint-*"))


def step_of(folder):
    return int(load_training(folder)["loop.counters"][0])


def test_last_saves_are_kept(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 11, "--save-freq", 3, "--keep", 3)
    assert steps(out) == [6, 9, 11]
    assert [step_of(out / f"checkpoint-{step:06d}") for step in steps(out)] == [6, 9, 11]
    check_same_bits(load(out).params, load(out / "checkpoint-000011").params)
    (out / "checkpoint-of-mine").mkdir()  # a run ignores the user's own folders
    invoke(main, "pretrain", "--resume", out, "--max-steps", 12, "--save-freq", 1)
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-0000{n:02}" for n in (6, 9, 11)} | {
        "checkpoint-of-mine"
    }, "without --keep no save is added or dropped"
    invoke(main, "pretrain", "--resume", out, "--max-steps", 14, "--save-freq", 1, "--keep", 2)
    (out / "checkpoint-of-mine").rmdir()
    assert steps(out) == [13, 14]


def test_kept_save_can_be_resumed(tmp_path, text):
    """Named by its folder, moved by hand to the checkpoint's place, or with the checkpoint deleted."""
    out = tmp_path / "run"
    flags = ("--save-freq", 2, "--keep", 3, "--drop-rate", 0.1)
    pretrain(main, text, out, "--max-steps", 6, *flags)
    want = load(out).params

    def by_hand(run):
        for file in (run / "checkpoint").iterdir():
            file.unlink()
        for file in (run / "checkpoint-000002").iterdir():
            file.rename(run / "checkpoint" / file.name)
        return run

    def gone(run):
        shutil.rmtree(run / "checkpoint")
        shutil.rmtree(run / "checkpoint-000006")
        return run

    for number, prepared in enumerate((lambda run: run / "checkpoint-000002", by_hand, gone)):
        run = shutil.copytree(out, tmp_path / str(number))
        result = invoke(main, "pretrain", "--resume", prepared(run), "--keep", 3)
        assert result.exit_code == 0, result.output
        assert f"resumed   after {4 if prepared is gone else 2} steps" in result.output
        check_same_bits(load(run).params, want)
        assert [row.rpartition(",")[0] for row in (run / "losses.csv").read_text().splitlines()] == [
            row.rpartition(",")[0] for row in (out / "losses.csv").read_text().splitlines()
        ]


def test_resuming_an_earlier_save_keeps_the_newest(tmp_path, text):
    """The newest save, which has no copy, is kept before an earlier one replaces it."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 4, "--save-freq", 2, "--keep", 3)
    assert invoke(main, "pretrain", "--resume", out, "--max-steps", 6).exit_code == 0
    newest = load(out).params
    result = invoke(main, "pretrain", "--resume", out / "checkpoint-000002", "--max-steps", 3, "--keep", 2)
    assert result.exit_code == 0, result.output
    assert "note: the newest save, of step 6, stays as checkpoint-000006" in result.output
    assert step_of(out) == 3
    check_same_bits(load(out / "checkpoint-000006").params, newest)
    (out / "checkpoint" / "model.safetensors").write_bytes(b"damaged")
    result = invoke(main, "pretrain", "--resume", out / "checkpoint-000004", "--max-steps", 5)
    assert result.exit_code == 0, result.output


def test_repeated_step_replaces_its_save(tmp_path, text):
    """The learning rate depends on the number of steps, so a longer run's step 4 differs."""
    out, flags = tmp_path / "run", ("--save-freq", 1, "--keep", 10)
    pretrain(main, text, out, "--max-steps", 4, "--warmup-steps", 2, *flags)
    old = load(out / "checkpoint-000004").params
    result = invoke(main, "pretrain", "--resume", out / "checkpoint-000002", "--max-steps", 9, *flags)
    assert result.exit_code == 0, result.output
    assert any((old[n] != p).any() for n, p in load(out / "checkpoint-000004").params.items())
    assert step_of(out / "checkpoint-000004") == 4
    assert steps(out) == list(range(10))


def bits(save):
    """File name -> SHA-256; pytest would compare the contents line by line."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in save.iterdir()}


@pytest.mark.parametrize("how", ["cp", "link", "link of best", "hard links"])
def test_kept_save_never_changes(tmp_path, text, how):
    """Whatever the user does to the folder checkpoint, and whatever a run then writes there."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 6, "--save-freq", 2, "--keep", 9)
    kept = {save: bits(save) for save in out.glob("checkpoint-*")}
    best = bits(out / "best")
    old, newest = out / "checkpoint-000002", out / "checkpoint"
    if how == "cp":
        for file in (newest / "model.safetensors").parent.glob("training-*"):
            file.unlink()
        for file in old.iterdir():
            shutil.copyfile(file, newest / file.name)  # like cp: into the existing file
        assert bits(out / "best") == best
    elif how == "link":
        shutil.rmtree(newest)
        newest.symlink_to("checkpoint-000002")
    elif how == "link of best":
        shutil.rmtree(out / "best")
        (out / "best").symlink_to(old)
    else:
        shutil.rmtree(newest)
        newest.mkdir()
        for file in old.iterdir():
            os.link(file, newest / file.name)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 8, "--save-freq", 1, "--keep", 9)
    assert result.exit_code == 0, result.output
    assert {save: bits(save) for save in kept} == kept
    assert step_of(out) == 8
    assert not newest.is_symlink()


def test_link_to_another_disk_stays(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2)
    (out / "checkpoint").rename(tmp_path / "elsewhere")
    (out / "checkpoint").symlink_to(tmp_path / "elsewhere")
    assert invoke(main, "pretrain", "--resume", out, "--max-steps", 4).exit_code == 0
    assert (out / "checkpoint").is_symlink()
    assert step_of(tmp_path / "elsewhere") == 4


def test_incomparable_best_stays(tmp_path, text):
    """A best of a newer release, damaged, without its loss, or evaluated on other batches."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2)
    params, header = load(out / "best").params, read_header(out / "best")
    file, about = out / "best" / "model.safetensors", {k: v for k, v in header.about.items() if "numpy-gpt." not in k}
    about["config"] = json.dumps(header.config.to_dict())
    others = [about | {"version": "2"}, about | {"val_loss": "low"}, about | {"val_batches": "77"}]
    others += [{name: value for name, value in about.items() if name != "val_loss"}]
    for number, other in enumerate([*others, None]):
        write_tensors(file, params, other or about)
        if other is None:
            file.write_bytes(file.read_bytes()[:-1])
        before = file.read_bytes()
        result = invoke(main, "pretrain", "--resume", out, "--max-steps", 3 + number, "--save-freq", 1)
        assert result.exit_code == 0, result.output
        assert result.output.count(f"note: {out / 'best'} is unchanged, since it cannot be compared") == 1
        assert file.read_bytes() == before


def test_best_is_compared_over_the_same_batches(tmp_path):
    """--eval-iter changes during the run; the comparison keeps its number of batches."""
    words = np.random.default_rng(1).choice(["the ", "model ", "learns ", "a ", "word\n"], 2000)
    text = tmp_path / "words.txt"
    text.write_text("".join(words))
    out = tmp_path / "run"
    flags = ["--lr", 0.05, "--warmup-steps", 0, "--save-freq", 1, "--keep", 30]
    pretrain(main, text, out, "--max-steps", 4, *flags)  # two of seven batches
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 12, "--eval-iter", 7, *flags[4:])
    assert result.exit_code == 0, result.output
    ids = np.frombuffer(text.read_bytes(), np.uint8).astype(int)
    ids = ids[int(0.9 * len(ids)) :]
    windows = np.array([ids[i : i + 17] for i in range(0, 8 * 16, 16)])
    losses = {}
    for step in steps(out):
        model = load(out / f"checkpoint-{step:06d}")
        losses[step] = np.mean([float(model.loss(w[:, :-1], w[:, 1:])) for w in (windows[:4], windows[4:])])
    about = read_header(out / "best").about
    assert int(about["step"]) == min(losses, key=losses.get)
    assert float(about["val_loss"]) == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize("content", [None, "notes"])
def test_users_folder_is_not_a_save_and_stays(tmp_path, text, content):
    """It has the name of a save: that save is not kept, and the run continues."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2)
    mine = out / "checkpoint-000003"
    mine.mkdir()
    if content:
        (mine / content).write_text("mine")
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6, "--save-freq", 1, "--keep", 2)
    assert result.exit_code == 0, result.output
    assert f"note: {mine} is not a save of this run, so it stays: step 3 is not kept" in result.output
    assert [p.name for p in mine.iterdir()] == ([content] if content else [])
    assert steps(out) == [3, 5, 6]


def test_read_only_save_is_never_pruned(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2, "--save-freq", 1, "--keep", 3)
    (out / "checkpoint-000001").chmod(0o555)
    (out / "checkpoint-000002" / "model.safetensors").chmod(0o444)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6, "--save-freq", 1, "--keep", 2)
    assert result.exit_code == 0, result.output
    assert steps(out) == [1, 2, 5, 6]


def test_save_with_user_files_is_never_pruned(tmp_path, text):
    """It is neither pruned nor replaced when its step is repeated."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 3, "--save-freq", 1, "--keep", 3, "--drop-rate", 0.1)
    kept = [out / f"checkpoint-{step:06d}" for step in (2, 3)]
    for save in kept:
        (save / "notes.txt").write_text("mine")
    before = [bits(save) for save in kept]
    flags = ("--save-freq", 1, "--keep", 2, "--eval-iter", 1)
    result = invoke(main, "pretrain", "--resume", out / "checkpoint-000001", "--max-steps", 6, *flags)
    assert result.exit_code == 0, result.output
    assert [bits(save) for save in kept] == before
    assert steps(out)[-2:] == [5, 6]


@pytest.mark.parametrize("target", ["checkpoint-000002", "moved/checkpoint-000002", "other/checkpoint", "other/best"])
def test_link_to_another_save_is_not_written_through(tmp_path, text, target):
    """A link to a moved save or to another run's becomes a copy, like a link to one of the run's own saves."""
    out, save = tmp_path / "run", tmp_path / target
    pretrain(main, text, out, "--max-steps", 2, "--save-freq", 1, "--keep", 2)
    if target.startswith("other"):
        shutil.copytree(out, tmp_path / "other")
        shutil.copytree(out / "checkpoint", save, dirs_exist_ok=True)  # best has no training state
    else:
        save.parent.mkdir(exist_ok=True)
        (out / "checkpoint-000002").rename(save)
    shutil.rmtree(out / "checkpoint")
    (out / "checkpoint").symlink_to(save)
    before = bits(save)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 4)
    assert result.exit_code == 0, result.output
    assert bits(save) == before
    assert step_of(out) == 4


@pytest.mark.parametrize("name", ["rename", "rmdir", "mkdir"])
@pytest.mark.parametrize("target", ["checkpoint-", "best"])
def test_failing_copy_does_not_end_the_run(tmp_path, text, monkeypatch, name, target):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2, "--save-freq", 1, "--keep", 2)
    real = getattr(os, name)

    def failing(path, *args, **kwargs):
        if target in str(path):
            raise OSError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6, "--save-freq", 1, "--keep", 2)
    assert result.exit_code == 0, result.output
    notes = [line for line in result.output.splitlines() if line.startswith("note: the checkpoint is saved, but ")]
    assert len(notes) == len(set(notes)) <= 2, "one note, not one per save"
    assert notes or name == "rmdir" or (name, target) == ("rename", "best"), "these fail nothing"
    assert all(line.endswith(": Permission denied; let this user write there") for line in notes)
    monkeypatch.undo()
    assert step_of(out) == 6
    assert load(out / "best")


def test_file_in_place_of_the_checkpoint_is_named(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2, "--save-freq", 1, "--keep", 2)
    shutil.rmtree(out / "checkpoint")
    (out / "checkpoint").write_text("mine")
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 3)
    check_refused(result, f"cannot write {out / 'checkpoint'}: File exists; move what is in the way")
    assert (out / "checkpoint").read_text() == "mine"


def test_best_cannot_be_resumed(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    result = invoke(main, "pretrain", "--resume", out / "best", "--max-steps", 2)
    check_refused(result, f"is a model without a training state: resume the run with --resume {out}, or start another")


def validation_loss(checkpoint, text):
    """The loss of a checkpoint's weights on the three windows of the validation text."""
    ids = np.frombuffer(text.read_bytes()[450:], np.uint8).astype(int)
    windows = np.array([ids[i : i + 17] for i in range(0, len(ids) - 16, 16)])
    return float(load(checkpoint).loss(windows[:, :-1], windows[:, 1:]))


def test_best_has_the_lowest_validation_loss(tmp_path, text, monkeypatch):
    """The loss is that of the saved weights; the learning rate is so high that the loss rises again."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 12, "--save-freq", 1, "--keep", 20, "--lr", 0.05, "--warmup-steps", 0)
    losses = {step: validation_loss(out / f"checkpoint-{step:06d}", text) for step in steps(out)}
    best = min(losses, key=losses.get)
    assert best not in (0, 12), "the first or the last is the best: this tests nothing"
    about = read_header(out / "best").about
    assert (int(about["step"]), float(about["val_loss"])) == (best, losses[best])
    check_same_bits(load(out / "best").params, load(out / f"checkpoint-{best:06d}").params)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 13)
    assert result.exit_code == 0
    assert int(read_header(out / "best").about["step"]) == best, "resumed: the best is forgotten"


def test_resume_finishes_an_interrupted_save(tmp_path, text):
    """The process ends between saving the checkpoint and copying it to best or to checkpoint-N."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 3, "--save-freq", 1, "--keep", 9)
    for gone in (out / "best", out / "checkpoint-000003"):
        shutil.rmtree(gone)
    result = invoke(main, "pretrain", "--resume", out, "--save-freq", 1, "--keep", 9)
    assert result.exit_code == 0, result.output
    check_same_bits(load(out / "best").params, load(out).params)
    assert steps(out) == [0, 1, 2, 3]


def test_run_resumed_earlier_keeps_its_new_saves(tmp_path, text):
    """Abandoned later saves do not count towards --keep, nor do the user's folders."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 8, "--save-freq", 2, "--keep", 4)
    for file in (out / "checkpoint").iterdir():
        file.unlink()
    for file in (out / "checkpoint-000002").iterdir():
        shutil.copy(file, out / "checkpoint")
    mine = out / "checkpoint-202405"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (out / "checkpoint-000000").symlink_to(mine)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 5, "--save-freq", 1, "--keep", 2)
    assert result.exit_code == 0, result.output
    assert steps(out) == [0, 4, 5, 6, 8, 202405]
    assert (mine / "notes.txt").read_text() == "mine"


def test_second_process_in_one_folder_is_refused(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    with Run.open(out).locked():
        before = snapshot(out)
        check_refused(invoke(main, "pretrain", "--resume", out, "--max-steps", 2), "another process is training in")
        assert snapshot(out) == before
    assert invoke(main, "pretrain", "--resume", out, "--max-steps", 2).exit_code == 0


def test_run_without_a_save_cannot_be_resumed(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    shutil.rmtree(out / "checkpoint")
    check_refused(invoke(main, "pretrain", "--resume", out), "ended before its first save: start it again")
    check_refused(
        invoke(main, "pretrain", "--out", out, "--text", text, *SMALL), "without a save: if it has ended, delete it"
    )


def test_run_contains_its_vocabulary(tmp_path, text):
    """The source folder may be deleted; a changed vocabulary in the run is refused."""
    words = shutil.copytree(FIXTURE, tmp_path / "words")
    out = tmp_path / "run"
    pretrain(main, text, out, "--encoding", words, "--max-steps", 2)
    shutil.rmtree(words)
    out = out.rename(tmp_path / "moved")
    assert invoke(main, "generate", out, "A", "--max-new-tokens", 2).exit_code == 0
    assert invoke(main, "pretrain", "--resume", out, "--max-steps", 3).exit_code == 0
    file = out / "vocabulary" / "encoder.json"
    ids = json.loads(file.read_text(encoding="utf-8"))
    ids["r"], ids["s"] = ids["s"], ids["r"]
    file.write_text(json.dumps(ids), encoding="utf-8")
    check_refused(invoke(main, "pretrain", "--resume", out, "--max-steps", 4), "(or the vocabulary) is not the text")


def test_missing_vocabulary_is_named(tmp_path, text):
    out = tmp_path / "run"
    words = shutil.copytree(FIXTURE, tmp_path / "words")
    pretrain(main, text, out, "--max-steps", 1, "--encoding", words)
    (out / "vocabulary").rename(tmp_path / "elsewhere")
    shutil.rmtree(words)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 2)
    check_refused(result, f"{words}, the vocabulary of {out}, was not found: restore it, or pass its folder")
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 2, "--encoding", tmp_path / "elsewhere")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("content", [None, "", "x", "step\n1\n", "step,epoch\n1,x\n"])
def test_missing_or_foreign_losses_are_named(tmp_path, text, content):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    (out / "losses.csv").unlink()
    if content is not None:
        (out / "losses.csv").write_text(content)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 2)
    assert result.exit_code == 2
    assert "losses.csv cannot be read as a table of losses" in result.output.splitlines()[-1]


def test_saving_run_has_a_checkpoint_before_its_first_step(tmp_path, text):
    pretrain(main, text, tmp_path / "run", "--max-steps", 1, "--save-freq", 5, "--keep", 9)
    assert steps(tmp_path / "run") == [0, 1]


def test_truncated_row_is_dropped(tmp_path, text):
    """As left by a kill during a write; the resumed run has all rows."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 5)
    want, whole = Run.open(out).losses.read(), (out / "losses.csv").read_bytes()
    later = b"6,1,448,5.25,5.5,5.75,0.002,0.25"
    for cut in range(len(later) - 3):
        (out / "losses.csv").write_bytes(whole + later[:cut])
        assert Run.open(out).losses.read() == want, f"cut at byte {cut}"
    result = invoke(main, "pretrain", "--resume", out)
    assert result.exit_code == 0, result.output
    assert (out / "losses.csv").read_bytes() == whole


CHANGED, UNUSABLE = "was changed since it was written", "no usable run.json"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (("4", "5"), CHANGED),
        (('"seed": 123', '"seed": 124'), CHANGED),
        (("sha256", "sha257"), UNUSABLE),
        (("{", ""), UNUSABLE),
    ],
)
def test_changed_settings_are_refused(tmp_path, text, damage, message):
    """With another learning rate or seed in run.json, the run would continue differently."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    file = out / "run.json"
    before = file.read_text()
    assert damage[0] in before
    file.write_text(before.replace(*damage, 1))
    left = snapshot(out)
    check_refused(invoke(main, "pretrain", "--resume", out), message)
    assert snapshot(out) == left
    assert json.loads(before)["settings"]["seed"] == 123


def test_full_disk_is_a_one_line_error(tmp_path, text):
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 3)
    want = load(out).params
    with room_for(20_000):
        result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6)
    assert result.exit_code == 2
    assert "cannot save to" in result.output.splitlines()[-1]
    check_same_bits(load(out).params, want)
    with room_for(100):
        result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6)
    check_refused(result, f"cannot write {out}")
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 6)
    assert result.exit_code == 0, result.output
    assert step_of(out) == 6


def test_failed_append_loses_no_row(tmp_path, text, monkeypatch):
    """A single disk error midway through a row does not end the run, and no row is lost."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(main, text, whole, "--max-steps", 5)
    real, failed = Path.open, []

    def failing(self, mode="r", *args, **kwargs):
        if mode == "a" and self.parent == out and len(failed) < 2:
            failed.append(mode)
            if len(failed) == 2:
                with real(self, mode) as f:
                    f.write("2,1,192,5.")
                raise OSError(5, "Input/output error")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    pretrain(main, text, out, "--max-steps", 5)
    monkeypatch.undo()
    assert len(failed) == 2
    got, want = (
        [row.rpartition(",")[0] for row in (run / "losses.csv").read_text().splitlines()] for run in (out, whole)
    )
    assert got == want

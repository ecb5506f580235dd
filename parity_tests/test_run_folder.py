"""What a run's folder keeps of its saves, and what of it may be damaged."""

import json
import os

import numpy as np
import pytest

from numpy_gpt import load
from numpy_gpt.cli import main
from numpy_gpt.run import Run
from numpy_gpt.weights.checkpoint import load_training, read_header
from parity_tests.test_checkpoint import check_same_bits, room_for
from parity_tests.test_pretrain import check_refused, invoke, pretrain, rows, snapshot, text  # noqa: F401 (text: a fixture)


def steps(folder):
    return sorted(int(each.name.split("-")[1]) for each in folder.glob("checkpoint-*"))


def step_of(folder):
    return int(load_training(folder)["loop.counters"][0])


def test_the_last_saves_are_kept(tmp_path, text):  # noqa: F811
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 11, "--save-freq", 3, "--keep", 3)
    assert steps(out) == [6, 9, 11]
    assert [step_of(out / f"checkpoint-{step:06d}") for step in steps(out)] == [6, 9, 11]
    check_same_bits(load(out).params, load(out / "checkpoint-000011").params)
    (out / "checkpoint-of-mine").mkdir()  # the user's own folders are none of a run's business
    invoke(main, "pretrain", "--resume", out, "--max-steps", 12, "--save-freq", 1)
    assert {p.name for p in out.glob("checkpoint-*")} == {f"checkpoint-0000{n:02}" for n in (6, 9, 11)} | {
        "checkpoint-of-mine"
    }, "without --keep nothing is kept, and nothing kept is dropped"
    invoke(main, "pretrain", "--resume", out, "--max-steps", 14, "--save-freq", 1, "--keep", 2)
    (out / "checkpoint-of-mine").rmdir()
    assert steps(out) == [13, 14]


def test_a_kept_save_goes_on_as_the_run_did(tmp_path, text):  # noqa: F811
    """A copy moved back into the checkpoint's place is that step again."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 6, "--save-freq", 2, "--keep", 3, "--drop-rate", 0.1)
    want = load(out).params
    for file in (out / "checkpoint").iterdir():
        file.unlink()
    for file in (out / "checkpoint-000002").iterdir():
        file.rename(out / "checkpoint" / file.name)
    result = invoke(main, "pretrain", "--resume", out)
    assert result.exit_code == 0, result.output
    check_same_bits(load(out).params, want)


def test_the_best_is_the_save_with_the_lowest_validation_loss(tmp_path, text):  # noqa: F811
    """Learning far too fast, so that it gets worse again."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 12, "--save-freq", 1, "--keep", 20, "--lr", 0.3, "--warmup-steps", 0)
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows(out)}  # after step 0, 2, 4, …
    at_save = {step: losses[(step - 1) // 2 * 2] for step in steps(out) if step}
    best = min(at_save, key=at_save.get)
    assert best < 12, "the last is the best: this tests nothing"
    about = read_header(out / "best").about
    assert (int(about["step"]), float(about["val_loss"])) == (best, at_save[best])
    check_same_bits(load(out / "best").params, load(out / f"checkpoint-{best:06d}").params)
    result = invoke(main, "pretrain", "--resume", out, "--max-steps", 13)
    assert result.exit_code == 0
    assert int(read_header(out / "best").about["step"]) == best, "resumed: the best is forgotten"


def test_a_run_that_saves_has_a_checkpoint_before_its_first_step(tmp_path, text):  # noqa: F811
    pretrain(main, text, tmp_path / "run", "--max-steps", 1, "--save-freq", 5, "--keep", 9)
    assert steps(tmp_path / "run") == [0, 1]


def test_a_row_cut_short_is_left_out(tmp_path, text):  # noqa: F811
    """As a kill in the middle of a write leaves it; the run resumed has all rows."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 5)
    want, whole = Run.open(out).losses(), (out / "losses.csv").read_bytes()
    later = b"6,1,448,5.25,5.5,5.75,0.002,0.25"
    for cut in range(len(later) - 3):
        (out / "losses.csv").write_bytes(whole + later[:cut])
        assert Run.open(out).losses() == want, f"cut at byte {cut}"
    result = invoke(main, "pretrain", "--resume", out)
    assert result.exit_code == 0, result.output
    assert (out / "losses.csv").read_bytes() == whole


@pytest.mark.parametrize("damage", [("4", "5"), ('"seed": 123', '"seed": 124'), ("sha256", "sha257"), ("{", "")])
def test_settings_that_were_changed_are_refused(tmp_path, text, damage):  # noqa: F811
    """A run.json with another learning rate, or seed, would go on as another run."""
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 1)
    file = out / "run.json"
    before = file.read_text()
    assert damage[0] in before
    file.write_text(before.replace(*damage, 1))
    left = snapshot(out)
    check_refused(invoke(main, "pretrain", "--resume", out), "no usable run.json")
    assert snapshot(out) == left
    assert json.loads(before)["settings"]["seed"] == 123


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path, text):  # noqa: F811
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


def test_copies_are_made_where_files_cannot_be_shared(tmp_path, text, monkeypatch):  # noqa: F811
    def refuse(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2, "--save-freq", 1, "--keep", 2)
    assert steps(out) == [1, 2]
    assert np.array_equal(load(out / "checkpoint-000002").params["pos_emb.weight"], load(out).params["pos_emb.weight"])

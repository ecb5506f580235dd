"""FIFOs, devices and folders in place of a file: a clear error, and no waiting for a pipe's other end."""

import os
import shutil
import subprocess
import sys

import pytest

from numpy_gpt import load
from numpy_gpt.cli.main import main
from numpy_gpt.runs.losses import Losses
from parity_tests.judge.runs import invoke, pretrain, rows

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="FIFOs are POSIX's"),
    pytest.mark.usefixtures("brief_runs"),
]

PLOT = Losses.plot

HANG = 120
"""Seconds after which a process counts as hung: a hundred times its usual duration."""

READERS = {
    "run.json": "Run.open(path.parent)",
    "losses.csv": "Run(path.parent, Settings()).losses.read()",
    "model.safetensors": "read_tensors(path)",
    "index.json": "read_json(path)",
    "story.txt": "find('the story', '0' * 64, [path], 'http://127.0.0.1:9/', None, 'give another')",
    "weights.pth": "read_pth(path)",
}
"""File name -> a call that reads it, and raises InputError for anything but a regular file."""

READ_ALL = f"""
import os, sys
from pathlib import Path
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.finding import find
from numpy_gpt.io.formats import kind_of_file
from numpy_gpt.runs.folder import Run
from numpy_gpt.runs.settings import Settings
from numpy_gpt.weights.transfer import _Part
from numpy_gpt.weights.tensors import read_tensors
from torch_gpt.weights import read_pth
folder = Path(sys.argv[1])
for name, call in {READERS!r}.items():
    path = folder / name
    try:
        eval(call)
    except InputError as error:
        print(name, error)
    else:
        raise AssertionError(name)
assert kind_of_file(folder / "model.safetensors") == ""
os.mkfifo(folder / ".data.part.from")
try:
    _Part(folder / "data").note
except OSError as error:
    print("note", error)
"""


@pytest.mark.parametrize("kind", ["fifo", "zeros"])
def test_readers_do_not_wait_for_a_fifo_or_device(tmp_path, kind):
    for name in READERS:
        os.mkfifo(tmp_path / name) if kind == "fifo" else (tmp_path / name).symlink_to("/dev/zero")
    done = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == {*READERS, "note"}
    assert all("regular file" in words for name, words in lines.items() if name != "weights.pth"), lines
    assert "is a pipe or a device" in lines["weights.pth"]


def test_fifo_named_like_a_partial_folder_is_kept(tmp_path):
    """A save sweeps the leftovers of killed processes, but only folders."""
    os.mkfifo(tmp_path / ".model.safetensors.1-0.partial")
    (tmp_path / ".model.safetensors.1-1.partial").symlink_to(tmp_path)
    code = "from parity_tests.judge.runs import saved; import sys; saved(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=HANG)
    assert len(list(tmp_path.glob(".*partial"))) == 2
    assert load(tmp_path).config.emb_dim == 8


def test_plot_replaces_links_and_files(tmp_path, text, monkeypatch):
    """It is drawn to a new file and renamed: writing in place could block on a FIFO or overwrite a link's target."""
    monkeypatch.setattr(Losses, "plot", PLOT)  # brief_runs disables it
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"mine")
    out = tmp_path / "run"
    pretrain(main, text, out, "--max-steps", 2)
    (out / "losses.png").unlink()
    (out / "losses.png").symlink_to(mine)
    invoke(main, "pretrain", "--resume", out, "--max-steps", 3)
    os.link(out / "losses.png", tmp_path / "snapshot.png")
    before = (tmp_path / "snapshot.png").read_bytes()
    invoke(main, "pretrain", "--resume", out, "--max-steps", 5)
    assert mine.read_bytes() == b"mine"
    assert (tmp_path / "snapshot.png").read_bytes() == before != (out / "losses.png").read_bytes()


def test_removed_losses_start_a_new_table(tmp_path, text, monkeypatch):
    out, append = tmp_path / "run", Losses.append

    def removed_first(run, step, seconds):
        if step.step == 2:
            (out / "losses.csv").unlink()
        append(run, step, seconds)

    monkeypatch.setattr(Losses, "append", removed_first)
    pretrain(main, text, out, "--max-steps", 5)
    assert [row["step"] for row in rows(out)] == ["2", "4"]
    assert invoke(main, "pretrain", "--resume", out, "--max-steps", 6).exit_code == 0


def test_run_is_saved_if_losses_become_a_device(tmp_path, text, monkeypatch):
    out, append = tmp_path / "run", Losses.append

    def replaced_first(run, step, seconds):
        if step.step == 2:
            (out / "losses.csv").unlink()
            (out / "losses.csv").symlink_to("/dev/zero")
        append(run, step, seconds)

    monkeypatch.setattr(Losses, "append", replaced_first)
    flags = ["--context-length", 16, "--batch-size", 4, "--eval-freq", 2, "--eval-iter", 2, "--max-steps", 5]
    result = invoke(main, "pretrain", "--text", text, "--out", out, *flags)
    assert (result.exit_code, "losses.csv cannot be read as a table of losses" in result.output) == (2, True)
    assert load(out)
    monkeypatch.undo()
    (out / "losses.csv").unlink()
    shutil.copy(text, out / "losses.csv")
    assert "replace it with a file of the one line" in invoke(main, "pretrain", "--resume", out).output

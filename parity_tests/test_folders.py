"""New and unfinished folders: a failing command removes only what it made."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from numpy_gpt.errors import InputError
from numpy_gpt.io import files
from numpy_gpt.io.files import HOST, being_written, flush, lock, partial_folder, replacing, sweep, unlock
from numpy_gpt.io.folders import new_folder, taken


def content(place):
    return {str(p.relative_to(place)): p.read_bytes() for p in place.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_new_folder_appears_when_complete(tmp_path, there):
    out = tmp_path / "a" / "b" / "out"
    if there:
        out.mkdir(parents=True)
    with new_folder(out) as folder:
        (folder / "x").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub" / "y").write_text("2")
        assert not (out / "x").exists()
    assert content(out) == {"x": b"1", "sub/y": b"2"}
    assert list(out.parent.iterdir()) == [out]
    assert sorted(p.name for p in out.iterdir()) == ["sub", "x"]


def test_new_folder_can_be_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(Path()) as folder:
        (folder / "x").write_text("1")
    assert content(tmp_path) == {"x": b"1"}


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), OSError(28, "full")])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_failing_block_leaves_existing_files(tmp_path, there, error):
    out = tmp_path / "a" / "out"
    if there:
        out.mkdir(parents=True)

    def fail():
        with new_folder(out) as folder:
            (folder / "x").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == (["a", "a/out"] if there else [])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_files_of_another_process_stay(tmp_path, there, fails):
    out = tmp_path / "out"
    if there:
        out.mkdir()

    def work():
        with new_folder(out) as folder:
            (folder / "x").write_text("1")
            out.mkdir(exist_ok=True)
            (out / "run.json").write_text("another's")
            if fails:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt if fails else InputError) as error:
        work()
    assert fails or str(error.value) == f"{out} exists and is not empty: choose another --out"
    assert content(tmp_path) == {"out/run.json": b"another's"}


def test_failed_move_is_undone(tmp_path, monkeypatch):
    real, left = os.rename, [1]

    def failing(source, target):
        if not left:
            raise OSError(5, "Input/output error")
        left.pop()
        real(source, target)

    def work():
        with new_folder(tmp_path / "out") as folder:
            for name in "xyz":
                (folder / name).write_text(name)
            monkeypatch.setattr(os, "rename", failing)

    with pytest.raises(InputError, match="Input/output error"):
        work()
    assert not list(tmp_path.iterdir())


def test_folder_is_taken_by_one_process_at_a_time(tmp_path):
    def take():
        with taken(tmp_path / "out"):
            pytest.fail("taken twice")

    with taken(tmp_path / "out"), pytest.raises(InputError, match="another process is working in"):
        take()
    with taken(tmp_path / "out"):
        pass
    (tmp_path / "out" / "x").write_text("")
    with pytest.raises(InputError, match="exists and is not empty"):
        take()


def test_unusable_parents_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for make in (new_folder, taken):
        with (
            pytest.raises(InputError, match=r"cannot make the folder|is not empty"),
            make(tmp_path / "file" / "x"),
        ):
            pytest.fail("it was made")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system in which nothing can be made")
def test_unusable_place_is_named_at_once():
    with (
        pytest.raises(InputError, match=r"cannot make the folder /proc/zz: No such file"),
        new_folder(Path("/proc/zz")),
    ):
        pytest.fail("it was made")


def test_folder_made_by_another_process_is_not_removed(tmp_path, monkeypatch):
    """Even if still empty: that process has locked it and is about to fill it."""
    out, real = tmp_path / "out", Path.mkdir

    def raced(self, *args, **kwargs):
        if self == out and not out.is_dir():
            real(out)
        real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", raced)
    with pytest.raises(KeyboardInterrupt), taken(out):
        raise KeyboardInterrupt
    assert out.is_dir()


HOLDER = """
import sys, time
from pathlib import Path
from numpy_gpt.io.files import partial_folder
with partial_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("a model")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_sweep_removes_only_a_killed_processs_leftovers(tmp_path):
    """Regardless of process ids: in containers every process may have id 1."""
    target = tmp_path / "model.safetensors"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    held = tmp_path / os.path.basename(holder.stdout.readline().strip())
    of_the_user = tmp_path / ".model.safetensors.my.partial"
    of_the_user.mkdir()
    mine = tmp_path / f".model.safetensors.{os.getpid()}@{HOST}-99.partial"  # an earlier process had this id
    other = tmp_path / f".other.1@{HOST}-7.partial"
    for left in (mine, other):
        left.mkdir()
        (left / "half").write_text("")
    with partial_folder(target) as own:
        sweep(target)
        assert {own, held, other, of_the_user} == set(tmp_path.iterdir())
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (held / "half").exists()
    sweep(target)
    assert set(tmp_path.iterdir()) == {other, of_the_user}


def test_without_locks_the_process_id_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "lock", lambda folder: None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    ours, running, another = (
        f".x.{who}-7.partial" for who in (f"{ended.pid}@{HOST}", f"{os.getppid()}@{HOST}", f"{ended.pid}@00c0ffee")
    )
    for name in (ours, running, another):
        (tmp_path / name).mkdir()
    assert being_written(tmp_path / "x")
    sweep(tmp_path / "x")
    assert {p.name for p in tmp_path.iterdir()} == {running, another}, "another machine's processes cannot be checked"


def test_folder_replaced_while_locking_counts_as_gone(tmp_path, monkeypatch):
    """A lock on the renamed folder does not protect the new folder of that name."""
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    real, folder = fcntl.flock, tmp_path / "x"
    folder.mkdir()

    def exchanged_first(handle, how):
        folder.rename(tmp_path / "before")
        folder.mkdir()
        real(handle, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", exchanged_first)
        with pytest.raises(FileNotFoundError):
            lock(folder)
    unlock(lock(tmp_path / "before"))  # its lock was released


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_saving_works_where_folders_cannot_be_flushed(tmp_path, monkeypatch, number):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with replacing(tmp_path / "x") as beside:
        beside.write_text("1")
    assert content(tmp_path) == {"x": b"1"}


def test_other_flush_errors_are_raised(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)


def test_folder_without_read_permission_can_be_written(tmp_path, monkeypatch):
    real = os.open

    def refused(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    with replacing(tmp_path / "x") as beside:
        beside.write_text("1")
    assert (tmp_path / "x").read_text() == "1"

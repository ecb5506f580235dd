"""Paths and numbers from the command line: every unusable one is a one-line error, for every flag."""

import errno
import os
import threading
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

from numpy_gpt import GPT, GPTConfig, data, load, save
from numpy_gpt.cli.main import main
from numpy_gpt.data import load_text
from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import absolute, check_readable, kind_of
from numpy_gpt.tokenizer import get_encoding
from numpy_gpt.weights.checkpoint import find_model
from numpy_gpt.weights.source import open_source
from parity_tests.judge.runs import check_refused
from torch_gpt.cli import main as torch_main

pytestmark = pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")

LONG = "What is the meaning of life? " * 11


def invoke(*args, command=main):
    return CliRunner().invoke(command, [str(arg) for arg in args])


PLACES = {
    "info": ["info", "{}"],
    "generate": ["generate", "{}", "x"],
    "evaluate": ["evaluate", "{}"],
    "evaluate --text": ["evaluate", "{checkpoint}", "--text", "{}"],
    "evaluate --encoding": ["evaluate", "{checkpoint}", "--text", __file__, "--encoding", "{}"],
    "import": ["import", "{}", "--out", "{tmp}/new"],
    "import --out": ["import", "{checkpoint}", "--out", "{}"],
    "export": ["export", "{}", "--out", "{tmp}/new"],
    "export --out": ["export", "{checkpoint}", "--out", "{}"],
    "download --out": ["download", "124M", "--out", "{}"],
    "download --from": ["download", "124M", "--from", "{}", "--out", "{tmp}/new"],
    "pretrain --text": ["pretrain", "--text", "{}", "--out", "{tmp}/new"],
    "pretrain --encoding": ["pretrain", "--text", __file__, "--encoding", "{}", "--out", "{tmp}/new"],
    "pretrain --out": ["pretrain", "--text", __file__, "--out", "{}"],
    "pretrain --resume": ["pretrain", "--resume", "{}"],
    "pretrain --init": ["pretrain", "--text", __file__, "--init", "{}", "--out", "{tmp}/new"],
    "chapter5 --text": ["chapter5", "--no-torch", "--text", "{}"],
}

REFUSED = {
    "too long": (
        LONG,
        "(319 characters)' is too long to be a path: give the path of a file or folder here, not a text",
    ),
    "a loop": ("{tmp}/loop", "loop is a symbolic link that loops back to itself"),
    "a NUL": ("a\0b", "has a NUL character, which no path can have"),
    "a forbidden folder": ("{tmp}/locked/model", "may not be read by this user (Permission denied)"),
}


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder without permissions, simulated in os so that it holds for root too."""
    folder = tmp_path / "locked"
    folder.mkdir()
    real = {name: getattr(os, name) for name in ("stat", "open", "scandir", "mkdir")}

    def watched(name):
        def call(path, *args, **kwargs):
            if not isinstance(path, int) and os.fspath(path).startswith(f"{folder}/"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return real[name](path, *args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    return folder


@pytest.mark.usefixtures("locked")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", REFUSED)
def test_unusable_path_is_a_one_line_error(tmp_path, checkpoint, place, case):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    given, message = REFUSED[case]
    values = {"checkpoint": checkpoint, "tmp": tmp_path}
    result = invoke(*(part.format(given.format(**values), **values) for part in PLACES[place]))
    check_refused(result, message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("code", "fix"), [(errno.EIO, "check that disk"), (errno.EACCES, "let this user write there")])
def test_unforeseen_disk_error_is_one_line(monkeypatch, checkpoint, code, fix):
    def broken(*args):
        raise OSError(code, os.strerror(code), "/somewhere/file")

    monkeypatch.setattr(import_module("numpy_gpt.cli.generate"), "load", broken)
    check_refused(
        invoke("generate", checkpoint, "hello"), f"/somewhere/file cannot be used ({os.strerror(code)}): {fix}"
    )


def test_swapped_prompt_and_checkpoint_are_named(checkpoint):
    for prompt in ("hello", LONG):
        check_refused(invoke("generate", prompt, checkpoint), "the prompt and the checkpoint are swapped: give")
    assert invoke("generate", checkpoint, "hello", "--max-new-tokens", 1).exit_code == 0


def test_missing_working_directory_is_named(tmp_path, monkeypatch, checkpoint):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for args in (
        ["info", "run"],
        ["evaluate", "run"],
        ["pretrain", "--text", "words.txt"],
        ["import", "a", "--out", "b"],
    ):
        check_refused(invoke(*args), "is relative, but the working directory is gone")
    assert invoke("info", checkpoint).exit_code == 0
    with pytest.raises(InputError, match="working directory is gone"):
        absolute("words.txt")


def test_unreadable_checkpoint_is_not_called_missing(tmp_path, monkeypatch, checkpoint):
    real = Path.open

    def forbidden(path, *args, **kwargs):
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidden)
    for path in (checkpoint, checkpoint / "model.safetensors"):
        for read in (find_model, load):
            with pytest.raises(
                InputError, match=r"model\.safetensors may not be read by this user \(Permission denied\)"
            ):
                read(path)
    with pytest.raises(InputError, match="may not be read"):
        open_source(checkpoint / "model.safetensors")


@pytest.mark.usefixtures("locked")
def test_forbidden_folder_is_not_called_missing(tmp_path):
    """Newer Pythons return False where older ones raise: neither gives the reason."""
    for read in (kind_of, find_model, open_source, get_encoding, load_text, absolute):
        with pytest.raises(InputError, match=r"may not be read by this user \(Permission denied\)"):
            read(str(tmp_path / "locked" / "x") if read is not open_source else tmp_path / "locked" / "x")


def test_kinds(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    kinds = {name: kind_of(tmp_path / name) for name in ("", "file", "link", "fifo", "broken", "none", "file/below")}
    assert list(kinds.values()) == ["folder", "file", "file", "pipe", "missing", "missing", "missing"]
    assert kind_of("/dev/null") == "other"
    assert absolute(tmp_path / "link") == (tmp_path / "file").resolve()
    check_readable(tmp_path / "file")


def fed(fifo, content):
    """Write into a FIFO from a thread, once, like a shell's <(command)."""
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=[content])
    writer.start()
    return writer


def test_pipe_is_read_once(tmp_path):
    writer = fed(tmp_path / "fifo", "é\r\nb".encode() * 50_000)  # more than a pipe's buffer
    assert load_text(str(tmp_path / "fifo")) == "é\nb" * 50_000
    writer.join()


def test_pipe_can_be_evaluated_and_trained_on(tmp_path, checkpoint):
    text = "the model learns a word\n" * 40
    (tmp_path / "file").write_text(text)
    wanted = invoke("evaluate", checkpoint, "--text", tmp_path / "file").output.splitlines()[1:]
    writer = fed(tmp_path / "fifo", text.encode())
    assert invoke("evaluate", checkpoint, "--text", tmp_path / "fifo").output.splitlines()[1:] == wanted
    writer.join()
    # like /dev/stdin and /dev/fd/63: a link whose target has no usable name
    reader, written = os.pipe()
    os.write(written, text.encode())
    os.close(written)
    small = ["--context-length", 16, "--batch-size", 4, "--max-steps", 1]
    result = invoke("pretrain", "--text", f"/dev/fd/{reader}", "--out", tmp_path / "run", *small)
    os.close(reader)
    assert result.exit_code == 0, result.output
    assert "960 characters" in result.output
    check_refused(invoke("evaluate", tmp_path / "run"), "was not found: restore it")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/tty"])
def test_device_is_refused_as_text(checkpoint, tmp_path, device):
    for args in (["evaluate", checkpoint], ["pretrain", "--out", tmp_path / "run"], ["chapter5", "--no-torch"]):
        check_refused(invoke(*args, "--text", device), f"{device} is a device: give a file or a pipe of UTF-8 text")


def test_endless_pipe_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_PIPE", 2**21)
    for length, fits in ((2**21, True), (2**21 + 1, False)):
        writer = fed(tmp_path / f"fifo{length}", b"y" * length)
        if fits:
            assert len(load_text(str(tmp_path / f"fifo{length}"))) == length
        else:
            with pytest.raises(InputError, match="gives more than 2,097,152 bytes: save them as a file"):
                load_text(str(tmp_path / f"fifo{length}"))
        writer.join()


def test_file_of_zeros_is_not_read_completely(tmp_path):
    with (tmp_path / "sparse").open("wb") as f:
        f.truncate(2**42)
    with pytest.raises(InputError, match="is binary"):
        load_text(str(tmp_path / "sparse"))


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
def test_file_of_unknown_length_is_read(tmp_path):
    assert os.stat("/proc/self/limits").st_size == 0
    assert load_text("/proc/self/limits") == Path("/proc/self/limits").read_text()


FLOATS = {
    "pretrain": ["--lr", "--clip", "--weight-decay", "--drop-rate"],
    "generate": ["--temperature", "--top-p"],
}


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
@pytest.mark.parametrize("command", [main, torch_main], ids=["numpy", "torch"])
def test_flags_refuse_nonfinite_numbers(tmp_path, checkpoint, command, value):
    for name, flags in FLOATS.items():
        if name in command.commands:
            for flag in flags:
                args = [checkpoint, "x"] if name == "generate" else ["--out", tmp_path / "run"]
                result = invoke(name, *args, f"{flag}={value}", command=command)
                check_refused(result, f"Invalid value for '{flag}'")


def test_number_flags_use_the_shared_types():
    """Ensure that new flags use them too. A seed may be any int, which Generator checks."""
    from benchmarks.cli import main as benchmarks_main
    from numpy_gpt.cli.flags import Count, Finite

    for group in (main, torch_main, benchmarks_main):
        for command in group.commands.values():
            for param in command.params:
                kind = type(param.type).__name__
                if "Float" in kind or "FLOAT" in kind or "Finite" in kind:
                    assert isinstance(param.type, Finite), (command.name, param.name)
                if "Int" in kind or "Count" in kind:
                    assert isinstance(param.type, Count) or param.name == "seed", (command.name, param.name, kind)


COUNTS = [
    "--context-length",
    "--epochs",
    "--max-steps",
    "--batch-size",
    "--stride",
    "--warmup-steps",
    "--eval-freq",
    "--eval-iter",
    "--seed",
    "--save-freq",
    "--keep",
]


@pytest.mark.parametrize("digits", [30, 400, 5000])
@pytest.mark.parametrize("command", [main, torch_main], ids=["numpy", "torch"])
def test_huge_numbers_are_refused(tmp_path, command, digits):
    for flag in COUNTS:
        result = invoke("pretrain", "--out", tmp_path / "run", flag, "1" + "0" * digits, command=command)
        assert result.exit_code == 2, (flag, result.output)
        assert "Error: " in result.output.splitlines()[-1]


@pytest.mark.parametrize("command", [main, torch_main], ids=["numpy", "torch"])
def test_largest_counts_work(tmp_path, command):
    text = tmp_path / "text"
    text.write_text("the model learns a word\n" * 40)
    flags = [arg for flag in ("--epochs", "--eval-freq", "--eval-iter", "--warmup-steps") for arg in (flag, 2**63 - 1)]
    small = ["--text", text, "--context-length", 16, "--batch-size", 4, "--max-steps", 2]
    result = invoke("pretrain", "--out", tmp_path / "run", *small, *flags, command=command)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [main, torch_main], ids=["numpy", "torch"])
def test_run_of_huge_length_starts(tmp_path, monkeypatch, command):
    """10^16 epochs, stopped within the first one."""
    text = tmp_path / "text"
    text.write_text("the model learns a word\n" * 40)

    def stop(run, step, seconds):
        if step.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("numpy_gpt.runs.losses.Losses.append", stop)
    args = ["--epochs", 10**16, "--max-steps", 2**63 - 1, "--warmup-steps", 10, "--eval-freq", 2, "--eval-iter", 1]
    args += ["--text", text, "--context-length", 16, "--batch-size", 4, "--out", tmp_path / "run"]
    result = invoke("pretrain", *args, command=command)
    assert result.exit_code == 130, result.output
    assert "Ep 1 (Step 000002)" in result.output
    assert "left" in result.output


@pytest.mark.parametrize("place", PLACES)
def test_empty_path_is_refused(tmp_path, monkeypatch, checkpoint, place):
    """As with an unset shell variable: --out "$OUT"."""
    monkeypatch.chdir(tmp_path)
    result = invoke(*(part.format("", checkpoint=checkpoint, tmp=tmp_path / "new") for part in PLACES[place]))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_unusable_save_paths_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(7, 4, emb_dim=4, n_heads=2, n_layers=1))
    for path, message in {"": "path to save to is empty", "a\0.safetensors": "NUL character", LONG: "too long"}.items():
        with pytest.raises(InputError, match=message):
            save(model, path)
    assert list(tmp_path.iterdir()) == []

"""Commands run as processes: output that cannot be written or shown, and unforeseen exceptions."""

import errno
import io
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import pytest

from benchmarks.cli import main as benchmarks_main
from numpy_gpt import GPT, GPTConfig, load
from numpy_gpt.cli.main import main
from numpy_gpt.console import Report
from numpy_gpt.errors import InputError
from numpy_gpt.io.outermost import outermost
from numpy_gpt.runs.losses import Losses
from parity_tests.__main__ import main as parity_main
from torch_gpt.cli import main as torch_main

SMALL = ["--context-length", "16", "--batch-size", "4", "--eval-freq", "1", "--eval-iter", "1", "--max-steps", "2"]
GROUPS = {"numpy-gpt": main, "torch-gpt": torch_main, "parity_tests": parity_main, "benchmarks": benchmarks_main}


class Failing(io.StringIO):
    """A stream that keeps its first `good` writes, then fails like a full disk or a pipe without a reader."""

    def __init__(self, number, good=0):
        super().__init__()
        self.number, self.good, self.failures = number, good, 0

    def write(self, text):
        self.good -= 1
        if self.good < 0:
            self.failures += 1
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


def run(monkeypatch, *args, stdout, group=main):
    """Run a command through sys.argv with this stdout; return its exit code and stderr."""
    errors = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["numpy-gpt", *map(str, args)])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", errors)
        with pytest.raises(SystemExit) as exit_:
            group(prog_name="numpy-gpt")
    return exit_.value.code, errors.getvalue()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("the model learns a word\n" * 40)
    return file


STREAMS = {
    "a full disk": lambda: Failing(errno.ENOSPC),
    "a full disk, later": lambda: Failing(errno.ENOSPC, good=7),
    "a reader that is gone": lambda: Failing(errno.EPIPE, good=3),
    "a terminal that is gone": lambda: Failing(errno.EIO, good=3),
    "a closed stdout": lambda: None,
}


@pytest.fixture(scope="module")
def reported(tmp_path_factory, text):
    """The parameters of the same run with working output."""
    out = tmp_path_factory.mktemp("reported") / "run"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["pretrain", "--text", str(text), "--out", str(out), *SMALL])
    return load(out).params


@pytest.mark.parametrize(
    ("group", "stream"), [*(("numpy-gpt", stream) for stream in STREAMS), ("torch-gpt", "a full disk")]
)
def test_run_with_unwritable_output_finishes_and_is_saved(monkeypatch, tmp_path, text, reported, group, stream):
    monkeypatch.setattr(
        Losses, "plot", lambda losses, _: losses.file.with_suffix(".png")
    )  # saves matplotlib's start-up
    args = ["pretrain", "--text", text, "--out", tmp_path / "quiet", *SMALL]
    code, errors = run(monkeypatch, *args, stdout=STREAMS[stream](), group=GROUPS[group])
    assert code == 0
    expected = 0 if stream == "a closed stdout" else 1
    assert errors.count("the output can no longer be written") == errors.count("\n") == expected, errors
    for name, array in load(tmp_path / "quiet").params.items():
        np.testing.assert_allclose(array, reported[name], rtol=0, atol=0 if group == "numpy-gpt" else 1e-5)
    assert (tmp_path / "quiet" / "losses.csv").read_text().count("\n") == 3


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("command", ["info", "generate", "evaluate", "--help"])
def test_unwritable_result_is_an_error(monkeypatch, checkpoint, text, stream, command):
    args = {"generate": ["x", "--max-new-tokens", "9"], "evaluate": ["--text", text]}.get(command, [])
    stdout = STREAMS[stream]()
    if isinstance(stdout, Failing):
        stdout.good = min(stdout.good, {"--help": 0, "evaluate": 1}.get(command, 3))
    code, errors = run(monkeypatch, command, *([] if command == "--help" else [checkpoint]), *args, stdout=stdout)
    if stream == "a reader that is gone":
        assert (code, errors) == (1, "")  # as with `| head -1`
    else:
        assert code == 2
        assert errors.startswith("Error: the output cannot be written (")
        assert errors.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_stdout_is_an_error_in_a_process(checkpoint):
    """No output is left for Python to flush at exit, which would make the exit code 120."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "numpy_gpt.cli", "info", checkpoint]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: the output cannot be written (No space left on device): redirect it to a writable place\n"
    )


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_unencodable_characters_are_escaped(monkeypatch, checkpoint, encoding):
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    prompt = "é × 你 — "
    code, errors = run(monkeypatch, "generate", checkpoint, prompt, "--max-new-tokens", "0", stdout=stdout)
    assert (code, errors) == (0, "")
    stdout.flush()
    assert raw.getvalue() == prompt.encode(encoding, "backslashreplace") + b"\n"


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_works_in_a_narrow_encoding(monkeypatch, group, encoding):
    command = {"numpy-gpt": "pretrain", "torch-gpt": "pretrain", "parity_tests": "report", "benchmarks": "compare"}[
        group
    ]
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding)
    code, errors = run(monkeypatch, command, "--help", stdout=stdout, group=GROUPS[group])
    assert (code, errors) == (0, "")
    stdout.flush()
    assert b"--debug" in raw.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_bars_and_spinners_respect_the_encoding(monkeypatch, encoding):
    """rich draws simpler bars in a narrow encoding; other characters are escaped without an exception."""
    raw = io.BytesIO()
    stdout = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    monkeypatch.setattr(stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", stdout)
    report = Report()
    assert report.console.is_terminal
    with report.status() as show:
        show("thinking")
    with report.transfer("model…", 0, 10) as show:
        show(10)
    assert list(report.track([1, 2], "counting")) == [1, 2]
    report.line("2 × 3 · 你")
    stdout.flush()
    assert "\\u4f60" in raw.getvalue().decode(encoding)
    assert "\\u28" not in raw.getvalue().decode(encoding)  # no escaped spinner


def failing_inside(monkeypatch, error):
    """Make numpy-gpt info raise this exception."""

    def describe(*_):
        raise error

    monkeypatch.setattr(import_module("numpy_gpt.cli.main"), "describe", describe)


@pytest.mark.parametrize(
    "error", [RuntimeError("an odd thing\nin two lines"), OSError(5, "Input/output error"), KeyError("x")]
)
def test_unforeseen_exception_gives_one_line_and_a_file(monkeypatch, tmp_path, error):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing_inside(monkeypatch, error)
    code, errors = run(monkeypatch, "info", "--model", "tiny", stdout=io.StringIO())
    (file,) = tmp_path.iterdir()
    assert code == 70
    assert errors.count("\n") == 1
    assert errors.startswith(f"Error: {type(error).__name__}: ")
    assert str(file) in errors
    content = file.read_text()
    assert "Traceback (most recent call last)" in content
    assert "in describe" in content
    assert content.startswith("numpy-gpt info --model tiny\n")


@pytest.mark.parametrize("args", [["info", "--debug", "--model", "tiny"], ["--debug", "info", "--model", "tiny"]])
def test_debug_prints_the_traceback(monkeypatch, tmp_path, args):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    failing_inside(monkeypatch, RuntimeError("odd"))
    code, errors = run(monkeypatch, *args, stdout=io.StringIO())
    assert code == 70
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.endswith("RuntimeError: odd\n")
    assert not list(tmp_path.iterdir())


def test_traceback_is_printed_if_no_file_can_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    failing_inside(monkeypatch, RuntimeError("odd"))
    code, errors = run(monkeypatch, "info", "--model", "tiny", stdout=io.StringIO())
    assert (code, errors.splitlines()[-1]) == (70, "RuntimeError: odd")


def test_exceptions_reach_a_caller_with_arguments(monkeypatch):
    """Called with explicit arguments, a group re-raises: CliRunner and pytest see the exception."""
    failing_inside(monkeypatch, RuntimeError("odd"))
    with pytest.raises(RuntimeError, match="odd"):
        main(["info", "--model", "tiny"])


def test_clicks_own_exceptions_reach_a_caller_who_asks_for_them(tmp_path):
    with pytest.raises(click.UsageError, match="No such command 'nothing'"):
        main(["nothing"], standalone_mode=False)
    with pytest.raises(InputError, match="does not exist"):
        main(["info", str(tmp_path / "nowhere")], standalone_mode=False)


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_has_the_handler(monkeypatch, tmp_path, group):
    def odd(*_):
        raise RuntimeError("odd")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(GROUPS[group], "resolve_command", odd)
    code, errors = run(monkeypatch, "anything", stdout=io.StringIO(), group=GROUPS[group])
    assert code == 70
    assert errors.count("\n") == len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("in_a_test", [True, False])
def test_ctrl_c_is_one_line(monkeypatch, capsys, in_a_test):
    failing_inside(monkeypatch, KeyboardInterrupt())
    if in_a_test:
        with pytest.raises(SystemExit) as exit_:
            main(["info", "--model", "tiny"])
        code, errors = exit_.value.code, capsys.readouterr().err
    else:
        code, errors = run(monkeypatch, "info", "--model", "tiny", stdout=io.StringIO())
    assert (code, errors) == (130, "interrupted\n")


def test_ctrl_c_during_import():
    with pytest.raises(SystemExit) as exit_, outermost():
        raise KeyboardInterrupt
    assert exit_.value.code == 130


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (MemoryError("Unable to allocate 6.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("something else"), False),
    ],
)
def test_memory_error_states_the_need(monkeypatch, tmp_path, text, error, amount):
    def no_memory(*_):
        raise error

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("numpy_gpt.runs.learner.GPT", no_memory)
    args = ["pretrain", "--text", text, "--out", tmp_path / "run", *SMALL]
    code, errors = run(monkeypatch, *args, stdout=io.StringIO())
    size = sum(p.size for p in GPT(GPTConfig(257, 16, emb_dim=128, n_heads=4, n_layers=2)).params.values())
    assert code == (2 if amount else 70)
    assert errors.count("\n") == 1
    assert (f"at least {16 * size / 1e6:.2f} MB, 16 bytes for each of {size:,} parameters" in errors) == amount


def test_other_memory_errors_are_one_line(monkeypatch):
    failing_inside(monkeypatch, MemoryError())
    code, errors = run(monkeypatch, "info", "--model", "tiny", stdout=io.StringIO())
    assert (code, errors) == (2, "Error: too little memory is available to this process: free some\n")


@pytest.mark.parametrize("module", ["numpy_gpt", "numpy_gpt.cli"])
def test_module_aliases_run_the_command(module):
    command = [sys.executable, "-m", module, "info", "--model", "tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "16,384" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="needs a shell of POSIX")
def test_closed_descriptors_are_not_reused(checkpoint, tmp_path):
    """If stdout and stderr are closed, the next files opened would reuse their descriptors."""
    command = 'exec "$0" -m numpy_gpt export "$1" --out "$2" >&- 2>&-'
    done = subprocess.run(["sh", "-c", command, sys.executable, checkpoint, tmp_path / "out"], check=False)
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 4 * 257 * 8


def test_loss_with_infinite_perplexity_is_printed(monkeypatch, checkpoint, text):
    monkeypatch.setattr(GPT, "loss", lambda *_: np.float32(1234.5))
    stdout = io.StringIO()
    assert run(monkeypatch, "evaluate", checkpoint, "--text", text, stdout=stdout) == (0, "")
    assert "loss        1234.5000 nats/token, the mean over all of them\nperplexity  inf\n" in stdout.getvalue()


@pytest.mark.parametrize(("length", "said"), [(16, ""), (17, "the prompt has 17 tokens; the model sees")])
def test_prompt_longer_than_the_context_is_noted(monkeypatch, checkpoint, length, said):
    code, errors = run(monkeypatch, "generate", checkpoint, "x" * length, "--max-new-tokens", 1, stdout=io.StringIO())
    assert code == 0
    assert errors.startswith(said)
    assert errors.count("\n") == bool(said)


def test_compiling_is_announced(monkeypatch):
    """The note is part of the backend's description, whatever the compiler."""
    said = []
    monkeypatch.setattr("torch_gpt.cli.check_compiler", lambda _: None)
    monkeypatch.setattr("torch_gpt.cli.run_pretrain", lambda _, backend, *rest: said.append(backend))
    assert run(monkeypatch, "pretrain", "--compile", stdout=io.StringIO(), group=torch_main) == (0, "")
    assert run(monkeypatch, "pretrain", stdout=io.StringIO(), group=torch_main) == (0, "")
    assert ["compiling takes a minute or more" in backend for backend in said] == [True, False]


def test_chapter5_suggests_only_usable_texts(monkeypatch, tmp_path):
    def nowhere(*args):
        raise InputError(args[-1])

    monkeypatch.setattr("numpy_gpt.data.find", nowhere)
    for given in ("the-verdict", str(tmp_path / "nowhere")):
        args = ["chapter5", "--no-torch", "--text", given]
        code, errors = run(monkeypatch, *args, stdout=io.StringIO())
        assert code == 2
        assert "python-manual" not in errors
        assert "file" in errors


ENDED = """
import signal, sys
from pathlib import Path
from numpy_gpt.io.folders import new_folder
from numpy_gpt.io.outermost import outermost
with outermost():
    with new_folder(Path(sys.argv[1], "new")) as folder:
        (folder / "half").write_bytes(b"half")
        print("begun", flush=True)
        signal.pause()
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_fatal_signal_leaves_no_files(tmp_path, number):
    """After kill, timeout or a closed terminal, a half-written import or export is removed, as after Ctrl-C."""
    process = subprocess.Popen([sys.executable, "-c", ENDED, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    process.send_signal(number)
    assert process.communicate(timeout=120) == (b"", b"")
    assert process.returncode == -number, "the exit status must name the signal"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ignored_signal_stays_ignored_in_commands(tmp_path):
    def ignored():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    command = [sys.executable, "-c", ENDED.replace("signal.pause()", "signal.raise_signal(signal.SIGHUP)"), tmp_path]
    assert subprocess.run(command, stdout=subprocess.PIPE, preexec_fn=ignored).returncode == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["half"]


def test_ctrl_c_before_the_command_has_begun_is_an_interrupt(monkeypatch, capsys):
    """While its arguments are read, where click would say "Aborted!" and exit with 1."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("click.Group.parse_args", interrupted)
    with pytest.raises(SystemExit) as exit_:
        main(["info", "--model", "tiny"])
    assert (exit_.value.code, capsys.readouterr().err.strip()) == (130, "interrupted")


def test_an_unforeseen_end_of_file_is_not_an_interrupt(monkeypatch):
    """click takes both for Ctrl-C."""
    failing_inside(monkeypatch, EOFError("short"))
    with pytest.raises(EOFError, match="short"):
        main(["info", "--model", "tiny"])

"""Prompts of generate from files, standard input and a session, through real pipes and terminals."""

import errno
import os
import select
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from numpy_gpt import Generator, generate, load
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.cli.prompts import LONGEST_LINE
from numpy_gpt.console import printable
from parity_tests.judge.runs import check_refused
from torch_gpt.cli import main as torch_main

SEPARATOR = "---------------\n"
HANG = 120
"""Seconds after which a process counts as hung: a hundred times its usual duration."""

BOTH = pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])
POSIX = pytest.mark.skipif(os.name == "nt", reason="pipes and terminals of POSIX")
FEW = ["--max-new-tokens", "6"]


def run(command, *args, stdin=None):
    device = ["--device", "cpu"] if command is torch_main else []
    return CliRunner().invoke(command, ["generate", *map(str, args), *FEW, *device], input=stdin)


def shown(command, *args, stdin=None):
    result = run(command, *args, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout


@BOTH
@pytest.mark.parametrize(
    ("content", "prompt"),
    [
        (b"the model", "the model"),
        (b"the model\n", "the model"),  # as `echo` and editors end a text
        (b"the model\r\n", "the model"),
        (b"the model\n\n", "the model\n"),
        (b" a\r\nb ", " a\nb "),
        ("é — 你".encode(), "é — 你"),
        (b"-\n", "-"),
    ],
)
def test_file_and_standard_input_are_prompts_as_typed(tmp_path, checkpoint, command, content, prompt):
    (tmp_path / "prompt").write_bytes(content)
    want = shown(numpy_main, checkpoint, prompt) if prompt != "-" else None
    got = shown(command, checkpoint, "--prompt-file", tmp_path / "prompt")
    assert got.startswith(prompt)
    assert want in (None, got)
    assert shown(command, checkpoint, "-", stdin=content) == got


def test_a_corpus_name_is_a_file_name(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    check_refused(run(numpy_main, checkpoint, "--prompt-file", "python-manual"), "python-manual does not exist")
    (tmp_path / "python-manual").write_text("mine")
    assert shown(numpy_main, checkpoint, "--prompt-file", "python-manual").startswith("mine")


BAD = {
    "empty": (b"", "{} is empty: give a text"),
    "a newline": (b"\n", "the prompt is empty: give at least one character"),
    "binary": (b"a\0b", "{} is binary (it contains NUL bytes)"),
    "latin-1": (b"na\xefve", "{} is not UTF-8 text (byte 0xef at offset 2): convert it to UTF-8"),
}


@BOTH
@pytest.mark.parametrize("case", BAD)
def test_unusable_text_is_refused(tmp_path, checkpoint, command, case):
    content, message = BAD[case]
    (tmp_path / "prompt").write_bytes(content)
    file = tmp_path / "prompt"
    check_refused(run(command, checkpoint, "--prompt-file", file), message.format(file))
    check_refused(run(command, checkpoint, "-", stdin=content), message.format("standard input"))


@BOTH
def test_unusable_files_are_refused(tmp_path, checkpoint, command):
    check_refused(run(command, checkpoint, "--prompt-file", tmp_path), "is a folder: give one file of UTF-8 text")
    check_refused(run(command, checkpoint, "--prompt-file", tmp_path / "x"), "x does not exist: give the path of a")
    check_refused(run(command, checkpoint, "--prompt-file", os.devnull), "is a device")


@BOTH
@pytest.mark.parametrize(
    "args", [[], ["a", "--interactive"], ["a", "--prompt-file", __file__], ["--interactive", "--prompt-file", __file__]]
)
def test_exactly_one_prompt_is_asked_for(checkpoint, command, args):
    message = "give exactly one of PROMPT (- for standard input), --prompt-file FILE, --interactive"
    check_refused(run(command, checkpoint, *args), message)


def session(folder, prompts, seed=123, samples=1):
    """The continuations of prompts, drawn one after another at temperature 1 by numpy_gpt.generate."""
    model, rng = load(folder), Generator(seed)
    texts = []
    for prompt in [list(prompt.encode()) for prompt in prompts for _ in range(samples)]:
        new = generate(model, [prompt], int(FEW[1]), 1.0, eos_id=256, rng=rng)[0, len(prompt) :]
        texts.append(printable(bytes(new.tolist()).decode(errors="replace")) + "\n")
    return texts


@BOTH
@pytest.mark.parametrize("samples", [1, 2])
def test_session_continues_each_line_on_one_stream(checkpoint, command, samples):
    """Blank lines are skipped, the last line needs no newline, and spaces around a prompt belong to it."""
    stdin = "one\n\n two \r\n   \nthree"
    want = session(checkpoint, ["one", " two ", "three"], samples=samples)
    args = [checkpoint, "--interactive", "--temperature", 1, "--num-samples", samples]
    assert shown(command, *args, stdin=stdin) == SEPARATOR.join(want)
    assert shown(command, *args, stdin="") == shown(command, *args, stdin="\n \n") == ""


@BOTH
def test_session_ends_at_a_line_that_is_not_text(checkpoint, command):
    args = [checkpoint, "--interactive", "--temperature", 1]
    for line, message in [
        (b"\xff", "line 2 of standard input is not UTF-8 text"),
        (b"a\0", "line 2 of standard input is binary"),
        (b"a" * (LONGEST_LINE + 1), "line 2 of standard input has more than 1,048,576 bytes"),
    ]:
        result = run(command, *args, stdin=b"one\n" + line + b"\nthree\n")
        assert result.exit_code == 2
        assert result.stdout == session(checkpoint, ["one"])[0]
        assert result.stderr.startswith(f"Error: {message}")
        assert result.stderr.count("\n") == 1


def test_session_loads_the_model_once(checkpoint, monkeypatch):
    loads = []
    monkeypatch.setattr("numpy_gpt.cli.generate.load", lambda path: loads.append(path) or load(path))
    assert shown(numpy_main, checkpoint, "--interactive", stdin="one\ntwo\n").count(SEPARATOR) == 1
    assert loads == [checkpoint]


def start(checkpoint, *args, **streams):
    command = [sys.executable, "-m", "numpy_gpt", "generate", checkpoint, *FEW, *args]
    return subprocess.Popen(command, **streams)


@POSIX
def test_session_through_a_pipe_answers_each_line_at_once(checkpoint):
    """A program may wait for an answer before it sends the next line."""
    want = session(checkpoint, ["one", "two"])
    assert not any("\n" in text[:-1] for text in want), "choose another model"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(checkpoint, "--interactive", "--temperature", "1", **pipes)
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline().decode() == want[0]
    rest, errors = process.communicate(b"two\n", timeout=HANG)
    assert (rest.decode(), errors, process.returncode) == (SEPARATOR + want[1], b"", 0)


@POSIX
@pytest.mark.parametrize("args", [["-"], ["--interactive"]])
def test_closed_standard_input_is_an_error(checkpoint, args):
    process = start(checkpoint, *args, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(0))
    assert process.communicate(timeout=HANG)[1].startswith(b"Error: standard input is closed: send the prompt through")
    assert process.returncode == 2


def test_failing_standard_input_is_an_error(checkpoint, monkeypatch):
    class Failing:
        isatty = staticmethod(lambda: False)

        @property
        def buffer(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    for args in (["-"], ["--interactive"]):
        with monkeypatch.context() as patch:
            patch.setattr("numpy_gpt.cli.prompts.sys", type("sys", (), {"stdin": Failing()}))
            check_refused(run(numpy_main, checkpoint, *args), f"cannot be read ({os.strerror(errno.EIO)}): send")


class Terminal:
    """A process on a terminal of its own, killed at the end of the block."""

    def __init__(self, checkpoint, *args, **streams):
        self.ours, theirs = os.openpty()
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs} | streams
        self.process = start(checkpoint, *args, **streams, start_new_session=True, preexec_fn=self._control)
        os.close(theirs)

    @staticmethod
    def _control():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, keys):
        os.write(self.ours, keys.encode())

    def read_to(self, end):
        """What appears, up to and including this text; None: up to the end of the process."""
        seen, deadline = b"", time.monotonic() + HANG
        while end is None or end not in seen.replace(b"\r\n", b"\n").decode(errors="replace"):
            assert time.monotonic() < deadline, seen
            if select.select([self.ours], [], [], 1)[0]:
                try:
                    seen += os.read(self.ours, 4096)
                except OSError:  # Linux's end of a terminal
                    assert end is None, seen
                    break
        return seen.replace(b"\r\n", b"\n").decode()

    def end(self):
        return self.process.wait(HANG)


@POSIX
def test_session_on_a_terminal_has_a_marker_and_ends_at_ctrl_d(checkpoint):
    want = session(checkpoint, ["one", "two"])
    with Terminal(checkpoint, "--interactive", "--temperature", "1") as terminal:
        assert terminal.read_to("> ") == "> "
        terminal.type("one\n")
        assert terminal.read_to("\n> ") == "one\n" + want[0] + "> "
        terminal.type("\n")
        assert terminal.read_to("> ") == "\n> "
        terminal.type("two\n")
        assert terminal.read_to("\n> ") == "two\n" + want[1] + "> "
        terminal.type("\x04")
        assert terminal.read_to(None).removesuffix("^D\b\b") == "\n"
        assert terminal.end() == 0


@POSIX
def test_session_on_a_terminal_survives_characters_that_the_vocabulary_lacks(tmp_path, text):
    """Elsewhere they end the command: nothing would show which line was left out."""
    args = ["pretrain", "--text", text, "--encoding", "chars", "--context-length", 16, "--max-steps", 1]
    result = CliRunner().invoke(numpy_main, [str(arg) for arg in [*args, "--out", tmp_path / "run"]])
    assert result.exit_code == 0, result.output
    with Terminal(tmp_path / "run", "--interactive") as terminal:
        terminal.read_to("> ")
        terminal.type("Ω\n")
        assert "\nError: 'Ω' (U+03A9) is not among the" in terminal.read_to("\n> ")
        terminal.type("the\n")
        assert len(terminal.read_to("\n> ")) >= len("the\n") + int(FEW[1])
        terminal.type("\x04")
        assert terminal.end() == 0
    result = run(numpy_main, tmp_path / "run", "--interactive", stdin="the\nΩ\nthe\n")
    assert (result.exit_code, result.stdout.count("---")) == (2, 0)
    assert result.stderr.startswith("Error: 'Ω' (U+03A9) is not among the")


@POSIX
@pytest.mark.parametrize("during", ["the marker", "a continuation"])
def test_ctrl_c_ends_a_session_with_130(checkpoint, during):
    with Terminal(checkpoint, "--interactive", "--max-new-tokens", "10000000") as terminal:
        terminal.read_to("> ")
        if during == "a continuation":
            terminal.type("one\n")
            terminal.read_to("one\n")
        terminal.type("\x03")
        assert terminal.read_to(None).endswith("interrupted\n")
        assert terminal.end() == 130


@POSIX
def test_output_to_a_file_has_no_marker(checkpoint, tmp_path):
    args = ["--interactive", "--temperature", "1"]
    with (tmp_path / "out").open("wb") as out, Terminal(checkpoint, *args, stdout=out) as terminal:
        terminal.type("one\ntwo\n\x04")
        assert terminal.end() == 0
    assert (tmp_path / "out").read_text() == SEPARATOR.join(session(checkpoint, ["one", "two"]))

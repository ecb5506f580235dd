"""numpy-gpt tokenize: the tokens of a run on the same texts, its refusals, and how it ends."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from numpy_gpt import data
from numpy_gpt.cli.main import main
from numpy_gpt.data import split_text, text_blocks
from numpy_gpt.errors import InputError
from numpy_gpt.parallel.processes import in_processes, usable_cores
from numpy_gpt.runs.batches import Batches
from numpy_gpt.runs.settings import Settings
from numpy_gpt.runs.texts import load_texts, text_from
from numpy_gpt.tokenizer import encode, get_encoding
from numpy_gpt.tokens import cuts
from parity_tests.judge.runs import check_refused, invoke

TINY = Path(__file__).parent / "fixtures" / "tiny_gpt2"

WORDS = [
    *("the", " model", "'s 12 ", "\n", "\r\n", "\r", "  ", " é", "你好", "🙂", "<|endoftext|>", "\t", "\u00a0", "!?"),
    "x",
]


def write(file, seed, times=1):
    """Write a text of 4,000 words, repeated."""
    file.write_bytes("".join(np.random.default_rng(seed).choice(WORDS, 4000)).encode() * times)
    return file


@pytest.fixture
def small_chunks(monkeypatch):
    """Blocks and chunks of a few dozen characters, so that texts of a test's size have many."""
    monkeypatch.setattr(data, "BLOCK", 37)
    monkeypatch.setattr(cuts, "CHUNK", 50)


def ids(folder, part):
    header = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / f"{part}.bin", {"uint16": "<u2", "uint32": "<u4"}[header["dtype"]])


def check_same_tokens(out, texts, encoding):
    """Compare a folder's tokens with those of a run on the texts, and its meta.json with both."""
    text = load_texts(text_from(map(str, texts)))
    header = json.loads((out / "meta.json").read_text())
    words = get_encoding(str(out / "vocabulary") if encoding not in ("bytes", "gpt2") else encoding)
    for part, content in zip(("train", "val"), split_text(text, 0.9), strict=True):
        assert np.array_equal(ids(out, part), encode(words, content)), part
        assert header["tokens"][part] == len(ids(out, part))
        assert header["characters"][part] == len(content)
        assert header["sha256"][part] == hashlib.sha256((out / f"{part}.bin").read_bytes()).hexdigest()
    assert header["text_sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert header["n_vocab"] == words.n_vocab
    assert (header["format"], header["version"]) == ("numpy-gpt tokens", 1)
    return header


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("encoding", ["gpt2", "bytes", "chars", str(TINY)])
@pytest.mark.parametrize("count", [1, 3])
def test_tokens_are_those_of_a_run_on_the_texts(tmp_path, encoding, count):
    texts = [write(tmp_path / f"{i}.txt", i) for i in range(count)]
    out = tmp_path / "new" / "out"
    result = invoke(main, "tokenize", *texts, "--encoding", encoding, "--out", out, "--processes", 1)
    assert result.exit_code == 0, result.output
    header = check_same_tokens(out, texts, encoding)
    assert header["encoding"] == (encoding if encoding in ("gpt2", "bytes") else "vocabulary")
    assert header["files"] == [f"{i}.txt" for i in range(count)]
    assert f"{header['tokens']['train']:,} tokens of {header['characters']['train']:,} characters" in result.output
    assert f"numpy-gpt pretrain --tokens {out}" in result.output
    batches = Batches(Settings(text=text_from(map(str, texts)), encoding=encoding, context_length=16))
    assert batches.tokens == sum(header["tokens"].values())
    shutil.rmtree(out)
    invoke(main, "tokenize", *reversed(texts), "--encoding", encoding, "--out", out, "--processes", 1)
    assert json.loads((out / "meta.json").read_text()) == header, "the order of the arguments matters"


def test_two_processes_write_the_same_files(tmp_path):
    write(tmp_path / "a.txt", 1, 300)
    write(tmp_path / "b.txt", 2, 100)
    for count in (1, 2):
        args = [tmp_path / "a.txt", tmp_path / "b.txt", "--out", tmp_path / str(count), "--processes", count]
        result = invoke(main, "tokenize", *args)
        assert result.exit_code == 0, result.output
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    assert (tmp_path / "1" / "train.bin").stat().st_size > 2**21
    check_same_tokens(tmp_path / "2", [tmp_path / "a.txt", tmp_path / "b.txt"], "gpt2")


@pytest.mark.usefixtures("small_chunks")
def test_corpora_and_folders_are_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "z.txt", 3)
    args = ["python-manual", tmp_path / "texts", "--encoding", "bytes", "--out", tmp_path / "out", "--processes", 1]
    assert invoke(main, "tokenize", *args).exit_code == 0
    check_same_tokens(tmp_path / "out", ["python-manual", tmp_path / "texts"], "bytes")


@pytest.mark.parametrize("text", ["x", "ab", "é"])
def test_shortest_texts(tmp_path, text):
    (tmp_path / "text").write_text(text)
    args = [tmp_path / "text", "--encoding", "bytes", "--out", tmp_path / "out", "--processes", 1]
    assert invoke(main, "tokenize", *args).exit_code == 0
    check_same_tokens(tmp_path / "out", [tmp_path / "text"], "bytes")


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65535, "uint16"), (65536, "uint32"), (65600, "uint32")])
def test_large_vocabularies_take_four_bytes(tmp_path, n_vocab, dtype):
    characters = [chr(c) for c in range(1, 70000) if not 0xD800 <= c < 0xE000 and c != 13][:n_vocab]
    (tmp_path / "text").write_text("".join(characters), newline="")
    args = [tmp_path / "text", "--encoding", "chars", "--out", tmp_path / "out", "--processes", 1]
    assert invoke(main, "tokenize", *args).exit_code == 0
    header = check_same_tokens(tmp_path / "out", [tmp_path / "text"], "chars")
    assert (header["n_vocab"], header["dtype"]) == (n_vocab, dtype)


# Reading in blocks


@pytest.mark.parametrize("block", [1, 2, 3, 7, 2**20])
def test_blocks_are_the_text(tmp_path, monkeypatch, block):
    file = write(tmp_path / "text", 5)
    with file.open(encoding="utf-8") as f:  # Python's own translation of newlines
        want = f.read()
    monkeypatch.setattr(data, "BLOCK", block)
    blocks = list(text_blocks(str(file)))
    assert "".join(blocks) == want
    assert max(map(len, blocks)) <= block + 1


@pytest.mark.parametrize("block", [1, 3, 2**20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", "is not UTF-8 text (byte 0xff at offset 3)"),
        ("ab\u00e9".encode() + b"\xe4\xbd", "is not UTF-8 text (byte 0xe4 at offset 4)"),  # the last character is cut
        (b"ab\xe4\xbdx", "is not UTF-8 text (byte 0xe4 at offset 2)"),
        (b"abc\r\n\0d", "is binary (it contains NUL bytes)"),
        (b"", "is empty"),
    ],
)
def test_unusable_content_is_named(tmp_path, monkeypatch, block, content, message):
    file = tmp_path / "text"
    file.write_bytes(content)
    monkeypatch.setattr(data, "BLOCK", block)
    with pytest.raises(InputError) as error:
        list(text_blocks(str(file)))
    assert f"{file} {message}" in str(error.value)


# Refusals


def bad_files(tmp_path):
    (tmp_path / "binary").write_bytes(b"text" * 10 + b"\0")
    (tmp_path / "latin1").write_bytes(b"text" * 2**19 + "é".encode("latin1"))
    (tmp_path / "empty").touch()
    (tmp_path / "empty folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "null").symlink_to("/dev/null")
    write(tmp_path / "good", 7)
    return tmp_path


REFUSED = {
    "binary": (["{tmp}/good", "{tmp}/binary"], "/binary is binary (it contains NUL bytes)"),
    "not UTF-8": (["{tmp}/good", "{tmp}/latin1"], "/latin1 is not UTF-8 text (byte 0xe9 at offset 2097152)"),
    "empty": (["{tmp}/empty", "{tmp}/good"], "/empty is empty"),
    "missing": (["{tmp}/nowhere"], "/nowhere does not exist: give the path of a file of UTF-8 text"),
    "an empty folder": (["{tmp}/empty folder"], "/empty folder contains no text"),
    "a pipe": (["{tmp}/good", "{tmp}/fifo"], "/fifo is a pipe, but the text is read twice: save it as a file first"),
    "a device": (["{tmp}/null"], "/null is a device"),
    "out is not empty": (["{tmp}/good", "--out", "{tmp}/full"], "/full exists and is not empty"),
    "out is a file": (["{tmp}/good", "--out", "{tmp}/good"], "/good exists and is not empty"),
    "unknown encoding": (["{tmp}/good", "--encoding", "gpt5"], "unknown encoding 'gpt5'"),
    "no processes": (["{tmp}/good", "--processes", "0"], "0 is not in the range"),
    "no text": ([], "Missing argument 'TEXT...'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_input_is_refused(tmp_path, case):
    args, message = REFUSED[case]
    before = {path.name for path in bad_files(tmp_path).iterdir()}
    args = [arg.format(tmp=tmp_path) for arg in args]
    result = invoke(main, "tokenize", "--processes", "1", "--out", tmp_path / "new" / "out", *args)
    check_refused(result, message)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_text_that_cannot_be_cut_is_refused(tmp_path):
    (tmp_path / "text").write_text("x" * (cuts.LONGEST + cuts.CHUNK + 10))
    args = [tmp_path / "text", "--out", tmp_path / "out", "--processes"]
    check_refused(invoke(main, "tokenize", *args, 1), "more than 2,097,152 characters without a space")
    assert not (tmp_path / "out").exists()
    result = invoke(main, "tokenize", *args, 1, "--encoding", "bytes")
    assert result.exit_code == 0, result.output


def test_text_that_tiktoken_cannot_split_is_refused(tmp_path):
    """The error comes from another process."""
    (tmp_path / "text").write_text("a word" + " " * 1_200_000 + "word " * 300_000)
    result = invoke(main, "tokenize", tmp_path / "text", "--out", tmp_path / "out", "--processes", 2)
    check_refused(result, "gpt2 cannot split this text into tokens")
    assert not (tmp_path / "out").exists()


def test_text_that_changes_meanwhile_is_refused(tmp_path, monkeypatch):
    file, times = write(tmp_path / "text", 1), []

    def changing(path):
        times.append(path)
        if len(times) == 3:  # after the check and the count
            write(file, 2)
        return text_blocks(path)

    monkeypatch.setattr("numpy_gpt.tokens.making.text_blocks", changing)
    result = invoke(main, "tokenize", file, "--out", tmp_path / "out", "--processes", 1)
    check_refused(result, f"{file} changed while it was read")
    assert not (tmp_path / "out").exists()


# Ends


def started(*args, **kwargs):
    command = [sys.executable, "-m", "numpy_gpt", "tokenize", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_full_disk_is_a_one_line_error(tmp_path):
    write(tmp_path / "text", 1, 80)
    limit = 2**18  # bytes; a larger file cannot be written, as on a full disk
    process = started(
        *(tmp_path / "text", "--out", tmp_path / "out", "--encoding", "bytes"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, ""), errors
    assert errors == f"Error: cannot write {tmp_path / 'out'}: File too large; check that disk\n"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def children(pid):
    """The processes whose parent is pid."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


@pytest.fixture
def encoding_process(tmp_path):
    """A command with two processes in the middle of its work, in a group of its own, as in a terminal."""
    write(tmp_path / "text", 1, 3000)
    process = started(tmp_path / "text", "--out", tmp_path / "out", "--processes", 2, start_new_session=True)
    until(lambda: any(path.stat().st_size for path in tmp_path.glob(".out.*/train.bin")))
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_leaves_nothing_behind(tmp_path, encoding_process, how):
    """The terminal sends Ctrl-C to all processes of the group."""
    others = children(encoding_process.pid)
    os.killpg(encoding_process.pid, how)
    output, errors = encoding_process.communicate(timeout=60)
    code, line = (130, "interrupted\n") if how == signal.SIGINT else (-how, "")
    assert (encoding_process.returncode, output, errors) == (code, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    until(lambda: not any(map(alive, others)))


@pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
def test_killed_process_is_a_one_line_error(tmp_path, encoding_process):
    workers = [
        pid for pid in children(encoding_process.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    output, errors = encoding_process.communicate(timeout=60)
    assert (encoding_process.returncode, output, errors.count("\n")) == (2, "", 1), errors
    assert "a process sharing the work was killed" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds child processes in /proc")
def test_killed_command_leaves_no_process_and_can_be_repeated(tmp_path, encoding_process):
    others = children(encoding_process.pid)
    assert len(others) >= 2
    encoding_process.kill()
    encoding_process.wait()
    until(lambda: not any(map(alive, others)))
    assert not (tmp_path / "out").exists()
    (tmp_path / "short").write_text("a short text")
    result = invoke(main, "tokenize", tmp_path / "short", "--out", tmp_path / "out", "--processes", 1)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "short", "text"]


# Processes


def test_work_is_read_ahead_by_one_item_a_process():
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    with in_processes(2) as share:
        results = share(abs, items())
        assert next(results) == 0
        assert len(taken) == 3
        assert list(results) == list(range(1, 20))


def test_one_process_is_this_one():
    with in_processes(1) as share:
        assert list(share(lambda i: (i, os.getpid()), [1])) == [(1, os.getpid())]


def test_process_that_ends_is_an_input_error():
    with pytest.raises(InputError, match="a process sharing the work was killed"), in_processes(2) as share:
        list(share(os._exit, [1, 1]))


def test_error_of_the_work_is_raised_here():
    with pytest.raises(InputError, match="unknown encoding 'x'"), in_processes(2) as share:
        list(share(get_encoding, ["x"]))


def test_usable_cores():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)

"""pretrain --tokens: the numbers of a run on the text; folders that move or change, and those that are refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_gpt import load
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.data import Loader, sliding_windows
from numpy_gpt.errors import InputError
from numpy_gpt.runs.folder import _sha256 as run_sha256
from numpy_gpt.runs.losses import Losses
from numpy_gpt.tokens.file import TokenFile
from numpy_gpt.tokens.folder import open_tokens
from numpy_gpt.weights.checkpoint import load_training, read_header
from parity_tests.judge.runs import SMALL, check_refused, invoke, rows, snapshot
from torch_gpt.cli import main as torch_main

TINY = Path(__file__).parent / "fixtures" / "tiny_gpt2"

BOTH = pytest.mark.parametrize("command", [numpy_main, torch_main], ids=["numpy", "torch"])

pytestmark = pytest.mark.usefixtures("brief_runs")


def tokenize(text, out, encoding="bytes"):
    result = invoke(numpy_main, "tokenize", text, "--encoding", encoding, "--out", out, "--processes", 1)
    assert result.exit_code == 0, result.output
    return out


def learn(command, what, out, *args):
    return invoke(command, "pretrain", *what, "--out", out, *SMALL, "--max-steps", 9, "--drop-rate", 0.2, *args)


@pytest.fixture
def tokens(tmp_path, text):
    """A folder of the text's bytes."""
    return tokenize(text, tmp_path / "tokens")


def check_same_run(first, second):
    for row, other in zip(rows(first), rows(second), strict=True):
        assert {**row, "seconds": ""} == {**other, "seconds": ""}
    ours, theirs = load(first).params, load(second).params
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    mine, other = load_training(first), load_training(second)
    assert all(mine[name].tobytes() == other[name].tobytes() for name in mine)


# The same run


@BOTH
@pytest.mark.parametrize("encoding", ["bytes", "chars", str(TINY)])
def test_run_is_that_of_the_text(tmp_path, text, command, encoding):
    folder = tokenize(text, tmp_path / "tokens", encoding)
    flags = ["--attention", "plain"] if command is torch_main else []
    first = learn(command, ["--text", text, "--encoding", encoding], tmp_path / "text", *flags)
    second = learn(command, ["--tokens", folder], tmp_path / "run", *flags)
    assert (first.exit_code, second.exit_code) == (0, 0), first.output + second.output
    assert f"tokens    {folder}: " in second.output
    check_same_run(tmp_path / "text", tmp_path / "run")
    vocabulary = sorted(path.name for path in (tmp_path / "run").glob("vocabulary/*"))
    assert vocabulary == sorted(path.name for path in (tmp_path / "text").glob("vocabulary/*"))
    assert bool(vocabulary) == (encoding != "bytes")
    lines = [invoke(numpy_main, "evaluate", tmp_path / name).output.splitlines() for name in ("text", "run")]
    assert lines[0][2:] == lines[1][2:]
    assert lines[0][1].split()[1] == lines[1][1].split()[1]
    assert lines[1][0] == f"text        {folder / 'val.bin'}"
    shutil.rmtree(folder)
    assert invoke(numpy_main, "generate", tmp_path / "run", "the", "--max-new-tokens", 3).exit_code == 0


@BOTH
def test_stopped_run_is_resumed_with_the_same_numbers(tmp_path, tokens, command):
    flags = ["--attention", "plain"] if command is torch_main else []
    learn(command, ["--tokens", tokens], tmp_path / "whole", *flags)
    result = learn(command, ["--tokens", tokens], tmp_path / "parts", "--save-freq", 4, "--keep", 9, *flags)
    assert result.exit_code == 0, result.output
    result = invoke(command, "pretrain", "--resume", tmp_path / "parts" / "checkpoint-000004", *flags)
    assert result.exit_code == 0, result.output
    check_same_run(tmp_path / "whole", tmp_path / "parts")


def test_keyed_order_is_resumed_within_an_epoch(tmp_path, text, tokens, monkeypatch):
    """Beyond LONGEST_PERMUTATION the checkpoint has a key in place of the order; both backends, text and tokens."""
    monkeypatch.setattr("numpy_gpt.train.LONGEST_PERMUTATION", 20)
    for name, command, what in (
        ("text", numpy_main, ["--text", text]),
        ("numpy", numpy_main, ["--tokens", tokens, "--save-freq", 4, "--keep", 9]),
        ("torch", torch_main, ["--tokens", tokens, "--attention", "plain"]),
    ):
        result = learn(command, what, tmp_path / name)
        assert result.exit_code == 0, result.output
    check_same_run(tmp_path / "text", tmp_path / "numpy")
    losses = [[float(row["step_loss"]) for row in rows(tmp_path / name)] for name in ("text", "torch")]
    assert np.abs(np.subtract(*losses)).max() < 5e-5
    saved = load_training(tmp_path / "numpy" / "checkpoint-000004")
    assert saved["loop.key"][0] == 28
    assert "loop.order" not in saved
    result = invoke(numpy_main, "pretrain", "--resume", tmp_path / "numpy" / "checkpoint-000004")
    assert result.exit_code == 0, result.output
    check_same_run(tmp_path / "text", tmp_path / "numpy")


def test_run_from_before_tokens_is_resumed(tmp_path, text):
    learn(numpy_main, ["--text", text], tmp_path / "run")
    values = json.loads((tmp_path / "run" / "run.json").read_text())
    assert values["settings"].pop("tokens") is None
    values["sha256"] = run_sha256(values["settings"], values["text_sha256"])
    (tmp_path / "run" / "run.json").write_text(json.dumps(values))
    result = invoke(numpy_main, "pretrain", "--resume", tmp_path / "run", "--max-steps", 10)
    assert result.exit_code == 0, result.output


def test_init_takes_tokens_of_its_vocabulary(tmp_path, text, tokens):
    learn(numpy_main, ["--tokens", tokens], tmp_path / "run")
    again = learn(numpy_main, ["--tokens", tokens, "--init", tmp_path / "run"], tmp_path / "again")
    assert again.exit_code == 0, again.output
    other = tokenize(text, tmp_path / "other", str(TINY))
    result = learn(numpy_main, ["--tokens", other, "--init", tmp_path / "run"], tmp_path / "no")
    check_refused(result, f"{other} has tokens of the encoding {other / 'vocabulary'}, not bytes")
    same = learn(numpy_main, ["--tokens", other, "--encoding", TINY], tmp_path / "same")
    assert same.exit_code == 0, same.output


# A folder that moves or changes


def test_moved_tokens_are_found_or_named(tmp_path, tokens, monkeypatch):
    run = tmp_path / "place" / "run"
    learn(numpy_main, ["--tokens", tokens], run)
    monkeypatch.chdir(tmp_path)

    def resume(*args):
        return invoke(numpy_main, "pretrain", "--resume", run, *args)

    moved = tokens.rename(tmp_path / "place" / "tokens")
    assert resume("--max-steps", 10).exit_code == 0
    assert json.loads((run / "run.json").read_text())["settings"]["tokens"] == str(moved)
    moved = moved.rename(tmp_path / "elsewhere")
    fix = "pass its path with --tokens DIR"
    check_refused(resume(), f"{tmp_path / 'place' / 'tokens'}, the tokens of {run / 'checkpoint'}")
    assert fix in resume().output
    check_refused(
        invoke(numpy_main, "evaluate", run), "were not found: restore them, or evaluate on a text with --text"
    )
    result = resume("--max-steps", 11, "--tokens", moved)
    assert result.exit_code == 0, result.output
    assert invoke(numpy_main, "evaluate", run).exit_code == 0


def test_other_tokens_of_the_same_name_are_not_taken(tmp_path, text, tokens):
    run = tmp_path / "place" / "run"
    learn(numpy_main, ["--tokens", tokens], run)
    shutil.rmtree(tokens)
    (tmp_path / "more").write_text(text.read_text() + "more")
    tokenize(tmp_path / "more", tmp_path / "place" / "tokens")
    check_refused(invoke(numpy_main, "pretrain", "--resume", run), "were not found")


@pytest.mark.parametrize("how", ["other text", "other vocabulary"])
def test_changed_tokens_are_refused_on_resume(tmp_path, text, tokens, how):
    run = tmp_path / "run"
    learn(numpy_main, ["--tokens", tokens], run)
    shutil.rmtree(tokens)
    (tmp_path / "more").write_text(text.read_text() + ("more" if how == "other text" else ""))
    tokenize(tmp_path / "more", tokens, "bytes" if how == "other text" else str(TINY))
    before = snapshot(run)
    result = invoke(numpy_main, "pretrain", "--resume", run)
    words = f"{tokens} (or the vocabulary) does not have the tokens that {run} was started with"
    check_refused(result, words if how == "other text" else "has tokens of the encoding")
    assert snapshot(run) == before
    if how == "other text":
        check_refused(invoke(numpy_main, "evaluate", run), "does not have the tokens that")


def test_text_and_tokens_exclude_each_other(tmp_path, text, tokens):
    words = f"the run can learn either a text or the tokens in {tokens}: leave out --text"
    check_refused(learn(numpy_main, ["--tokens", tokens, "--text", text], tmp_path / "run"), words)
    learn(numpy_main, ["--tokens", tokens], tmp_path / "run")
    check_refused(invoke(numpy_main, "pretrain", "--resume", tmp_path / "run", "--text", text), words)
    learn(numpy_main, ["--text", text], tmp_path / "text")
    result = invoke(numpy_main, "pretrain", "--resume", tmp_path / "text", "--tokens", tokens)
    check_refused(result, f"{tokens} (or the vocabulary) does not have the tokens that {tmp_path / 'text'} was started")


@BOTH
def test_file_cut_short_during_a_run_saves_it(tmp_path, tokens, command, monkeypatch):
    """A memory map would end in SIGBUS. The run is saved as it was before the batch that cannot be read."""
    append = Losses.append

    def cutting(self, step, seconds):
        append(self, step, seconds)
        if step.step == 4:
            os.truncate(tokens / "train.bin", 8)

    flags = ["--attention", "plain"] if command is torch_main else []
    learn(command, ["--tokens", tokens], tmp_path / "whole", *flags)
    content = (tokens / "train.bin").read_bytes()
    monkeypatch.setattr(Losses, "append", cutting)
    result = learn(command, ["--tokens", tokens], tmp_path / "run", *flags)
    assert result.exit_code == 2
    error = result.stderr.strip().splitlines()[-1]
    words = (
        f"Error: {tokens / 'train.bin'} was cut short while it was in use: restore it; the state after 5 steps is saved"
    )
    assert error.startswith(words)
    monkeypatch.undo()
    (tokens / "train.bin").write_bytes(content)
    assert invoke(command, "pretrain", "--resume", tmp_path / "run", *flags).exit_code == 0
    check_same_run(tmp_path / "whole", tmp_path / "run")


def test_replaced_file_does_not_disturb_a_run(tmp_path, tokens, monkeypatch):
    learn(numpy_main, ["--tokens", tokens], tmp_path / "whole")
    append = Losses.append

    def removing(self, step, seconds):
        append(self, step, seconds)
        shutil.rmtree(tokens, ignore_errors=True)

    monkeypatch.setattr(Losses, "append", removing)
    assert learn(numpy_main, ["--tokens", tokens], tmp_path / "run").exit_code == 0
    check_same_run(tmp_path / "whole", tmp_path / "run")


# nanoGPT's folders


def nanogpt(folder, ids):
    folder.mkdir()
    split = int(0.9 * len(ids))
    np.array(ids[:split], dtype=np.uint16).tofile(folder / "train.bin")  # as its prepare.py
    np.array(ids[split:], dtype=np.uint16).tofile(folder / "val.bin")
    return folder


def test_nanogpts_folder_is_of_gpt2_unless_told(tmp_path):
    folder = nanogpt(tmp_path / "openwebtext", list(range(50256, 49000, -1)))
    result = learn(numpy_main, ["--tokens", folder], tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run").config.vocab_size == 50257
    result = learn(numpy_main, ["--tokens", folder, "--encoding", "bytes"], tmp_path / "bytes")
    check_refused(result, "train.bin has the token id 50,256, but bytes only 257 ids: pass the right one as --encoding")
    assert "nanoGPT's meta.pkl is a pickle and is never read" in result.output


@pytest.mark.parametrize("flags", [[], ["--encoding", "chars"]])
def test_nanogpts_characters_are_read_from_a_list(tmp_path, flags):
    folder = nanogpt(tmp_path / "shakespeare_char", [i % 65 for i in range(600)])
    (folder / "characters.json").write_text(json.dumps([chr(40 + i) for i in range(65)]))
    result = learn(numpy_main, ["--tokens", folder, *flags], tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run").config.vocab_size == 65
    assert set(invoke(numpy_main, "generate", tmp_path / "run", "(").stdout) <= {*map(chr, range(40, 105)), "\n"}


def test_nanogpts_pickle_is_not_read(tmp_path):
    folder = nanogpt(tmp_path / "shakespeare_char", [i % 65 for i in range(600)])
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    result = learn(numpy_main, ["--tokens", folder], tmp_path / "run")
    check_refused(
        result, "has no vocabulary that can be read (meta.pkl is a pickle, which may run code): put characters.json"
    )
    assert learn(numpy_main, ["--tokens", folder, "--encoding", "bytes"], tmp_path / "run").exit_code == 0
    shutil.move(folder, tmp_path / "run" / "shakespeare_char")
    assert invoke(numpy_main, "pretrain", "--resume", tmp_path / "run", "--max-steps", 10).exit_code == 0


# Refusals


def header_with(**changes):
    def change(folder):
        values = json.loads((folder / "meta.json").read_text()) | changes
        (folder / "meta.json").write_text(json.dumps(values))

    return change


def cut(name, size):
    return lambda folder: os.truncate(folder / name, size)


def flip(folder):
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)


def fifo(folder):
    (folder / "val.bin").unlink()
    os.mkfifo(folder / "val.bin")


DAMAGED = {
    "missing": (shutil.rmtree, "does not exist: give a folder made by numpy-gpt tokenize or nanoGPT's prepare.py"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "it has no train.bin and no val.bin"),
    "no val.bin": (lambda folder: (folder / "val.bin").unlink(), "is not a folder of tokens (it has no val.bin)"),
    "a fifo": (fifo, "is not a folder of tokens (it has no val.bin)"),
    "an odd length": (cut("train.bin", 101), "train.bin has 101 bytes, not a multiple of the 2 of a token: it is cut"),
    "cut short": (cut("train.bin", 500), "train.bin is not the file that meta.json beside it describes"),
    "emptied": (cut("val.bin", 0), "val.bin is not the file that meta.json beside it describes"),
    "a changed id": (flip, "train.bin is not the file that meta.json beside it describes (its SHA-256 differs)"),
    "too short": (
        lambda folder: nanogpt(shutil.rmtree(folder) or folder, [1] * 30),
        "part of {folder}: the text is too",
    ),
    "no JSON": (cut("meta.json", 40), "meta.json cannot be used as JSON"),
    "a bomb": (lambda f: (f / "meta.json").write_text("[" * 10**6), "meta.json cannot be used as JSON"),
    "a list": (lambda f: (f / "meta.json").write_text("[]"), "meta.json is not a JSON object"),
    "another format": (header_with(format="x"), "meta.json does not describe tokens"),
    "no format": (header_with(format=None), "meta.json does not describe tokens"),
    "a later version": (header_with(version=2), "uses format 2; this release reads format 1: update numpy-gpt"),
    "a version of any length": (header_with(version="9" * 5000), "9; this release reads format 1"),
    "another dtype": (header_with(dtype="float64"), "is damaged (its dtype is unusable)"),
    "a dtype that is a list": (header_with(dtype=["uint16"]), "is damaged (its dtype is unusable)"),
    "another path as encoding": (header_with(encoding="../../etc"), "is damaged (its encoding is unusable)"),
    "another encoding": (header_with(encoding="gpt2"), "gpt2 is not the vocabulary that these tokens were made with"),
    "no vocabulary": (header_with(encoding="vocabulary"), "vocabulary of these tokens, was not found"),
    "sums that are a list": (header_with(sha256=["a", "b"]), "is damaged (its sha256 is unusable)"),
    "one sum": (header_with(sha256={"train": "a"}), "is damaged (its sha256 is unusable)"),
    "no sum of the vocabulary": (header_with(vocabulary_sha256=None), "(its vocabulary_sha256 is unusable)"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folder_is_refused(tmp_path, tokens, case):
    damage, message = DAMAGED[case]
    damage(tokens)
    encoding = ["--encoding", "bytes"] if case == "too short" else []  # nanoGPT's folder names none
    result = learn(numpy_main, ["--tokens", tokens], tmp_path / "run", *encoding)
    check_refused(result, message.format(folder=tokens))
    assert not (tmp_path / "run").exists()


def test_other_things_than_folders_are_refused(tmp_path, text, tokens):
    for what in (text, tokens / "train.bin", "/dev/null"):
        check_refused(learn(numpy_main, ["--tokens", what], tmp_path / "run"), "is not a folder of tokens")
    check_refused(learn(numpy_main, ["--tokens", ""], tmp_path / "run"), "an empty path names nothing")
    result = learn(numpy_main, ["--tokens", tokens, "--encoding", "gpt2"], tmp_path / "run")
    check_refused(result, f"{tokens} has tokens of the encoding bytes, not gpt2")
    result = learn(numpy_main, ["--tokens", tokens, "--encoding", "chars"], tmp_path / "run")
    check_refused(result, "the encoding chars is made from a text: leave --encoding out")


def test_changed_vocabulary_is_refused(tmp_path, text):
    folder = tokenize(text, tmp_path / "tokens", "chars")
    file = folder / "vocabulary" / "characters.json"
    file.write_text(file.read_text().replace('"a"', '"A"'))
    check_refused(
        learn(numpy_main, ["--tokens", folder], tmp_path / "run"),
        f"{folder / 'vocabulary'} is not the vocabulary that these tokens were made with: restore that one",
    )


# The files


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=60),
    T=st.integers(1, 12),
    stride=st.integers(1, 15),
    wide=st.booleans(),
    order=st.randoms(use_true_random=False),
)
def test_windows_are_those_of_the_array(tmp_path_factory, ids, T, stride, wide, order):
    dtype = np.dtype("<u4" if wide else "<u2")
    array = np.array(ids, np.uint64).astype(dtype)
    path = tmp_path_factory.mktemp("ids") / "train.bin"
    array.tofile(path)
    file = TokenFile(path, dtype)
    assert len(file) == len(ids)
    if len(ids) <= T:
        with pytest.raises(InputError, match=f"it has {len(ids)} tokens, and one window takes {T + 1}"):
            file.windows(T, stride)
        return
    want = sliding_windows(array, T, stride)
    rows = list(range(len(want[0])))
    order.shuffle(rows)
    for B in (1, 3):
        ours = list(Loader(*file.windows(T, stride), B, False).batches(np.array(rows)))
        theirs = list(Loader(*want, B, False).batches(np.array(rows)))
        for (x, y), (want_x, want_y) in zip(ours, theirs, strict=True):
            assert x.dtype == y.dtype == np.int64
            assert np.array_equal(x, want_x)
            assert np.array_equal(y, want_y)
    a, b = order.randrange(len(ids) + 1), order.randrange(len(ids) + 1)
    assert file[a:b].tolist() == array[a:b].tolist()
    assert file[a:b].dtype == np.int64
    with pytest.raises(InputError, match="was cut short while it was in use"):
        file.stored(len(ids) - 1, 2)


def test_four_byte_tokens_are_read(tmp_path):
    """Written by tokenize for a vocabulary of 70,000 characters."""
    characters = [chr(c) for c in range(0x100, 0x100 + 140_000) if not 0xD800 <= c < 0xE000][:70_000]
    (tmp_path / "text").write_text("".join(characters))
    folder = tokenize(tmp_path / "text", tmp_path / "tokens", "chars")
    opened = open_tokens(folder)
    assert opened.train[:].tolist() + opened.val[:].tolist() == list(range(70_000))


def test_checking_reads_every_block(tmp_path, monkeypatch):
    """An id outside the vocabulary is found wherever it is; progress covers both files."""
    monkeypatch.setattr("numpy_gpt.tokens.folder.BLOCK", 16)
    for at in range(60):
        ids = [1] * 60
        ids[at] = 257  # the least that bytes lacks
        folder = nanogpt(tmp_path / str(at), ids)
        with pytest.raises(InputError, match=f"{'train' if at < 54 else 'val'}.bin has the token id 257"):
            open_tokens(folder, "bytes")
    seen = []

    def track(blocks):
        seen.append(len(blocks))
        return blocks

    open_tokens(nanogpt(tmp_path / "good", [256] * 60), "bytes", track)
    assert seen == [7 + 1]


def test_metadata_names_the_tokens(tmp_path, tokens):
    learn(numpy_main, ["--tokens", tokens], tmp_path / "run")
    about = read_header(tmp_path / "run").about
    assert about["tokens"] == str(tokens)
    assert about["tokens_sha256"] == open_tokens(tokens).sha256
    assert not about.keys() & {"text", "text_sha256"}


def test_unnamed_run_is_named_after_its_tokens(tmp_path, tokens, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(numpy_main, "pretrain", "--tokens", tokens, *SMALL, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "tiny-tokens-1" / "run.json").exists()

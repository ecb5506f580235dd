"""--text with several files and folders: their order, how they are joined, kept with the run and found again."""

import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.data import load_text, split_text
from numpy_gpt.errors import InputError
from numpy_gpt.runs.texts import absolute_texts, from_metadata, in_words, load_texts, text_files, to_metadata
from parity_tests.judge.runs import SMALL, check_refused, invoke, pretrain, rows, snapshot
from torch_gpt.cli import main as torch_main

PATHS = st.text().map("/".__add__)


@pytest.fixture
def books(tmp_path):
    """A folder with two texts, one in a subfolder, and what is not read: an empty file, hidden files, a pipe."""
    folder = tmp_path / "books"
    for name, content in {
        "b.txt": "second " * 60,
        "a/z.txt": "first\r\n" * 60,
        "empty.txt": "",
        ".hidden.txt": "hidden",
        ".git/config": "hidden too",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())
    os.mkfifo(folder / "pipe")
    (tmp_path / "c.txt").write_text("third " * 60)
    return folder


def test_a_folder_is_its_files_by_path(books):
    assert text_files(str(books)) == [str(books / "a" / "z.txt"), str(books / "b.txt")]
    assert load_texts(str(books)) == "first\n" * 60 + "<|endoftext|>" + "second " * 60


def test_texts_are_sorted_by_name_and_joined(books, tmp_path):
    several = (str(tmp_path / "c.txt"), "python-manual", str(books))
    files = [str(books / "a" / "z.txt"), str(books / "b.txt"), str(tmp_path / "c.txt"), "python-manual"]
    assert text_files(several) == files
    assert load_texts(several) == "<|endoftext|>".join(map(load_text, files))


@given(text=PATHS | st.lists(PATHS, min_size=2, max_size=4).map(tuple))
def test_metadata_gives_the_names_back(text):
    assert from_metadata(to_metadata(text)) == text


def test_many_names_are_abridged():
    assert in_words("a") == "a"
    assert in_words(("a", "b", "c")) == "a, b, c"
    assert in_words(("a", "b", "c", "d")) == "a and 3 more"


def test_unusable_texts_are_named(books, tmp_path):
    (tmp_path / "none" / "inner").mkdir(parents=True)
    (tmp_path / "none" / "inner" / "empty").touch()
    with pytest.raises(InputError, match=r"none contains no text: give a folder with UTF-8 text files$"):
        load_texts(str(tmp_path / "none"))
    for content, words in ((b"\xff", "is not UTF-8 text"), (b"a\0", "is binary")):
        (books / "a" / "bad").write_bytes(content)
        with pytest.raises(InputError, match=f"{books / 'a' / 'bad'} {words}"):
            load_texts((str(tmp_path / "c.txt"), str(books)))
    (books / "a" / "bad").unlink()
    check_refused(
        invoke(numpy_main, "pretrain", "--text", books, "--text", tmp_path / "missing.txt"),
        f"'{tmp_path / 'missing.txt'}' is neither a known text nor a file",
    )


def test_a_run_of_several_texts_equals_that_of_the_joined_text(books, tmp_path):
    (tmp_path / "joined.txt").write_text(load_texts((str(books), str(tmp_path / "c.txt"))))
    flags = [*SMALL, "--max-steps", 4]
    pretrain(numpy_main, tmp_path / "joined.txt", tmp_path / "one", "--max-steps", 4)
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        texts = ["--text", books, "--text", tmp_path / "c.txt"]
        result = invoke(command, "pretrain", *texts, "--out", tmp_path / name, *flags)
        assert result.exit_code == 0, result.output
        assert f"text      {books}, {tmp_path / 'c.txt'}: " in result.output
        difference = 0 if name == "numpy" else 5e-5
        for ours, want in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            np.testing.assert_allclose(float(ours["val_loss"]), float(want["val_loss"]), rtol=0, atol=difference)


def test_a_moved_run_of_several_texts_is_evaluated_and_resumed(books, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    books.rename(place / "books")
    (tmp_path / "c.txt").rename(place / "c.txt")
    texts = ["--text", place / "c.txt", "--text", place / "books"]
    result = invoke(numpy_main, "pretrain", *texts, "--out", place / "run", *SMALL, "--max-steps", 2)
    assert result.exit_code == 0, result.output
    moved = shutil.move(place, tmp_path / "moved")
    evaluated = invoke(numpy_main, "evaluate", moved / "run")
    assert f"the last 10% of {moved / 'c.txt'}, {moved / 'books'}" in evaluated.output
    result = invoke(numpy_main, "pretrain", "--resume", moved / "run", "--max-steps", 3)
    assert result.exit_code == 0, result.output
    (moved / "books" / "b.txt").write_text("changed " * 60)
    before = snapshot(moved / "run")
    check_refused(invoke(numpy_main, "pretrain", "--resume", moved / "run"), "is not the text that")
    check_refused(invoke(numpy_main, "evaluate", moved / "run"), "is not the text that")
    shutil.rmtree(moved / "books")
    check_refused(invoke(numpy_main, "pretrain", "--resume", moved / "run"), "books, the text of ")
    assert snapshot(moved / "run") == before


def test_several_texts_are_evaluated(books, tmp_path):
    pretrain(numpy_main, tmp_path / "c.txt", tmp_path / "run", "--max-steps", 1)
    result = invoke(numpy_main, "evaluate", tmp_path / "run", "--text", books, "--text", tmp_path / "c.txt")
    assert result.exit_code == 0, result.output
    assert f"tokens      {len('first ' * 60 + 'second ' * 60 + 'third ' * 60) + 1:,}" in result.output


def test_order_does_not_depend_on_how_paths_are_typed(books, tmp_path, monkeypatch):
    """tokenize and evaluate read them as typed, pretrain by absolute paths without links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("fourth")
    (tmp_path / "z").symlink_to(tmp_path / "a.txt")
    want = load_texts(absolute_texts(("a.txt", "books")))
    for names in (("books/", "a.txt"), ("./books/.", "z"), ("books/a/..", "./a.txt")):
        assert load_texts(names) == load_texts(absolute_texts(names)) == want, names


def test_a_text_given_twice_is_refused(books, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for names in (("c.txt", "./c.txt"), ("books", "books/b.txt"), ("c.txt", "c.txt"), ("python-manual",) * 2):
        with pytest.raises(InputError, match=r"is given twice \(also as .*\): leave one out"):
            load_texts(names)


def test_an_empty_name_is_refused():
    for command in (["pretrain"], ["pretrain", "--text", "python-manual"]):
        check_refused(invoke(numpy_main, *command, "--text", ""), "the name of a text is empty")


@given(parts=st.lists(st.text("<|endoftx>ab", max_size=8), min_size=1, max_size=4), ratio=st.floats(0, 1))
def test_the_split_never_cuts_a_separator(parts, ratio):
    text = "<|endoftext|>".join(parts)
    first, rest = split_text(text, ratio)
    assert first + rest == text
    assert first.count("<|endoftext|>") + rest.count("<|endoftext|>") == text.count("<|endoftext|>")
    moved = int(ratio * len(text)) - len(first)
    assert moved == 0 or (0 < moved < len("<|endoftext|>") and rest.startswith("<|endoftext|>"))


@pytest.mark.parametrize("encoding", ["bytes", "chars"])
def test_texts_split_at_a_separator_are_learned_and_tokenised_alike(tmp_path, encoding):
    """Of ten texts of equal length the last tenth begins inside the last separator."""
    folder = tmp_path / "ten"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text("abcdefgh ijkl mnop endtx\n" * 8)
    pretrain(numpy_main, folder, tmp_path / "text", "--encoding", encoding, "--max-steps", 3)
    made = invoke(numpy_main, "tokenize", folder, "--encoding", encoding, "--out", tmp_path / "tokens")
    assert made.exit_code == 0, made.output
    flags = [*SMALL, "--max-steps", 3, *(["--encoding", "bytes"] if encoding == "bytes" else [])]
    learned = invoke(numpy_main, "pretrain", "--tokens", tmp_path / "tokens", "--out", tmp_path / "run", *flags)
    assert learned.exit_code == 0, learned.output
    drop = {"seconds"}
    got, want = (
        [{name: value for name, value in row.items() if name not in drop} for row in rows(tmp_path / name)]
        for name in ("run", "text")
    )
    assert got == want

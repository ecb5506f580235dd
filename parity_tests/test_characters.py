"""--encoding chars: the characters of a run's text as its vocabulary, made, kept and used."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_gpt import load
from numpy_gpt.cli.main import main as numpy_main
from numpy_gpt.encodings.characters import CharacterEncoding, characters_file
from numpy_gpt.encodings.vocabulary import CHARACTERS, END_OF_TEXT
from numpy_gpt.errors import InputError
from numpy_gpt.tokenizer import decode, encode, end_id, get_encoding, stream_decode
from parity_tests.judge.runs import SMALL, check_refused, invoke, pretrain, rows, snapshot
from torch_gpt.cli import main as torch_main

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def encoding_of(text):
    return CharacterEncoding(characters_file([text]), "the text")


@given(text=TEXTS)
def test_ids_are_places_in_the_sorted_characters(text):
    """As nanoGPT's data/shakespeare_char/prepare.py: enumerate(sorted(set(data)))."""
    encoding, number = encoding_of(text), {c: i for i, c in enumerate(sorted(set(text)))}
    ids = encode(encoding, text)
    assert ids.tolist() == [number[c] for c in text]
    assert decode(encoding, ids) == "".join(stream_decode(encoding, ids)) == text
    assert (encoding.n_vocab, end_id(encoding)) == (len(number), None)


@given(parts=st.lists(TEXTS, min_size=2, max_size=4))
def test_end_of_text_is_one_token_after_the_characters(parts):
    text = END_OF_TEXT.join(parts)
    encoding = encoding_of(text)
    number = {c: i for i, c in enumerate(sorted(set("".join(parts))))}
    want = [i for part in parts for i in [*(number[c] for c in part), len(number)]][:-1]
    assert encode(encoding, text).tolist() == want
    assert decode(encoding, want) == text
    assert (encoding.n_vocab, end_id(encoding)) == (len(number) + 1, len(number))


@given(text=TEXTS, other=TEXTS)
def test_unknown_characters_are_named(text, other):
    encoding, unknown = encoding_of(text), set(other) - set(text)
    if not unknown:
        assert decode(encoding, encode(encoding, other)) == other
        return
    with pytest.raises(InputError, match=f"U\\+{ord(min(unknown)):04X}.* is not among the {len(set(text))} characters"):
        encode(encoding, other)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"3", b'["ab"]', b'["a", "a"]', b'["a", 1]', b'"\\ud800"', b'["\\ud800"]', b"\xff"]
    + [b"[" * 9000],
)
def test_damaged_vocabularies_are_refused(tmp_path, content):
    (tmp_path / CHARACTERS).write_bytes(content)
    with pytest.raises(InputError, match=r"has no usable characters\.json .*: restore it"):
        get_encoding(str(tmp_path))


def test_without_a_text_there_is_no_such_encoding():
    with pytest.raises(InputError, match="the encoding chars is made from a text"):
        get_encoding("chars")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of both backends on a text of 27 characters, moved to where its text's encoding is unknown."""
    place = tmp_path_factory.mktemp("chars")
    words = "the quick brown fox jumps over a lazy dog.\n" * 60
    (place / "words.txt").write_text(words)
    for name, command in (("numpy", numpy_main), ("torch", torch_main)):
        output = pretrain(command, place / "words.txt", place / name, "--encoding", "chars", "--max-steps", 4)
        assert "tokens (chars)" in output
    return place


def test_both_train_on_characters(run):
    assert load(run / "numpy").config.vocab_size == 29
    assert json.loads((run / "numpy" / "vocabulary" / CHARACTERS).read_text())[:3] == ["\n", " ", "."]
    for ours, torchs in zip(rows(run / "numpy"), rows(run / "torch"), strict=True):
        np.testing.assert_allclose(float(ours["val_loss"]), float(torchs["val_loss"]), atol=5e-5)


def test_the_vocabulary_serves_the_other_commands(run):
    result = invoke(numpy_main, "generate", run / "numpy", "the ", "--max-new-tokens", 20)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("the ")
    assert set(result.stdout) <= set("the quick brown fox jumps over a lazy dog.\n")
    assert len(result.stdout) == len("the ") + 20 + len("\n")
    evaluated = invoke(numpy_main, "evaluate", run / "numpy")
    assert evaluated.exit_code == 0, evaluated.output
    assert "(chars)" in evaluated.output
    check_refused(invoke(numpy_main, "generate", run / "numpy", "The"), "'T' (U+0054) is not among the 29 characters")


def test_a_run_is_resumed_without_its_first_place(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    moved = tmp_path / "moved" / "numpy"
    result = invoke(numpy_main, "pretrain", "--resume", moved, "--max-steps", 8)
    assert result.exit_code == 0, result.output
    text = moved.parent / "words.txt"
    text.write_text(text.read_text() + "é")
    before = snapshot(moved)
    check_refused(invoke(numpy_main, "pretrain", "--resume", moved, "--text", text, "--max-steps", 9), "U+00E9")
    assert snapshot(moved) == before


def test_a_changed_vocabulary_is_noticed(run, tmp_path):
    shutil.copytree(run / "numpy", tmp_path / "run")
    file = tmp_path / "run" / "vocabulary" / CHARACTERS
    file.write_text(json.dumps(json.loads(file.read_text())[::-1]))
    check_refused(invoke(numpy_main, "generate", tmp_path / "run", "the"), "is not the one that")
    check_refused(invoke(numpy_main, "pretrain", "--resume", tmp_path / "run"), "is not the text that")


def test_the_default_prompt_is_replaced_where_it_cannot_be_written(run, tmp_path):
    output = pretrain(numpy_main, run / "words.txt", tmp_path / "run", "--encoding", "chars", "--max-steps", 1)
    assert "after epoch" in output
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert settings["prompt"] == "\n"  # "The statement" has a T
    refused = ["pretrain", "--text", run / "words.txt", *SMALL, "--encoding", "chars", "--prompt", "The"]
    check_refused(invoke(numpy_main, *refused), "the --prompt cannot be used: 'T'")


def test_other_weights_keep_their_own_characters(run, tmp_path):
    init = ["pretrain", "--init", run / "numpy", "--text", run / "words.txt", "--batch-size", 4, "--max-steps", 2]
    check_refused(invoke(numpy_main, *init, "--encoding", "chars"), "has its own: leave the flag out with --init")
    result = invoke(numpy_main, *init, "--out", tmp_path / "next")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "next" / "vocabulary" / CHARACTERS).read_bytes() == (
        run / "numpy" / "vocabulary" / CHARACTERS
    ).read_bytes()


def test_export_says_that_it_writes_no_tokenizer(run, tmp_path):
    result = invoke(numpy_main, "export", run / "numpy", "--out", tmp_path / "hf")
    assert result.exit_code == 0, result.output
    assert "without a tokenizer" in result.output
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}

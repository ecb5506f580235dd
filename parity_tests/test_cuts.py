"""tokens.cuts: a text encoded in chunks has the tokens of the uncut text, with every encoding."""

import json
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numpy_gpt.encodings.characters import CharacterEncoding, characters_file
from numpy_gpt.encodings.own import WHITE_SPACE, own_encoding
from numpy_gpt.encodings.vocabulary import END_OF_TEXT, GPT2_FILES, IDS, MERGES, TOKENS, AddedToken, Extras
from numpy_gpt.errors import InputError
from numpy_gpt.tokenizer import encode, get_encoding
from numpy_gpt.tokens import cuts
from numpy_gpt.tokens.cuts import Cuts, chunks

TINY = Path(__file__).parent / "fixtures" / "tiny_gpt2"

ADDED = {
    "rstrip": {"content": "<r>", "rstrip": True},
    "lstrip": {"content": "<l>", "lstrip": True},
    "both, normalized": {"content": "<b>", "lstrip": True, "rstrip": True, "normalized": True},
    "white space inside": {"content": "a b\n c"},
    "white space at the ends": {"content": " x\t"},
    "one inside another": {"content": "<l> <r>"},
    "letters and digits": {"content": "q1q1"},
}

PIECES = [
    *(
        "a",
        "b",
        "q",
        "x",
        "1",
        "2",
        "q1",
        "ab12",
        "'s",
        "'ll",
        "'",
        "é",
        "你好",
        "٣",
        "½",
        "Ⅷ",
        "🙂",
        "\u0301",
        "\x1c",
        "\x1f",
    ),
    *sorted(WHITE_SPACE),
    *("  ", " \n", "\n\n  ", "\t\t", "\r\n", "!?", "(1)", END_OF_TEXT, "<|endo", "ftext|>", " the", "he in"),
    *(flags["content"] for flags in ADDED.values()),
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=30).map("".join)


def own(*added, prefix=False, merges=()):
    files = {name: (TINY / name).read_bytes() for name in GPT2_FILES}
    ids = json.loads(files[IDS])
    for first, second in merges:
        ids[first + second] = len(ids)
        files[MERGES] += f"{first} {second}\n".encode()
    files[IDS] = json.dumps(ids).encode()
    tokens = [AddedToken(END_OF_TEXT, ids[END_OF_TEXT])]
    tokens += [AddedToken(id=len(ids) + i, **ADDED[name]) for i, name in enumerate(added)]
    return own_encoding(files | {TOKENS: Extras(tuple(tokens), END_OF_TEXT, prefix).to_json()}, "a folder")


ENCODINGS = {
    "bytes": lambda: get_encoding("bytes"),
    "gpt2": lambda: get_encoding("gpt2"),
    "own": own,
    "own, a leading space": lambda: own(prefix=True),
    "own, all added tokens": lambda: own(*ADDED),
    "own, all added tokens and a leading space": lambda: own(*ADDED, prefix=True),
    **{f"own, {name}": partial(own, name) for name in ADDED},
    "own, merges of what str.isspace calls space": partial(own, merges=[("!", "\u011c"), ("\u011c", "!")]),  # \x1c
}


TAIL = "." * 20
"""Longer than any added token."""

EACH = pytest.mark.parametrize("name", ENCODINGS)


@cache
def encoding_called(name):
    return ENCODINGS[name]()


def in_chunks(encoding, blocks):
    """The chunks of the blocks, at every place where a text may be cut and it is known in time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "CHUNK", 1)
        patch.setattr(cuts, "STRETCH", 3)
        return list(chunks(blocks, Cuts(encoding)))


def check(encoding, text, places=None):
    """Compare the tokens of a text given in blocks, cut at these places (None: character by character).

    The text goes on, so that what precedes any of its places is seen to be followed by no added token.
    """
    text += TAIL
    edges = range(len(text) + 1) if places is None else sorted({0, len(text), *(at % (len(text) + 1) for at in places)})
    parts = in_chunks(encoding, [text[a:b] for a, b in pairwise(edges)])
    assert "".join(parts) == text
    got = [i for part in parts for i in encode(encoding, part).tolist()]
    assert got == encode(encoding, text).tolist(), parts
    return parts


@EACH
@given(text=TEXTS, places=st.none() | st.lists(st.integers(0, 200), max_size=4))
@example(text="<r>  a", places=None)  # absorbs white space that the cut would leave
@example(text="xa b\n cx", places=None)  # a token with places to cut in it
@example(text="a\n\nb", places=None)  # a leading space would be added before the newline
@example(text="a \x1cb", places=None)  # \x1c is white space to str.isspace, not to the pattern
@example(text="a!\x1c b", places=None)
@example(text="1's2 'll3a'll4", places=None)
@example(text="<l> <r> <l> \n<b> \n<b>", places=None)
def test_chunks_have_the_tokens_of_the_text(name, text, places):
    check(encoding_called(name), text, places)


@EACH
def test_all_pairs_of_pieces(name):
    for first in PIECES:
        check(encoding_called(name), "".join(f"x{first}{second}" for second in PIECES))


@given(text=TEXTS.filter(bool), places=st.none() | st.lists(st.integers(0, 200), max_size=4))
def test_chunks_of_characters(text, places):
    check(CharacterEncoding(characters_file([text + TAIL]), "the text"), text, places)


@EACH
def test_ordinary_text_is_cut_often(name):
    assert len(check(encoding_called(name), "one two three four five six seven eight nine ten " * 3)) > 20


@pytest.mark.parametrize(("name", "text"), [("gpt2", "ab12" * 50), ("bytes", "x" * 200), ("own", "0x1f" * 50)])
def test_text_without_white_space_is_cut(name, text):
    assert len(check(encoding_called(name), text)) > 90


def test_search_reads_a_text_from_its_end():
    """The place is found in the last stretch, although 2 MB are without one before it."""
    found = Cuts(get_encoding("gpt2"))
    assert found.last("x" * 2_000_000 + " x" + "y" * 50) == 2_000_000
    assert found.last("x" * 2_000_000) == 0
    assert found.last("a b" + "y" * 20) == 1
    assert found.last("") == found.last("a") == found.last(" ") == found.last("   ") == 0


def test_only_place_is_found(monkeypatch):
    monkeypatch.setattr(cuts, "STRETCH", 3)
    found = Cuts(get_encoding("gpt2"))
    for tail in range(20, 26):
        assert [found.last("x" * place + " " + "y" * tail) for place in range(20)] == list(range(20))


def test_chunks_have_their_size(monkeypatch):
    monkeypatch.setattr(cuts, "CHUNK", 1000)
    words = [f"word{i} " for i in range(2000)]
    text = "".join(words)
    blocks = [text[i : i + 300] for i in range(0, len(text), 300)]
    sizes = [len(chunk) for chunk in chunks(blocks, Cuts(get_encoding("gpt2")))]
    assert all(900 < size < 1400 for size in sizes[:-1])
    assert sum(sizes) == len(text)


def test_text_without_a_place_is_refused(monkeypatch):
    monkeypatch.setattr(cuts, "CHUNK", 10)
    monkeypatch.setattr(cuts, "LONGEST", 100)
    cut = Cuts(get_encoding("gpt2"))
    with pytest.raises(InputError, match=r"more than 100 characters without a space .*, from ' xxxx.* on: break it up"):
        list(chunks(["a few words", " " + "x" * 100, *["x" * 30] * 4], cut))
    text = ["a b ", "x" * 100]
    assert "".join(chunks(text, cut)) == "".join(text)


def test_long_text_in_chunks_of_the_usual_size():
    text = "".join(np.random.default_rng(3).choice(PIECES[:10] + [" the", "\n", " of 12"], 600_000))
    encoding = get_encoding("gpt2")
    parts = list(chunks([text[i : i + 2**20] for i in range(0, len(text), 2**20)], Cuts(encoding)))
    assert len(parts) > 1
    assert np.array_equal(np.concatenate([encode(encoding, part) for part in parts]), encode(encoding, text))

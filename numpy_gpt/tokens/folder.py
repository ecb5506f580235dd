"""A folder of token ids: train.bin and val.bin, with their meta.json or, as nanoGPT writes them, without."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import InputError
from numpy_gpt.io.bounded_json import read_json
from numpy_gpt.io.paths import is_file, is_folder, kind_of, refusal
from numpy_gpt.tokenizer import CHARS, ENCODINGS, get_encoding, vocabulary_files, vocabulary_sha256
from numpy_gpt.tokens.file import TokenFile

FORMAT, VERSION = "numpy-gpt tokens", 1

PARTS = ("train", "val")
HEADER, VOCABULARY = "meta.json", "vocabulary"
"""The file that describes the others, and the subfolder for an encoding without a built-in name."""

Track = Callable[[Sequence[int]], Iterable[int]]
"""Passes numbers of blocks through, showing progress, like console.Report.track."""

PICKLE = "meta.pkl"
"""The pickle with nanoGPT's vocabulary. Never read: a pickle can run code."""

BLOCK = 2**22
"""Bytes of a file checked at a time."""


def file_of(part: str) -> str:
    return f"{part}.bin"


@dataclass(frozen=True)
class Tokens:
    """A folder's tokens, checked.

    encoding: as get_encoding takes it; sha256: identifies both files' content; largest_id: -1 if there are none.
    """

    folder: Path
    encoding: str
    train: TokenFile
    val: TokenFile
    sha256: str
    largest_id: int


def open_tokens(folder: Path, encoding: str | None = None, track: Track = iter) -> Tokens:
    """Open a folder of tokens, after reading both files once to check them.

    encoding: the one expected. None: that of meta.json; gpt2 in a folder of nanoGPT's. track: passes the numbers of
    the blocks through, showing progress.

    Raises InputError if something is missing or damaged, was changed since it was written, is of another encoding, or
    has ids outside its vocabulary.
    """
    header = read_header(folder)
    encoding = _matching(folder, header, encoding)
    n_vocab = get_encoding(encoding).n_vocab
    files = [TokenFile(folder / file_of(part), np.dtype(header["dtype"] if header else np.uint16)) for part in PARTS]
    blocks = [(i, start) for i, file in enumerate(files) for start in range(0, len(file), BLOCK // file.dtype.itemsize)]
    seen, largest = [hashlib.sha256() for _ in files], [-1 for _ in files]
    for number in track(range(len(blocks))):
        i, start = blocks[number]
        ids = files[i].stored(start, min(BLOCK // files[i].dtype.itemsize, len(files[i]) - start))
        seen[i].update(ids.data)
        largest[i] = max(largest[i], int(ids.max()))
    for file, part, hashed, most in zip(files, PARTS, seen, largest, strict=True):
        if header and header["sha256"][part] != hashed.hexdigest():
            raise InputError(
                f"{file.path} is not the file that {HEADER} beside it describes (its SHA-256 differs): restore it, or "
                "make the folder again with numpy-gpt tokenize"
            )
        if most >= n_vocab:
            raise InputError(
                f"{file.path} has the token id {most:,}, but {encoding} only {n_vocab:,} ids: pass the right one as "
                f"--encoding (nanoGPT's {PICKLE} is a pickle and is never read)"
            )
    train, val = files
    return Tokens(folder, encoding, train, val, _both([hashed.hexdigest() for hashed in seen]), max(largest))


def tokens_sha256(folder: Path) -> str:
    """Tokens.sha256 of an unchecked folder: from meta.json if present, else computed. Raises InputError."""
    header = read_header(folder)
    if header is not None:
        return _both([header["sha256"][part] for part in PARTS])
    sums = []
    for part in PARTS:
        try:
            with (folder / file_of(part)).open("rb") as file:
                sums.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise InputError(refusal(folder / file_of(part), error)) from error
    return _both(sums)


def tokens_encoding(folder: Path, expected: str | None) -> str:
    """The encoding of a folder's tokens, as get_encoding takes it. Raises InputError if it is not the one expected."""
    return _matching(folder, read_header(folder), expected)


def _both(sums: list[str]) -> str:
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def read_header(folder: Path) -> dict[str, Any] | None:
    """The meta.json of a folder of tokens, checked; None in a folder of nanoGPT's, which has none.

    Raises InputError if this is not a folder of tokens, or if its meta.json is damaged.
    """
    if kind_of(folder) == "missing":
        raise InputError(f"{folder} does not exist: give a folder made by numpy-gpt tokenize or nanoGPT's prepare.py")
    if missing := [file_of(part) for part in PARTS if not is_file(folder / file_of(part))]:
        raise InputError(
            f"{folder} is not a folder of tokens (it has no {' and no '.join(missing)}): give one made by numpy-gpt "
            "tokenize or nanoGPT's prepare.py"
        )
    file = folder / HEADER
    if kind_of(file) == "missing":
        return None
    header = read_json(file)
    if header.get("format") != FORMAT:
        raise InputError(f"{file} does not describe tokens: it is damaged or another file")
    if header.get("version") != VERSION:
        version = f"{header.get('version')!s:.40}"
        raise InputError(f"{file} uses format {version}; this release reads format {VERSION}: update numpy-gpt")
    sums = header.get("sha256")
    usable = {
        "encoding": header.get("encoding") in (*ENCODINGS, VOCABULARY),
        "vocabulary_sha256": type(header.get("vocabulary_sha256")) is str,
        "dtype": header.get("dtype") in ("uint16", "uint32"),
        "sha256": isinstance(sums, dict) and all(type(sums.get(part)) is str for part in PARTS),
    }
    if not all(usable.values()):
        name = next(name for name in usable if not usable[name])
        raise InputError(f"{file} is damaged (its {name} is unusable): restore it, or make the folder again")
    return header


def _matching(folder: Path, header: dict[str, Any] | None, expected: str | None) -> str:
    """The encoding of a folder's tokens: the one expected, if its vocabulary is the same."""
    if header is None:
        if is_file(folder / CHARACTERS) and expected in (None, CHARS):
            return str(folder)
        if expected == CHARS or (expected is None and kind_of(folder / PICKLE) != "missing"):
            raise InputError(
                f"{folder} has no vocabulary that can be read ({PICKLE} is a pickle, which may run code): put "
                f"{CHARACTERS}, a JSON list of its characters, there, or pass the encoding of its tokens as --encoding"
            )
        if is_folder(folder / VOCABULARY):
            raise InputError(f"{folder / HEADER}, which describes these tokens, is missing: restore it")
        return expected or "gpt2"
    if expected == CHARS:
        raise InputError(f"the encoding chars is made from a text: leave --encoding out, since {folder} has its own")
    own = str(folder / VOCABULARY) if header["encoding"] == VOCABULARY else header["encoding"]
    if expected is None and own not in ENCODINGS and not is_folder(own):
        raise InputError(f"{own}, the vocabulary of these tokens, was not found: restore it, or pass it as --encoding")
    encoding = expected or own
    if vocabulary_sha256(vocabulary_files(encoding)) == header["vocabulary_sha256"]:
        return encoding
    if expected is None:
        raise InputError(f"{own} is not the vocabulary that these tokens were made with: restore that one")
    raise InputError(
        f"{folder} has tokens of the encoding {own}, not {expected}: give tokens of {expected}, or another --encoding"
    )

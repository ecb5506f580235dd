"""Texts -> a folder of token ids, in the memory of a few chunks however long the texts are."""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from operator import itemgetter
from os.path import getsize
from pathlib import Path
from typing import Any

import numpy as np

from numpy_gpt.data import before_separator, text_blocks
from numpy_gpt.encodings.characters import characters_file
from numpy_gpt.encodings.vocabulary import CHARACTERS
from numpy_gpt.errors import InputError
from numpy_gpt.io.files import flush, written
from numpy_gpt.io.folders import new_folder
from numpy_gpt.io.paths import kind_of
from numpy_gpt.parallel.processes import in_processes
from numpy_gpt.tokenizer import (
    CHARS,
    ENCODINGS,
    END_OF_TEXT,
    encode,
    get_encoding,
    vocabulary_files,
    vocabulary_sha256,
)
from numpy_gpt.tokens.cuts import Cuts, chunks
from numpy_gpt.tokens.folder import FORMAT, HEADER, PARTS, VERSION, VOCABULARY, file_of
from numpy_gpt.typing import Array

Transfer = Callable[[str, int, int], AbstractContextManager[Callable[[int], None]]]
"""Shows progress, like console.Report.transfer: name, bytes done, bytes in all -> a function of the bytes done."""


def tokenize(
    files: Sequence[str], encoding: str, out: Path, train_ratio: float, processes: int, transfer: Transfer
) -> dict[str, Any]:
    """Write the tokens of the files, joined by <|endoftext|>, into the new folder `out`; returns its meta.json.

    The first int(train_ratio * characters) characters are encoded as one text into train.bin, the rest into val.bin.
    The files are read twice: to count the characters, and to encode them.
    Raises InputError for an unusable file, encoding or folder; `out` appears only when it is complete.
    """
    with new_folder(out) as folder:
        if encoding != CHARS:
            get_encoding(encoding)  # an unusable one is refused before the text is read
        counted, characters = _counted(files, encoding == CHARS, transfer)
        words = vocabulary_files(encoding) if encoding != CHARS else {CHARACTERS: characters}
        own = encoding not in ENCODINGS
        if own:
            with written(out):
                (folder / VOCABULARY).mkdir()
                for name, content in words.items():
                    (folder / VOCABULARY / name).write_bytes(content)
        split = _split(files, int(train_ratio * counted.characters))
        name = str(folder / VOCABULARY) if encoding == CHARS else encoding
        known, encoded = get_encoding(name), _Tally()
        dtype = np.dtype("<u2" if known.n_vocab <= 65535 else "<u4")
        parts = {part: _write(folder / file_of(part), [], out) for part in PARTS}  # one may stay empty
        with transfer("encoding", 0, counted.bytes) as done, in_processes(processes) as share:
            divided = _divided(encoded.passing(joined(files), done), split)
            for part, pieces in groupby(divided, key=itemgetter(0)):
                blocks = chunks((block for _, block in pieces), Cuts(known))
                parts[part] = _write(folder / file_of(part), share(partial(_ids, name, dtype), blocks), out)
        if encoded.sha256 != counted.sha256:
            raise InputError(f"{' or '.join(files)} changed while it was read: try again when nothing writes it")
        header = {
            "format": FORMAT,
            "version": VERSION,
            "encoding": VOCABULARY if own else encoding,
            "vocabulary_sha256": vocabulary_sha256(words),
            "n_vocab": known.n_vocab,
            "dtype": dtype.name,
            "tokens": {part: count for part, (count, _) in parts.items()},
            "sha256": {part: sha256 for part, (_, sha256) in parts.items()},
            "characters": dict(zip(PARTS, (split, counted.characters - split), strict=True)),
            "text_sha256": counted.sha256,
            "files": [Path(file).name for file in files],
        }
        with written(out):
            (folder / HEADER).write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
            flush(folder / HEADER)
    return header


def _counted(files: Sequence[str], characters: bool, transfer: Transfer) -> tuple["_Tally", bytes]:
    """A tally of the text, and if wanted the characters.json for it. Raises InputError for an unusable file."""
    size = 0
    for file in files:
        if kind_of(file) == "pipe":
            raise InputError(f"{file} is a pipe, but the text is read twice: save it as a file first")
        next(text_blocks(file))  # an unusable file is refused before another is read
        size += getsize(file)
    tally, found = _Tally(), b""
    with transfer("reading", 0, size) as done:
        text = tally.passing(joined(files), done)
        if characters:
            found = characters_file(chunks(text, Cuts(get_encoding("bytes"))))  # cuts no <|endoftext|>
        deque(text, maxlen=0)
    return tally, found


def _split(files: Sequence[str], place: int) -> int:
    """Where the training part of the text ends, as data.split_text has it."""
    n, position, text = len(END_OF_TEXT), 0, ""
    for block in joined(files):
        text = text[-2 * n :] + block
        position += len(block)
        if position >= place + n:
            break
    begin = position - len(text)
    return begin + before_separator(text, place - begin)


def joined(files: Iterable[str]) -> Iterator[str]:
    """The text of the files, joined by <|endoftext|>, about a mebibyte at a time."""
    for number, file in enumerate(files):
        if number:
            yield END_OF_TEXT
        yield from text_blocks(file)


class _Tally:
    """Counts and hashes a text that passes through it."""

    def __init__(self) -> None:
        self.characters = self.bytes = 0
        self._seen = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._seen.hexdigest()

    def passing(self, blocks: Iterable[str], done: Callable[[int], None]) -> Iterator[str]:
        """The blocks, unchanged. done: is told the number of bytes after each."""
        for block in blocks:
            raw = block.encode()
            self._seen.update(raw)
            self.characters += len(block)
            self.bytes += len(raw)
            done(self.bytes)
            yield block


def _divided(blocks: Iterable[str], split: int) -> Iterator[tuple[str, str]]:
    """(part, text) of the blocks: the first `split` characters in the first part, the rest in the second."""
    train, val = PARTS
    for block in blocks:
        if split:
            yield train, block[:split]
        if len(block) > split:
            yield val, block[split:]
        split = max(0, split - len(block))


def _ids(encoding: str, dtype: np.dtype[Any], text: str) -> Array:
    return encode(get_encoding(encoding), text).astype(dtype)


def _write(file: Path, arrays: Iterable[Array], out: Path) -> tuple[int, str]:
    """Write the arrays one after the other; returns the number of ids and the file's SHA-256. Errors name `out`."""
    count, seen = 0, hashlib.sha256()
    with file.open("wb") as f:
        for ids in arrays:
            count += len(ids)
            seen.update(ids.data)
            with written(out):
                f.write(ids.data)
                f.flush()
    with written(out):
        flush(file)
    return count, seen.hexdigest()

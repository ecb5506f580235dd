"""The texts of a run: one or several names, files and folders, read as one text and found again later."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from numpy_gpt.data import CORPORA, load_text, sha256
from numpy_gpt.encodings.vocabulary import END_OF_TEXT
from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import absolute, is_folder, kind_of, refusal
from numpy_gpt.weights.checkpoint import Header

Text = str | tuple[str, ...]
"""The name of one text as load_texts takes it, or the names of several."""


def names_of(text: Text) -> tuple[str, ...]:
    """The names of one or several texts. Raises InputError for an empty one."""
    names = (text,) if isinstance(text, str) else text
    if "" in names:
        raise InputError("the name of a text is empty: give a file, a folder or a known text")
    return names


def text_from(names: Iterable[str]) -> Text:
    """The inverse of names_of."""
    several = tuple(names)
    return several[0] if len(several) == 1 else several


def in_words(text: Text) -> str:
    """The names for a report: all of up to three, else the first and the number of the others."""
    names = names_of(text)
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"


def text_files(text: Text) -> list[str]:
    """The texts in the order they are read in: sorted by name, each folder replaced by the files in it.

    The order does not depend on how a path is typed. A folder stands for all files in it and in its subfolders, sorted
    by path, except empty and hidden ones (a dot begins the file's or a folder's name).
    Raises InputError for a folder without any, or one that cannot be read, and for a file that is there twice.
    """
    files: list[str] = []
    for name in sorted(names_of(text), key=_place):
        files += _files_in(name) if name not in CORPORA and is_folder(name) else [name]
    seen: dict[str, str] = {}
    for file in files:
        if (before := seen.setdefault(_place(file)[1], file)) != file or files.count(file) > 1:
            raise InputError(f"the text {file} is given twice (also as {before}): leave one out")
    return files


def _place(name: str) -> tuple[str, str]:
    """(name, absolute path) of a text, by which texts are sorted."""
    path = name if name in CORPORA else str(absolute(name))
    return os.path.basename(path), path


def _files_in(folder: str) -> list[str]:
    found: list[Path] = []
    try:
        for place, inner, names in os.walk(folder, onerror=_raise):
            inner[:] = [name for name in inner if not name.startswith(".")]
            paths = (Path(place, name) for name in names if not name.startswith("."))
            found += [path for path in paths if kind_of(path) == "file" and path.stat().st_size]
    except OSError as error:
        raise InputError(refusal(error.filename or folder, error)) from error
    if not found:
        raise InputError(f"{folder} contains no text: give a folder with UTF-8 text files")
    return [str(path) for path in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


def load_texts(text: Text) -> str:
    """The texts, each as load_text reads it, joined by <|endoftext|>, which encodings turn into one token.

    Raises InputError, naming the file, as load_text and text_files do.
    """
    return END_OF_TEXT.join(load_text(file) for file in text_files(text))


def absolute_texts(text: Text) -> Text:
    """The same texts by names that are valid in any working directory."""
    names = [name if name in CORPORA else str(absolute(name)) for name in names_of(text)]
    try:
        "".join(names).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the path {in_words(text_from(names))} is not valid Unicode: rename the file") from error
    return text_from(names)


def to_metadata(text: Text) -> str:
    """The names as a checkpoint's metadata has them: one as it is, several as JSON."""
    return text if isinstance(text, str) else json.dumps(text)


def from_metadata(value: str) -> Text:
    """The inverse of to_metadata."""
    with suppress(ValueError, RecursionError):
        if isinstance(names := json.loads(value), list) and names and all(isinstance(name, str) for name in names):
            return text_from(names)
    return value


def find_texts(text: Text, header: Header, fix: str) -> Text:
    """Find the texts of a checkpoint: at their recorded paths, or by name in the working directory or near it.

    Texts found by name must have the recorded SHA-256. Raises InputError, ending with the fix, if there are none.
    """
    missing = [name for name in names_of(text) if name not in CORPORA and kind_of(name) == "missing"]
    if not missing:
        return absolute_texts(text)
    for folder in (Path(), *header.file.resolve().parents[:4]):
        with suppress(InputError):  # unreadable or not a text: try the next folder
            near = text_from(str(folder / Path(name).name) if name in missing else name for name in names_of(text))
            there = all(kind_of(name) != "missing" for name in names_of(near) if name not in CORPORA)
            if there and header.about.get("text_sha256") == sha256(load_texts(near)):
                return absolute_texts(near)
    raise InputError(f"{missing[0]}, the text of {header.file}, was not found: {fix}")


def text_of(header: Header) -> tuple[str, str]:
    """Return the name, for a report, and the content of a checkpoint's training text, verified by its SHA-256."""
    value = header.about.get("text")
    if value is None:
        raise InputError(f"{header.file} does not name the text it was trained on: give one with --text")
    text = find_texts(from_metadata(value), header, "restore it, or evaluate all of another file with --text FILE")
    content = load_texts(text)
    if header.about.get("text_sha256", sha256(content)) != sha256(content):
        name = in_words(text)
        raise InputError(
            f"{name} is not the text that {header.file} was trained on (its SHA-256 differs): "
            f"restore the original, or evaluate all of this one with --text {name}"
        )
    return in_words(text), content

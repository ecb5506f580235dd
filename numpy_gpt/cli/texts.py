"""Texts as commands take them: the encoding that fits a checkpoint, and arguments in any locale."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import kind_of
from numpy_gpt.runs.pretrain import encoding_of
from numpy_gpt.tokenizer import get_encoding, least_vocab_size
from numpy_gpt.weights.checkpoint import Header

if TYPE_CHECKING:
    import tiktoken


def fitting_encoding(header: Header, asked: str | None) -> "tiktoken.Encoding":
    """The encoding asked for, else the checkpoint's; InputError if the model does not know all of its tokens."""
    encoding = get_encoding(encoding_of(header) if asked is None else asked)
    if least_vocab_size(encoding) > header.config.vocab_size:
        raise InputError(
            f"{header.file} knows {header.config.vocab_size:,} tokens, but the encoding {encoding.name} has "
            f"{least_vocab_size(encoding):,}: pass the one it was trained with as --encoding"
        )
    return encoding


def as_typed(text: str, what: str) -> str:
    """Decode as UTF-8 an argument that Python read in a locale without its characters (LC_ALL=C)."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeDecodeError as error:
        raise InputError(f"the {what} is not valid UTF-8: convert it to UTF-8") from error


def exists(path: str | Path) -> bool:
    """Whether a path exists; the argument may just as well be a text."""
    try:
        return kind_of(path) != "missing"
    except InputError:
        return False

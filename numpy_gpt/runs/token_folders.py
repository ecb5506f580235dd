"""The tokens that a run learns in place of a text: a folder, found again and verified later."""

from contextlib import suppress
from pathlib import Path

from numpy_gpt.errors import InputError
from numpy_gpt.io.paths import absolute, is_folder, kind_of
from numpy_gpt.tokens.folder import Tokens, Track, open_tokens, tokens_sha256
from numpy_gpt.weights.checkpoint import Header


def absolute_folder(name: str) -> str:
    """The path of a folder, valid in any working directory. Raises InputError if run.json cannot hold it."""
    folder = str(absolute(name))
    try:
        folder.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the path {folder} is not valid Unicode: rename the folder") from error
    return folder


def find_tokens(recorded: str, header: Header, fix: str) -> str:
    """Find the tokens of a checkpoint: at their recorded path, or by name in the working directory or near it.

    Those found by name must have the recorded SHA-256. Raises InputError, ending with the fix, if there are none.
    """
    if kind_of(recorded) != "missing":
        return absolute_folder(recorded)
    for folder in (Path(), *header.file.resolve().parents[:4]):
        with suppress(InputError):  # unreadable, or no tokens: try the next folder
            place = folder / Path(recorded).name
            if is_folder(place) and header.about.get("tokens_sha256") == tokens_sha256(place):
                return absolute_folder(str(place))
    raise InputError(f"{recorded}, the tokens of {header.file}, were not found: {fix}")


def tokens_of(header: Header, encoding: str, track: Track) -> Tokens:
    """A checkpoint's training tokens, verified by their SHA-256. Raises InputError if they cannot be found or used."""
    fix = "restore them, or evaluate on a text with --text FILE"
    tokens = open_tokens(Path(find_tokens(header.about["tokens"], header, fix)), encoding, track)
    if header.about.get("tokens_sha256") != tokens.sha256:
        raise InputError(f"{tokens.folder} does not have the tokens that {header.file} was trained on: {fix}")
    if tokens.largest_id >= header.config.vocab_size:
        raise InputError(f"{tokens.folder} has token ids that {header.file} does not know: {fix}")
    return tokens

"""JSON from untrusted files, with its memory bounded before it is parsed."""

import json
import os
from pathlib import Path
from typing import Any

from numpy_gpt.errors import InputError
from numpy_gpt.io.formats import foreign
from numpy_gpt.io.paths import check_regular, refusal

SMALL = 2 << 20
"""Bytes of memory that any file's content may take, however short the file."""

VOCABULARY_TIMES = 40
"""Largest json_memory of a vocabulary over its file size: short tokens with one number each reach half of it."""


def read_json(file: Path, times: int = 2) -> dict[str, Any]:
    """Read a file's JSON object, which may take `times` the file's size in memory, or 2 MiB.

    Raises InputError if the file is missing or holds anything else, or, before parsing, if it might take more.
    """
    try:
        check_regular(file)
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            room = max(SMALL, times * size)
            values = parse_json(f.read(min(size or room, room // 4) + 1), room)
    except FileNotFoundError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}): put it there") from error
    except OSError as error:
        raise InputError(refusal(file, error)) from error
    except (ValueError, RecursionError) as error:
        words = foreign(file, "text", fix="put the right file in its place")
        why = f": {words}" if words else f" ({error}): it is damaged or another file"
        raise InputError(f"{file} cannot be used as JSON{why}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file} is not a JSON object: it is damaged or another file")
    return values


def parse_json(content: bytes, room: int) -> Any:
    """Parse JSON in UTF-8. Raises ValueError if it might take more than `room` bytes of memory."""
    if (most := json_memory(content)) > room:
        raise ValueError(f"its {len(content):,} bytes may become {most:,} in memory, more than the {room:,} allowed")
    return json.loads(content.decode("utf-8"))


def json_memory(content: bytes) -> int:
    """An upper bound on the bytes that parsing this JSON takes, from its length and punctuation.

    Each value follows a comma or a bracket and takes up to 96 bytes: a short string, or a list of one value. A key
    takes up to 192: itself, and its slots in the dict and in the parser's memo, which double as they grow. The text
    exists as bytes, as a string and inside the values; one character beyond Latin-1 widens its entire string.
    """
    wide = not content.isascii() or b"\\u" in content
    return (9 if wide else 4) * len(content) + 96 * sum(map(content.count, b",[{")) + 192 * content.count(b":")

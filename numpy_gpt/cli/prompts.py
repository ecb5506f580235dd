"""The prompts of generate: an argument, a file, standard input, or one line after another."""

import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

from numpy_gpt.cli.texts import as_typed
from numpy_gpt.console import Report
from numpy_gpt.data import decode_text, read_open, read_text
from numpy_gpt.errors import InputError

STDIN = "standard input"

LONGEST_LINE = 2**20
"""The most bytes in a line of a session."""


def one_prompt(argument: str | None, file: Path | None) -> str:
    """The prompt in the file, else the argument, for which - is all of standard input.

    The newline that ends a file or what `echo` prints is not part of the prompt. Raises InputError if it is empty.
    """
    if file is not None:
        prompt = read_text(str(file)).removesuffix("\n")
    elif argument == "-":
        raw = _from_stdin(lambda stdin: read_open(stdin, STDIN))
        prompt = decode_text(raw, STDIN).removesuffix("\n")
    else:
        prompt = as_typed(argument or "", "prompt")
    if not prompt:
        raise InputError("the prompt is empty: give at least one character to continue from")
    return prompt


def lines(report: Report, marker: str) -> Iterator[str]:
    """Each line of standard input that is not blank, without its newline, as soon as it is there.

    marker is printed before each, and ended with a newline at the end of input. Raises InputError for a line that is
    not text.
    """
    for number in count(1):
        report.piece(marker)
        raw = _from_stdin(lambda stdin: stdin.readline(LONGEST_LINE + 1))
        if not raw:
            break
        name = f"line {number} of {STDIN}"
        if len(raw) > LONGEST_LINE:
            raise InputError(f"{name} has more than {LONGEST_LINE:,} bytes: give a long prompt as --prompt-file FILE")
        line = decode_text(raw, name).removesuffix("\n")
        if line.strip():
            yield line
    if marker:
        report.line()


def _from_stdin(read: Callable[[BinaryIO], bytes]) -> bytes:
    """What this call reads from standard input. Raises InputError if it fails, or if the process has none."""
    fix = "send the prompt through a pipe, or give it as an argument"
    if sys.stdin is None:
        raise InputError(f"{STDIN} is closed: {fix}")
    try:
        return read(sys.stdin.buffer)
    except OSError as error:
        raise InputError(f"{STDIN} cannot be read ({error.strerror}): {fix}") from error

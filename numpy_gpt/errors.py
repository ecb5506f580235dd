"""The exceptions that the commands report in one line, and words for their messages."""

import shlex
import sys


class InputError(ValueError):
    """Unusable input: the message names it and the fix; the commands print the message and exit with 2.

    The message is one line: unprintable characters, which it may quote from a damaged file, are escaped.
    """

    exit_code = 2
    """Exit code of a command that raises this."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class NonFiniteError(InputError):
    """A NaN or an infinity where only finite numbers can be used."""


class DivergedError(InputError):
    """Training reached a loss, gradient or weight that is not finite; the commands exit with 3."""

    exit_code = 3


class LostProcessError(Exception):
    """Another process of a run has died; the commands print the message and exit with 4."""

    exit_code = 4


class OutputError(Exception):
    """The command's output cannot be written, and the command has no other purpose.

    reader_gone: the reader has closed the pipe, as `| head -1` does, and needs no message.
    """

    def __init__(self, message: str, reader_gone: bool):
        super().__init__(message)
        self.reader_gone = reader_gone


def brief(error: BaseException) -> str:
    """A parser's error in at most 300 characters: some quote their complete input."""
    return f"{error!s:.300}" if isinstance(error, UnicodeError) else f"{error!r:.300}"


def install(extra: str) -> str:
    """The command that installs one of pyproject.toml's extras into the running Python."""
    return f"{shlex.quote(sys.executable)} -m pip install -e '.[{extra}]'"

"""The exceptions that the commands turn into one sentence."""


class InputError(ValueError):
    """Unusable input: the message names it and the fix; the commands print that and exit with 2.

    It is one line: what it quotes may come from a damaged file, and is escaped where it could not be shown.
    """

    exit_code = 2
    """Of the command that it ends."""

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


class NonFiniteError(InputError):
    """There is a NaN or an infinity where only numbers can be used."""


class DivergedError(InputError):
    """Training has come to a loss, a gradient or weights that are not finite; the commands exit with 3."""

    exit_code = 3


class OutputError(Exception):
    """The command's output cannot be written, and it is all that the command was for.

    reader_gone: whoever read it has closed the pipe, as `| head -1` does, and needs no message.
    """

    def __init__(self, message: str, reader_gone: bool):
        super().__init__(message)
        self.reader_gone = reader_gone


def brief(error: BaseException) -> str:
    """What an error of a parser says, in at most 300 characters: some carry all that they were given."""
    return f"{error!s:.300}" if isinstance(error, UnicodeError) else f"{error!r:.300}"

"""The one exception that stands for a user's mistake rather than ours."""


class InputError(ValueError):
    """Something given cannot be used: the message names it and the mend; the commands print that and exit with 2.

    It is one line: what it quotes may come from a damaged file, and is escaped where it could not be shown.
    """

    def __init__(self, message: str):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))

"""The one exception that stands for a user's mistake rather than ours."""


class InputError(ValueError):
    """Something given cannot be used: the message names it and the mend; the commands print that and exit with 2."""

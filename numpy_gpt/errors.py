"""The one exception that stands for a user's mistake rather than ours."""


class InputError(ValueError):
    """Something that was given cannot be used. The message names the thing and the mend; the commands print it and exit with 2."""

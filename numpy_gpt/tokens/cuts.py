"""Where a text can be cut so that its parts, encoded one by one, give the tokens of the complete text.

Merges never cross the pieces into which an encoding's pattern splits a text, so a cut between two pieces is safe if
each side splits as before. GPT-2's pattern (encodings/own.py) never looks behind a piece, and only white space looks
beyond itself. No piece continues from a visible character into white space, nor from a letter into a digit or back, so
each of these is a place to cut; the left side ends in a visible character, so its white space sees what it saw before.

Added tokens are searched for first: none may span the cut, and none that absorbs the white space after it may end
there. With add_prefix_space, a text that begins with anything but a space gets one, so cuts are before spaces only.
"""

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from numpy_gpt.encodings.own import WHITE_SPACE, OwnEncoding
from numpy_gpt.encodings.vocabulary import ONE_CHARACTER, AddedToken
from numpy_gpt.errors import InputError

if TYPE_CHECKING:
    import tiktoken

CHUNK = 2**20
"""Fewest characters in a chunk, except the last."""

LONGEST = 2**21
"""Longest stretch without a place to cut that is still encoded: tiktoken needs 50 to 120 bytes a character."""

STRETCH = 2**12
"""Characters searched at a time, backwards from the end."""

ANYWHERE = r"(?s)(?<=.)(?=.)"
VISIBLE = f"[^{''.join(WHITE_SPACE)}]"
BEFORE_SPACE = rf"(?<={VISIBLE})(?= )"
BETWEEN_PIECES = rf"(?<={VISIBLE})(?=[ \n\t])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])"


class Cuts:
    """Finds the places where a text can be cut for an encoding."""

    def __init__(self, encoding: "tiktoken.Encoding"):
        self._added = [AddedToken(content, number) for content, number in encoding._special_tokens.items()]
        places = ANYWHERE if encoding._pat_str == ONE_CHARACTER else BETWEEN_PIECES
        if isinstance(encoding, OwnEncoding):
            self._added = list(encoding.added)
            places = BEFORE_SPACE if encoding.add_prefix_space else places
        self._places = re.compile(places)
        self._reach = max((len(token.content) for token in self._added), default=1)

    def last(self, text: str) -> int:
        """The last safe place to cut a text that continues: the length of the part before it, or 0 if it has none."""
        stop = len(text) - self._reach + 1  # an added token at the cut must be visible in full
        while stop > 1:
            start = max(0, stop - STRETCH)
            places = [start + found.start() for found in self._places.finditer(text[start:stop])]
            if safe := next((place for place in reversed(places) if self._is_safe(text, place)), 0):
                return safe
            stop = start + 1  # a place is between two characters
        return 0

    def _is_safe(self, text: str, place: int) -> bool:
        """Whether added tokens, too, are found as in the uncut text."""
        for token in self._added:
            n = len(token.content)
            spans = token.content in text[max(0, place - n + 1) : place + n - 1]
            if spans or (token.rstrip and text.endswith(token.content, 0, place)):
                return False
        return True


def chunks(blocks: Iterable[str], cuts: Cuts) -> Iterator[str]:
    """The text of the blocks in chunks of CHUNK characters or more, cut only where that is safe.

    Raises InputError if the text has more than LONGEST characters without such a place.
    """
    text = ""
    for block in blocks:
        text += block
        if len(text) < CHUNK:
            continue
        if place := cuts.last(text):
            yield text[:place]
            text = text[place:]
        elif len(text) > LONGEST:
            raise InputError(
                f"the text has more than {LONGEST:,} characters without a space or another place where it can be cut, "
                f"from {text[:40]!r} on: break it up, or choose the encoding bytes"
            )
    if text:
        yield text

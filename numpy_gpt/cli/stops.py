"""The end of a streamed text at a stop text, which may span pieces."""

from collections.abc import Iterable, Iterator


def before_stop(pieces: Iterable[str], stops: tuple[str, ...]) -> Iterator[str]:
    """Yield the text of the pieces up to the first occurrence of any stop text, each part as soon as it is certain.

    Only a tail that could begin a stop text is held back. No piece is taken after the one that completes it.
    """
    held = ""
    for piece in pieces:
        held += piece
        # the first place where a stop text is, or may be once more pieces have come
        places = (i for i in range(len(held)) if any(stop.startswith(held[i : i + len(stop)]) for stop in stops))
        start = next(places, len(held))
        yield held[:start]
        held = held[start:]
        if held.startswith(stops):
            return
    yield held[: next((i for i in range(len(held)) if held.startswith(stops, i)), None)]

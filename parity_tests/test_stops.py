"""--stop: streamed in any pieces, the text ends where it would if the complete text were cut."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_gpt.cli.stops import before_stop

TEXTS = st.text("ab\n", max_size=12)
STOPS = st.text("ab\n", min_size=1, max_size=4)


def cut(text, stops):
    """The text before the first occurrence of any stop text."""
    return text[: min((len(text.partition(stop)[0]) for stop in stops), default=None)]


def could_begin(text, stops):
    return any(stop.startswith(text) for stop in stops)


@settings(max_examples=300)
@given(pieces=st.lists(st.text("ab\n", max_size=4), max_size=8), stops=st.lists(STOPS, max_size=3))
@example(["a", "b"], ["ab"])
@example(["aab", "b"], ["abb"])
@example(["ab"], ["abb", "b"])  # one occurrence within the beginning of another that never comes
@example(["ab", "b"], ["abb", "b"])  # and that comes
@example(["a", "", "a"], ["aa"])
@example(["", ""], ["a"])
def test_streamed_text_ends_where_the_complete_text_is_cut(pieces, stops):
    text, taken = "".join(pieces), []

    def taking():
        for piece in pieces:
            taken.append(piece)
            yield piece

    shown, want = "", cut(text, stops)
    for part in before_stop(taking(), tuple(stops)):
        shown += part
        assert want.startswith(shown)
        rest = "".join(taken)[len(shown) :]
        if len(taken) < len(pieces) and want != shown:
            assert not rest or could_begin(rest, stops), f"{rest!r} is held back"
    assert shown == want


@given(pieces=st.lists(st.text("ab", min_size=1, max_size=3), max_size=8), stop=st.text("ab", min_size=1, max_size=4))
def test_no_piece_is_taken_after_the_stop_text(pieces, stop):
    """It would be computed in vain, and would draw from the stream of the next sample."""
    taken = []
    for _ in before_stop((taken.append(piece) or piece for piece in pieces), (stop,)):
        pass
    assert stop not in "".join(taken[:-1])


@pytest.mark.parametrize("text", ["", "abc", "a\ufffd\n"])
def test_without_stop_texts_every_piece_passes_at_once(text):
    assert [part for part in before_stop(iter(text), ()) if part] == list(text)

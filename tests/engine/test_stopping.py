from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from lorax_core.engine.stopping import StopText

# Few letters, so that beginnings of stop strings are everywhere.
PIECES = st.lists(st.text("ab", max_size=4), max_size=8)
STRINGS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


def fed(pieces, strings):
    """Everything that was shown, and after which piece a stop string was met (None: never)."""
    stop, shown = StopText(strings), ""
    for at, piece in enumerate(pieces):
        text, met = stop.feed(piece)
        shown += text
        if met:
            return shown, at
    return shown + stop.flush(), None


def expected(pieces, strings):
    """The oracle looks at the whole text after each piece."""
    for at in range(len(pieces)):
        whole = "".join(pieces[: at + 1])
        places = [whole.find(string) for string in strings if string in whole]
        if places:
            return whole[: min(places)], at
    return "".join(pieces), None


@given(PIECES, STRINGS)
@example(["a", "a", "b"], ("ab",))
@example(["aab", "b"], ("aabb", "b"))
def test_text_ends_before_the_first_stop_string_wherever_pieces_are_cut(pieces, strings):
    assert fed(pieces, strings) == expected(pieces, strings)


@given(PIECES, STRINGS)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(pieces, strings):
    stop, shown, whole = StopText(strings), "", ""
    for piece in pieces:
        text, met = stop.feed(piece)
        shown, whole = shown + text, whole + piece
        if met:
            return
        held = whole[len(shown) :]
        assert whole.startswith(shown)
        assert not held or any(string.startswith(held) and string != held for string in strings)


def test_a_stop_string_across_pieces_never_shows():
    stop = StopText(("</end>",))

    shown = [stop.feed(piece) for piece in ["see </", "en", "d> more"]]

    assert shown == [("see ", None), ("", None), ("", "</end>")]


def test_text_held_back_for_nothing_comes_out():
    stop = StopText(("</end>",))

    assert stop.feed("see </en") == ("see ", None)
    assert stop.feed("try") == ("</entry", None)
    assert stop.flush() == ""


def test_text_held_back_at_the_end_is_flushed():
    stop = StopText(("</end>",))
    stop.feed("see </en")

    assert stop.flush() == "</en"


def test_of_overlapping_stop_strings_the_first_place_counts():
    assert fed(["one two three"], ("three", "two", "wo")) == ("one ", 0)


def test_without_stop_strings_everything_passes():
    stop = StopText(())

    assert stop.feed("anything") == ("anything", None)


def test_text_before_the_least_number_of_tokens_passes_unsearched():
    stop = StopText(("ab",))

    assert stop.feed("xaba", armed=False) == ("xaba", None)
    assert stop.feed("b") == ("b", None)
    assert stop.feed("ab") == ("", "ab")

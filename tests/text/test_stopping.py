"""StopMatcher against the obvious implementation, which sees the whole text."""

from hypothesis import example, given
from hypothesis import strategies as st

from loraplex.text.stopping import StopMatcher

TEXT = st.text("ab\n😀", max_size=30)
STOPS = st.lists(st.text("ab\n😀", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """Character by character: the first stop string to be complete ends the text; of several the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in zip(borders, borders[1:], strict=False)]


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 30), max_size=10))
@example("abab", ["abaa", "ba"], False, [1, 2, 3])
@example("aab", ["aabb", "ab", "b"], True, [])
def test_any_cut_gives_what_the_whole_gives(text, stops, include_stop, places):
    matcher = StopMatcher(stops, include_stop=include_stop)
    wanted, stop = expected(text, stops, include_stop)
    shown = ""
    for piece in cut(text, places):
        shown += matcher.push(piece)
        assert wanted.startswith(shown)  # what was shown is never taken back
    assert shown + matcher.flush() == wanted
    assert matcher.matched == stop


@given(TEXT, STOPS)
def test_nothing_is_held_back_without_need(text, stops):
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.push, text))
    if matcher.matched is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_unarmed_it_shows_everything_at_once():
    matcher = StopMatcher(["stop"])
    assert matcher.push("a stop", is_armed=False) == "a stop"
    assert matcher.matched is None
    assert matcher.push(" and st") == " and "
    assert matcher.push("op it") == ""
    assert matcher.matched == "stop"
    assert matcher.push("more") == matcher.flush() == ""


def test_empty_stop_strings_are_none():
    assert StopMatcher(["", ""]).push("text") == "text"

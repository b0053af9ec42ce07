"""StopMatcher: finds stop strings in text that arrives in pieces, and holds back what might begin one."""

from collections.abc import Sequence

MAX_STOPS = 4
MAX_STOP_CHARS = 256


class StopMatcher:
    """`push` returns text that is safe to show: it can never turn out to be part of a stop string."""

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False):
        self._stops = [stop for stop in stops if stop]
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, is_armed: bool = True) -> str:
        """Take in `text`; returns what may be shown. After a match, `matched` is the stop string and nothing more
        comes. `is_armed` False (min_tokens not reached): show everything, look for nothing."""
        if self.matched is not None:
            return ""
        text = self._held + text
        self._held = ""
        if not is_armed or not self._stops:
            return text
        # The first to be complete wins, and of those that end together the longest: so it makes no difference in which
        # pieces the text came.
        hits = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            end, at, self.matched = min(hits)
            return text[: end if self._include_stop else at]
        keep = max(_overlap(text, stop) for stop in self._stops)
        if keep:
            self._held = text[-keep:]
            return text[:-keep]
        return text

    def flush(self) -> str:
        """The end came without a stop string: what was held back."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""MergePolicy: when `--merge auto` builds an adapter's merged weights and when it drops them. Steps in, wishes out.

A set is worth its memory while steps are wholly one adapter's. It is built after a run of such steps and dropped after
many more without one, and each drop doubles the run that the same adapter needs next time: two adapters that take turns
do not have sets built in a see-saw.
"""

from collections import Counter
from dataclasses import dataclass

BUILD_AFTER = 64
"""Steps in a row that were one adapter's own."""

DROP_AFTER = 1024
"""Steps in a row that ran something else."""

MAX_DOUBLINGS = 6


@dataclass(frozen=True, slots=True)
class Wish:
    """Adapters, by digest."""

    build: str | None = None
    drop: str | None = None


class MergePolicy:
    def __init__(self, build_after: int = BUILD_AFTER, drop_after: int = DROP_AFTER):
        self._build_after = build_after
        self._drop_after = drop_after
        self._alone: str | None = None  # whose the last steps were, and how many
        self._run = 0
        self._chosen: str | None = None  # whose set was asked for
        self._idle = 0  # steps since one of its own
        self._drops: Counter[str] = Counter()

    def observe(self, sole: str | None) -> Wish:
        """Take in one step: the adapter whose every row was, or None."""
        self._run = self._run + 1 if sole == self._alone else 1
        self._alone = sole
        self._idle = 0 if sole == self._chosen else self._idle + 1
        drop = None
        if self._chosen is not None and self._idle >= self._drop_after:
            drop, self._chosen = self._chosen, None
            self._drops[drop] += 1
        if self._chosen is None and sole is not None and self._run >= self._needed(sole):
            self._chosen, self._idle = sole, 0
            return Wish(build=sole, drop=drop)
        return Wish(drop=drop)

    def forget(self, digest: str) -> None:
        """Its set is gone or cannot be made."""
        if self._chosen == digest:
            self._chosen = None
            self._drops[digest] += 1
        if self._alone == digest:
            self._run = 0

    def _needed(self, digest: str) -> int:
        return self._build_after << min(self._drops[digest], MAX_DOUBLINGS)

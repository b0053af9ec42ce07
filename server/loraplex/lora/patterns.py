"""Patterns of an adapter's config against module names, as PEFT matches them, within a time limit.

PEFT interpolates what the config says into regular expressions of `re`. A hostile expression can backtrack
for years, and `re` holds the interpreter lock all the while. So expressions are checked with `re` (what PEFT
would refuse is refused) and run by `regex`, which agrees with it, lets other threads run and can be stopped.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import regex

from loraplex.errors import AdapterInvalid
from loraplex.lora.text import shown

# Far above what training tools write (Unsloth's longest is some 500 characters).
MAX_EXPRESSION_CHARS = 16 * 1024
# Entries that are plain module names (EVA writes one per module) are looked up and not counted here.
MAX_EXPRESSIONS = 256
# `regex` unrolls {n}: nested counts multiply, and compiling cannot be stopped.
MAX_REPEAT_PRODUCT = 10_000
# All expressions of one adapter on all modules of one base; a real adapter takes milliseconds.
MATCH_SECONDS = 2.0

Value = TypeVar("Value")

_PLAIN = re.compile(r"[A-Za-z0-9_.]+")
_BRACES = re.compile(r"\{[^{}]*\}?")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class MatchClock:
    """Runs expressions until `seconds` are used up, then raises AdapterInvalid."""

    def __init__(self, seconds: float = MATCH_SECONDS):
        self._deadline = time.monotonic() + seconds

    def match(self, pattern: Any, name: str, *, whole: bool = False) -> Any:
        """The match of a compiled `pattern` at the start of `name` (or with all of it), or None."""
        try:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            match = pattern.fullmatch if whole else pattern.match
            return match(name, timeout=left, concurrent=True)
        except TimeoutError:
            raise AdapterInvalid(
                f"The regular expression {shown(pattern.pattern)} in adapter_config.json takes too long "
                f"(the limit for all of them is {MATCH_SECONDS:g} s). Write the module names as a list.",
                param="config",
            ) from None
        except MemoryError:
            raise AdapterInvalid(
                f"The regular expression {shown(pattern.pattern)} in adapter_config.json needs too much "
                "memory. Write the module names as a list.",
                param="config",
            ) from None


def compile_expression(text: str, field: str) -> Any:
    """Compile `text`, which the config's `field` gave. Raises AdapterInvalid if it cannot be run."""
    if len(text) > MAX_EXPRESSION_CHARS:
        raise AdapterInvalid(
            f"{field} in adapter_config.json holds a regular expression of {len(text)} characters; the "
            f"limit is {MAX_EXPRESSION_CHARS}. Write the module names as a list.",
            param="config",
        )
    try:
        # [[:alpha:]] and {e<=1} are plain text to `re` but not to `regex`
        if "[[:" in text or not _counts_are_small(text):
            raise ValueError("it repeats too often or uses [[:…:]] or {…} other than as a count")
        re.compile(text)
        return regex.compile(text)
    except (re.error, regex.error, RecursionError, OverflowError, ValueError, FutureWarning) as cause:
        raise AdapterInvalid(
            f"{field} in adapter_config.json holds {shown(text)}, which is not a usable regular expression: "
            f"{shown(str(cause))}. Correct it, or write the module names as a list.",
            param="config",
        ) from None


def _counts_are_small(text: str) -> bool:
    counts: list[int] = []
    for braces in _BRACES.findall(text):
        count = _COUNT.fullmatch(braces)
        if count is None or max(map(len, count.groups(""))) > 9:
            return False
        counts.append(max(int(number or 1) for number in count.groups("")))
    return math.prod(max(count, 1) for count in counts) <= MAX_REPEAT_PRODUCT


class PatternTable(Generic[Value]):
    """PEFT's `rank_pattern` and `alpha_pattern`: the first key (in file order) that matches a tail wins.

    A key matches like the expression `(.*\\.)?(key)$`. Keys without any sign but "." are looked up by length
    and place of their dots ("." stands for any sign), which is the same and does not grow with the number of
    keys.
    """

    def __init__(self, table: Mapping[str, Value], field: str, clock: MatchClock):
        self._keys, self._values = list(table), list(table.values())
        self._clock = clock
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        self._expressions: list[tuple[int, Any]] = []
        for index, key in enumerate(table):
            if _PLAIN.fullmatch(key):
                dots = tuple(at for at, sign in enumerate(key) if sign == ".")
                self._plain.setdefault((len(key), *dots), {}).setdefault(key, index)
            else:
                if len(self._expressions) == MAX_EXPRESSIONS:
                    raise AdapterInvalid(
                        f"{field} in adapter_config.json holds more than {MAX_EXPRESSIONS} regular "
                        "expressions. Write full module names instead.",
                        param="config",
                    )
                self._expressions.append((index, compile_expression(rf"(.*\.)?({key})$", field)))

    def get(self, name: str, default: Value | None) -> Value | None:
        """The value for the module `name`."""
        found = min(self._plain_matches(name), default=len(self._values))
        for index, pattern in self._expressions:
            if index > found:
                break
            if self._clock.match(pattern, name):
                found = index
                break
        return self._values[found] if found < len(self._values) else default

    def ambiguous(self, name: str) -> list[str]:
        """The plain keys that match `name` when their values differ."""
        matches = sorted(self._plain_matches(name))
        return [self._keys[index] for index in matches] if len({self._values[index] for index in matches}) > 1 else []

    def _plain_matches(self, name: str) -> Iterator[int]:
        for (length, *dots), indices in self._plain.items():
            before = len(name) - length - 1
            if before < -1 or (before >= 0 and name[before] != "."):
                continue
            tail = list(name[before + 1 :])
            for dot in dots:
                tail[dot] = "."
            if (index := indices.get("".join(tail))) is not None:
                yield index

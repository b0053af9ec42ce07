"""Check: what an answer has to be. One of

{"exact": "yes"}              the answer, without white space around it, is this text (without its own)
{"contains": "yes"}           the text is in the answer; a list: all of them are
{"regex": "[0-9]+ rows"}      the expression matches somewhere in the answer, within 50 ms
{"json_schema": {…}}          the answer is JSON, with nothing but white space around it, and fits the schema
"""

import json
from collections.abc import Mapping
from typing import Any

import regex

from loraplex.errors import InvalidRequest
from loraplex.evaluation.schema_check import SchemaCheck

KINDS = ("exact", "contains", "regex", "json_schema")
REGEX_SECONDS = 0.05
MAX_CONTAINED = 32


class Check:
    """Raises InvalidRequest, whose message begins where its words are about. Not for several threads."""

    def __init__(self, document: Any):
        if not isinstance(document, Mapping) or len(document) != 1 or next(iter(document)) not in KINDS:
            raise InvalidRequest(f"'check' needs exactly one of {', '.join(map(repr, KINDS))}")
        self.kind, self._wanted = next(iter(document.items()))
        self._compiled = getattr(self, f"_compile_{self.kind}")()

    def problem(self, answer: str) -> str | None:
        """Why `answer` does not pass; None: it does."""
        return getattr(self, f"_problem_{self.kind}")(answer)

    def _compile_exact(self) -> str:
        if not isinstance(self._wanted, str):
            raise InvalidRequest("check.exact: it needs a text")
        return self._wanted.strip()

    def _problem_exact(self, answer: str) -> str | None:
        return None if answer.strip() == self._compiled else "it is another text"

    def _compile_contains(self) -> list[str]:
        wanted = self._wanted if isinstance(self._wanted, list) else [self._wanted]
        if not 1 <= len(wanted) <= MAX_CONTAINED:
            raise InvalidRequest(f"check.contains: it takes 1 to {MAX_CONTAINED} texts")
        return list(map(self._text, wanted))

    def _problem_contains(self, answer: str) -> str | None:
        missing = next((text for text in self._compiled if text not in answer), None)
        return None if missing is None else f"it does not contain {missing[:80]!r}"

    def _compile_regex(self) -> Any:
        try:
            return regex.compile(self._text(self._wanted))
        except (regex.error, RecursionError, OverflowError) as error:
            raise InvalidRequest(f"check.regex: it does not compile ({str(error)[:80]})") from error

    def _problem_regex(self, answer: str) -> str | None:
        try:
            found = self._compiled.search(answer, timeout=REGEX_SECONDS)
        except TimeoutError:
            return f"matching it took longer than {REGEX_SECONDS:g} s"
        return "the expression does not match" if found is None else None

    def _compile_json_schema(self) -> SchemaCheck:
        try:
            return SchemaCheck(self._wanted)
        except InvalidRequest as error:
            raise InvalidRequest(f"check.json_schema: {error.message}") from error

    def _problem_json_schema(self, answer: str) -> str | None:
        try:
            value = json.loads(answer, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            return f"it is not JSON: {str(error)[:120]}"
        return self._compiled.problem(value)

    def _text(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise InvalidRequest(f"check.{self.kind}: it needs a text that is not empty")
        return value


def _no_constant(name: str) -> None:
    """Python reads NaN and Infinity, JSON has none."""
    raise ValueError(f"{name} is no JSON")

"""EvaluationSet: JSON objects, one a line: a prompt or messages, and the check of the answer.

    {"prompt": "2+2=", "check": {"exact": "4"}, "max_tokens": 4}
    {"messages": [{"role": "user", "content": "List the users."}], "check": {"contains": ["SELECT", "users"]}}

Empty lines are nothing. `name` is for the reader of the report.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraplex.errors import InvalidRequest
from loraplex.evaluation.check import Check

MAX_BYTES = 1 << 20
MAX_CASES = 1000
MAX_LINE_BYTES = 64 << 10
MAX_MESSAGES = 64
MAX_TOKENS = 4096
_FIELDS = ("prompt", "messages", "check", "max_tokens", "name")


@dataclass(frozen=True, slots=True)
class Case:
    """One of `prompt` and `messages` is None. `line` counts from 1."""

    line: int
    prompt: str | None
    messages: tuple[Mapping[str, str], ...] | None
    check: Check
    max_tokens: int | None = None
    name: str | None = None

    @property
    def asked(self) -> str:
        """The prompt, or the last message."""
        return self.prompt if self.prompt is not None else (self.messages or ({},))[-1].get("content", "")


def read_set(data: bytes) -> Sequence[Case]:
    """The cases of a set. Raises InvalidRequest that names the line."""
    if len(data) > MAX_BYTES:
        raise _refused(f"it has {len(data)} bytes, and at most {MAX_BYTES} are taken")
    cases = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        if len(cases) >= MAX_CASES:
            raise _refused(f"it has more than {MAX_CASES} cases")
        try:
            cases.append(_case(number, line))
        except InvalidRequest as error:
            raise _refused(f"line {number}: {error.message}") from error
    if not cases:
        raise _refused("it has no case")
    return cases


def _case(number: int, line: bytes) -> Case:
    if len(line) > MAX_LINE_BYTES:
        raise InvalidRequest(f"it has {len(line)} bytes, and at most {MAX_LINE_BYTES} are taken")
    try:
        document = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"it is not JSON: {str(error)[:120]}") from error
    if not isinstance(document, dict):
        raise InvalidRequest("it is not a JSON object")
    unknown = [name for name in document if name not in _FIELDS]
    if unknown:
        raise InvalidRequest(f"it has a field that is not known, {unknown[0][:40]!r}; known are {', '.join(_FIELDS)}")
    prompt, messages, name = document.get("prompt"), document.get("messages"), document.get("name")
    if (prompt is None) == (messages is None):
        raise InvalidRequest("it needs either a 'prompt' or 'messages'")
    if prompt is not None and not _is_text(prompt):
        raise InvalidRequest("'prompt' needs a text that is not empty")
    if name is not None and not (_is_text(name) and len(name) <= 128):
        raise InvalidRequest("'name' needs a text of 1 to 128 characters")
    max_tokens = document.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or not 1 <= max_tokens <= MAX_TOKENS):
        raise InvalidRequest(f"'max_tokens' needs a whole number from 1 to {MAX_TOKENS}")
    found = None if messages is None else _messages(messages)
    return Case(number, prompt, found, Check(document.get("check")), max_tokens, name)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise InvalidRequest(f"'messages' needs a list of 1 to {MAX_MESSAGES} messages")
    for one in value:
        is_message = isinstance(one, dict) and set(one) == {"role", "content"}
        if not is_message or not _is_text(one["role"]) or not isinstance(one["content"], str) or not _is_unicode(one):
            raise InvalidRequest("a message has a 'role' and a 'content', both texts, and nothing else")
    return tuple(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and _is_unicode({"": value})


def _is_unicode(texts: Mapping[str, str]) -> bool:
    """Whether they hold no half characters."""
    return not any(0xD800 <= ord(char) <= 0xDFFF for text in texts.values() for char in text)


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"The evaluation set cannot be used: {why}. A line is "
        '{"prompt": "2+2=", "check": {"exact": "4"}}; GET …/evaluation/lines shows a stored one.',
        param="body",
        code="invalid_evaluation",
    )

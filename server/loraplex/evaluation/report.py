"""Tally: how the answers of one target pass, and what of them goes into the report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraplex.evaluation.evaluation_set import Case

MAX_FAILURES = 20
"""Of a target that the report shows."""
MAX_PROMPT_CHARS = 300
MAX_ANSWER_CHARS = 600


@dataclass(slots=True)
class Tally:
    """`errors`: of the failed ones those that got no answer."""

    model: str
    identity: str
    passed: int = 0
    failed: int = 0
    errors: int = 0
    failures: list[tuple[Case, str | None, str]] = field(default_factory=list)

    def add(self, case: Case, answer: str | None, problem: str | None) -> None:
        """`problem` None: the answer passes. `answer` None: there was none."""
        if problem is None:
            self.passed += 1
            return
        self.failed += 1
        self.errors += answer is None
        self.failures.append((case, answer, problem))

    @property
    def total(self) -> int:
        return self.passed + self.failed

    def to_json(self) -> dict[str, Any]:
        """With the first failures, in the order of the lines."""
        shown = sorted(self.failures, key=lambda one: one[0].line)[:MAX_FAILURES]
        return {
            "model": self.model,
            "passed": self.passed,
            "total": self.total,
            "pass_rate": round(self.passed / self.total, 6) if self.total else None,
            "errors": self.errors,
            "failures": [_failure(*one) for one in shown],
            "failures_left_out": len(self.failures) - len(shown),
        }


def _failure(case: Case, answer: str | None, problem: str) -> Mapping[str, Any]:
    return {
        "line": case.line,
        "name": case.name,
        "check": case.check.kind,
        "prompt": _cut(case.asked, MAX_PROMPT_CHARS),
        "answer": None if answer is None else _cut(answer, MAX_ANSWER_CHARS),
        "why": problem[:400],
    }


def _cut(text: str, limit: int) -> str:
    """PostgreSQL's JSON has no character 0."""
    text = text.replace("\0", "\ufffd")
    return text if len(text) <= limit else text[: limit - 1] + "…"

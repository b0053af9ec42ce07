"""Gating: which targets may get more of a route's requests, by what they reached in its evaluation set.

The question and the change of the route are one transaction: whoever changes the set meanwhile waits.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Connection

from loraplex.errors import LoraplexError, RouteRefused
from loraplex.lora.evaluation_book import EvaluationBook, Result
from loraplex.lora.route_revisions import Document, Within
from loraplex.routing.document import route_of
from loraplex.routing.route import Gate
from loraplex.serving.resolution import Names, Resolved

_ROUNDING = 1e-9


class Gating:
    """`fingerprint`: of the base. Its methods block."""

    def __init__(self, book: EvaluationBook, names: Names, fingerprint: str):
        self._book = book
        self._names = names
        self._fingerprint = fingerprint

    def identity_of(self, resolved: Resolved) -> str:
        """What must not change if a result is to hold: the files of all adapters and their scales, whose template and
        profile it is, and the base."""
        adapter = None if resolved.adapter is None else resolved.adapter.digest
        uses = [[use.version.digest, use.scale] for use in resolved.uses]
        return hashlib.sha256(json.dumps([self._fingerprint, adapter, uses]).encode()).hexdigest()

    def identity(self, model: str) -> str | None:
        """None: it cannot be served now."""
        try:
            return self.identity_of(self._names.resolve(model))
        except LoraplexError:
            return None

    def results(self, alias: str, models: Sequence[str]) -> Mapping[str, Result | None]:
        """Of each model, in the set that holds."""
        found = self._book.results(alias)
        return {model: found.get(self.identity(model) or "") for model in models}

    def gate(self, alias: str, models: Sequence[str], clock: Callable[[], float]) -> Within:
        """Raises RouteRefused when a change lets one of `models` grow that has not passed; where a gate holds before
        and after it."""
        identities = {model: self.identity(model) for model in models}

        def within(connection: Connection, was: Document | None, now: Document | None) -> None:
            if was is None or now is None:
                return
            at = clock()
            before, after = route_of(alias, was, at), route_of(alias, now, at)
            if before.gate is None or after.gate is None:
                return
            results = self._book.results(alias, connection)
            for model, identity in identities.items():
                if after.peak(model, at) > before.peak(model, at) + _ROUNDING:
                    why = "cannot be served now"
                    if identity is not None:
                        why = why_closed(after.gate, results.get(identity))
                    if why is not None:
                        raise _refused(alias, model, why)

        return within

    def forgetting(self, alias: str, who: str) -> Within:
        """With the route its evaluation set goes."""
        return lambda connection, was, now: self._book.drop(connection, alias, who)


def why_closed(gate: Gate, result: Result | None) -> str | None:
    """None: it is open to a target with that result."""
    if result is None:
        return "has not been run on the evaluation set as it is now"
    if result.rate < gate.min_pass:
        return f"passed {result.passed} of {result.total} cases ({result.rate:.4g}), and {gate.min_pass:g} is asked for"
    return None


def _refused(alias: str, model: str, why: str) -> RouteRefused:
    return RouteRefused(
        f"The gate of the route {alias!r} is closed to {model!r}: it {why}. Run the set on it ('loraplex route eval "
        f"run {alias} --target {model}', or POST /v1/routes/{alias}/evaluation/runs), then try again; GET "
        f"/v1/routes/{alias}/evaluation shows what each target has reached.",
        param="target",
    )

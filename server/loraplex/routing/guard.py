"""When a target of a route has failed, beside the route's baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex.routing.observed import Observed, quantile
from loraplex.routing.route import Guard, Route


@dataclass(frozen=True, slots=True)
class Verdict:
    """`kind`: non_finite, error_rate or latency; `detail`: the numbers, as JSON."""

    target: str
    kind: str
    detail: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "kind": self.kind, **self.detail}


def judge(route: Route, seen: Mapping[str, Observed]) -> Verdict | None:
    """The first target that is to be taken out. `seen`: of the targets by model, over the guard's window."""
    guard = route.guard
    if guard is None:
        return None
    baseline = seen.get(guard.baseline) or Observed()
    for model, one in seen.items():
        if model != guard.baseline and (verdict := _judge(guard, model, one, baseline)) is not None:
            return verdict
    return None


def _judge(guard: Guard, model: str, one: Observed, baseline: Observed) -> Verdict | None:
    beside = {"baseline": guard.baseline, "requests": one.ended, "baseline_requests": baseline.ended}
    if one.non_finite > guard.max_non_finite:
        return Verdict(model, "non_finite", {"count": one.non_finite, "limit": guard.max_non_finite, **beside})
    if one.ended < guard.min_requests:
        return None
    limit = baseline.error_rate + guard.max_error_rate
    if one.error_rate > limit:
        found = {"rate": round(one.error_rate, 4), "limit": round(limit, 4)}
        return Verdict(model, "error_rate", {**found, **beside})
    if guard.max_latency_ratio is None or baseline.ended < guard.min_requests:
        return None
    for name in ("ttft", "between"):
        mine, theirs = quantile(getattr(one, name), 0.95), quantile(getattr(baseline, name), 0.95)
        if mine is not None and theirs is not None and mine > theirs * guard.max_latency_ratio:
            p95 = {"p95": round(mine, 6), "baseline_p95": round(theirs, 6), "max_ratio": guard.max_latency_ratio}
            of = "time to first token" if name == "ttft" else "time between tokens"
            return Verdict(model, "latency", {"of": of, **p95, **beside})
    return None

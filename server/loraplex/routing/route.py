"""Route: an alias that is a policy: which models answer it, in which shares, and what happens when one does not.

Values only. How a request finds its target is `router`'s, the JSON is `document`'s, when a target has failed `guard`'s.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

import regex

from loraplex.errors import InvalidRequest
from loraplex.routing.composition import parse_composition
from loraplex.routing.names import validate_name

MAX_TARGETS, MAX_RULES, MAX_FALLBACK, MAX_SHADOWS, MAX_STEPS = 64, 64, 8, 4, 32
MAX_WEIGHT = 1e9
STICKY = ("none", "user", "api_key")
"""What requests can stick by, besides `header:NAME`."""


class Match(StrEnum):
    EXACT = "exact"
    PREFIX = "prefix"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Target:
    """`model`: as in a request, but no route. `weight`: its share is weight over the sum; 0: only rules lead here.
    `max_running`: requests at once in one process; above it the fallback answers."""

    model: str
    weight: float = 1.0
    max_running: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A request whose header (`source` "header") or metadata entry `key` matches goes to the target named `target`."""

    source: str
    key: str
    match: Match
    value: str
    target: str


@dataclass(frozen=True, slots=True)
class Shadow:
    """`share` (0 to 1] of the route's requests is put to `model`, too; nobody sees the answer."""

    model: str
    share: float = 1.0
    log: bool = False


@dataclass(frozen=True, slots=True)
class Ramp:
    """The target's share over time: `steps` in per cent, each for `every` seconds, the last one for good. The others
    have the rest, by their weights. `started_at`: seconds since the epoch."""

    target: str
    steps: tuple[float, ...]
    every: float
    started_at: float

    def step(self, now: float) -> int:
        """Which of `steps` holds at `now`. A clock that was set back begins with the first."""
        return min(max(int((now - self.started_at) // self.every), 0), len(self.steps) - 1)


@dataclass(frozen=True, slots=True)
class Guard:
    """When a target is taken out by the server itself, compared with the target `baseline`.

    max_error_rate      errors per ended request, above the baseline's own rate
    max_non_finite      requests that ended with NaN
    max_latency_ratio   p95 to the first token, or between tokens, over the baseline's; None: latency is not judged
    min_requests        fewer ended ones say nothing of rates and latency
    window              seconds looked back at, never beyond the last change of the route
    """

    baseline: str
    max_error_rate: float = 0.05
    max_non_finite: int = 0
    max_latency_ratio: float | None = None
    min_requests: int = 20
    window: float = 300.0


@dataclass(frozen=True, slots=True)
class Gate:
    """What a target must have reached in the route's evaluation set before it gets a larger share. `min_pass`: of the
    set's cases."""

    min_pass: float = 1.0


@dataclass(frozen=True, slots=True)
class Route:
    """Raises InvalidRequest when its parts do not fit together.

    sticky_by   "user", "api_key", "header:NAME": requests with the same one get the same target; "none"
    rules       the first that matches decides, whatever the weights
    fallback    models that answer, in this order, when the target is missing, quarantined or over its limit
    """

    alias: str
    targets: tuple[Target, ...]
    sticky_by: str = "none"
    rules: tuple[Rule, ...] = ()
    fallback: tuple[str, ...] = ()
    shadow: tuple[Shadow, ...] = ()
    ramp: Ramp | None = None
    guard: Guard | None = None
    gate: Gate | None = None
    index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", {target.model: at for at, target in enumerate(self.targets)})
        validate_name(self.alias)
        self._check_targets()
        self._check_rules()
        for name, models, most in (
            ("fallback", self.fallback, MAX_FALLBACK),
            ("shadow", [shadow.model for shadow in self.shadow], MAX_SHADOWS),
        ):
            _require(len(models) <= most, name, f"takes at most {most} models, not {len(models)}")
            _require(len(set(models)) == len(models), name, "names a model twice")
        for shadow in self.shadow:
            _require(0 < shadow.share <= 1, "shadow", "has a share that is not above 0 and at most 1")
        for model in self.models:
            parse_composition(model)
        self._check_ramp()
        self._check_guard()
        _require(self.gate is None or 0 <= self.gate.min_pass <= 1, "gate", "has a min_pass outside 0 to 1")

    def _check_targets(self) -> None:
        _require(1 <= len(self.targets) <= MAX_TARGETS, "targets", f"needs 1 to {MAX_TARGETS} models")
        _require(len(self.index) == len(self.targets), "targets", "names a model twice")
        for target in self.targets:
            _require(0 <= target.weight <= MAX_WEIGHT, "targets", f"has a weight outside 0 to {MAX_WEIGHT:g}")
            _require(target.max_running is None or target.max_running >= 0, "targets", "has a negative max_running")
        _require(any(target.weight for target in self.targets), "targets", "has no weight above 0")
        _require(
            self.sticky_by in STICKY or (self.sticky_by.startswith("header:") and len(self.sticky_by) > 7),
            "sticky_by",
            "is none of 'none', 'user', 'api_key', 'header:NAME'",
        )

    def _check_rules(self) -> None:
        _require(len(self.rules) <= MAX_RULES, "rules", f"takes at most {MAX_RULES}, not {len(self.rules)}")
        for rule in self.rules:
            self._require_target("rules", rule.target)
            if rule.match is Match.REGEX:
                try:
                    regex.compile(rule.value)
                except (regex.error, RecursionError, OverflowError) as cause:
                    _require(False, "rules", f"has an expression that does not compile ({str(cause)[:80]})")

    def _check_ramp(self) -> None:
        ramp = self.ramp
        if ramp is None:
            return
        self._require_target("ramp", ramp.target)
        _require(1 <= len(ramp.steps) <= MAX_STEPS, "ramp", f"needs 1 to {MAX_STEPS} steps")
        _require(all(0 <= step <= 100 for step in ramp.steps), "ramp", "has a step outside 0 to 100 per cent")
        _require(0 < ramp.every <= 31_536_000, "ramp", "needs `every`: seconds for each step, at most a year")
        rest = sum(target.weight for target in self.targets if target.model != ramp.target)
        _require(rest > 0, "ramp", "needs another target with a weight, which has the rest")

    def _check_guard(self) -> None:
        guard = self.guard
        if guard is None:
            return
        self._require_target("guard", guard.baseline)
        _require(0 <= guard.max_error_rate <= 1, "guard", "has a max_error_rate outside 0 to 1")
        _require(guard.max_non_finite >= 0, "guard", "has a negative max_non_finite")
        ratio = guard.max_latency_ratio
        _require(ratio is None or 1 <= ratio <= 1000, "guard", "has a max_latency_ratio outside 1 to 1000")
        _require(1 <= guard.min_requests <= 1_000_000, "guard", "has min_requests outside 1 to 1000000")
        _require(10 <= guard.window <= 600, "guard", "has a window outside 10 to 600 seconds")

    def _require_target(self, param: str, model: str) -> None:
        known = ", ".join(repr(target.model) for target in self.targets[:8])
        _require(model in self.index, param, f"names {model[:80]!r}, which is none of the targets ({known})")

    @property
    def models(self) -> Iterable[str]:
        """Everything the route names, targets first, each once."""
        named = (*(target.model for target in self.targets), *self.fallback, *(one.model for one in self.shadow))
        return dict.fromkeys(named)

    def shares(self, now: float) -> tuple[float, ...]:
        """Of each target, adding up to 1."""
        if self.ramp is None:
            total = sum(target.weight for target in self.targets)
            return tuple(target.weight / total for target in self.targets)
        return self.shares_at(self.ramp.step(now))

    def shares_at(self, step: int) -> tuple[float, ...]:
        """While the ramp is at `step`."""
        assert self.ramp is not None
        mine = self.ramp.steps[step] / 100
        rest = sum(target.weight for target in self.targets if target.model != self.ramp.target)
        return tuple(
            mine if target.model == self.ramp.target else (1 - mine) * target.weight / rest for target in self.targets
        )

    def peak(self, model: str, now: float) -> float:
        """The largest share that `model` has now or will have by the ramp; 0 for what is no target."""
        if model not in self.index:
            return 0.0
        steps = range(0 if self.ramp is None else self.ramp.step(now), 1 if self.ramp is None else len(self.ramp.steps))
        shares = [self.shares(now) if self.ramp is None else self.shares_at(step) for step in steps]
        return max(of[self.index[model]] for of in shares)

    def main(self, now: float) -> Target:
        """The one with the largest share."""
        return max(zip(self.shares(now), self.targets, strict=True), key=lambda pair: pair[0])[1]

    def leads_to(self, model: str) -> bool:
        """Whether a weight, the ramp or a rule gives requests to `model`, now or later."""
        by_weight = model in self.index and self.targets[self.index[model]].weight > 0
        by_ramp = self.ramp is not None and self.ramp.target == model
        return by_weight or by_ramp or any(rule.target == model for rule in self.rules)

    # -- changes ----------------------------------------------------------------------------------------------

    def ramping(self, ramp: Ramp) -> "Route":
        return replace(self, ramp=ramp)

    def promoted(self, model: str) -> "Route":
        """Everything that no rule leads elsewhere goes to `model`."""
        self._require_target("target", model)
        targets = tuple(replace(target, weight=float(target.model == model)) for target in self.targets)
        return replace(self, targets=targets, ramp=None)

    def halted(self, now: float) -> "Route":
        """The ramp ends where it stands: the shares that hold now are the weights."""
        shares = zip(self.targets, self.shares(now), strict=True)
        targets = tuple(replace(target, weight=round(100 * share, 6)) for target, share in shares)
        return replace(self, targets=targets, ramp=None)

    def without(self, model: str, instead: str) -> "Route":
        """Nothing goes to `model` any more, by weight, ramp, rule or fallback; `instead` has it all when nothing is
        left. During a ramp of `model` or `instead` the others' weights stand for themselves again."""
        targets = tuple(replace(one, weight=0.0) if one.model == model else one for one in self.targets)
        if not any(one.weight for one in targets):
            targets = tuple(replace(one, weight=float(one.model == instead)) for one in targets)
        rules = tuple(rule for rule in self.rules if rule.target != model)
        fallback = tuple(one for one in self.fallback if one != model)
        return replace(self, targets=targets, rules=rules, fallback=fallback, ramp=None)


def _require(holds: bool, param: str, what: str) -> None:
    if not holds:
        raise InvalidRequest(
            f"The route's {param!r} {what}. GET /v1/routes lists routes as they are written.",
            param=param,
            code="invalid_route",
        )

"""Route <-> its JSON document: what PUT takes, GET shows and the registry keeps. The alias stands beside it.

Read by hand, so that every refusal names the field, and what is not known is refused: a misspelt guard would guard
nothing.
"""

from collections.abc import Mapping
from typing import Any

from loraplex.errors import InvalidRequest
from loraplex.routing.route import Gate, Guard, Match, Ramp, Route, Rule, Shadow, Target

DEFAULT_STEPS = (1.0, 5.0, 25.0, 100.0)
DEFAULT_EVERY = 600.0
MAX_CHARS = 1024


def route_of(alias: str, document: Any, now: float) -> Route:
    """The route that a document describes; a ramp without `started_at` starts `now`. Raises InvalidRequest."""
    read = JsonObject(document, "body")
    route = Route(
        alias=alias,
        targets=tuple(map(_target, read.objects("targets", shorthand="model"))),
        sticky_by=_sticky(read.text("sticky_by", "none")),
        rules=tuple(map(_rule, read.objects("rules"))),
        fallback=tuple(read.texts("fallback")),
        shadow=tuple(map(_shadow, read.objects("shadow", shorthand="model"))),
        ramp=None if (ramp := read.object("ramp")) is None else ramp_of(ramp, now),
        guard=None if (guard := read.object("guard")) is None else _guard(guard),
        gate=None if (gate := read.object("gate")) is None else _gate(gate),
    )
    read.end()
    return route


def ramp_of(read: "JsonObject", now: float) -> Ramp:
    ramp = Ramp(
        target=read.text("target"),
        steps=tuple(read.numbers("steps", DEFAULT_STEPS)),
        every=read.number("every", DEFAULT_EVERY),
        started_at=read.number("started_at", now),
    )
    read.end()
    return ramp


def document_of(route: Route) -> dict[str, Any]:
    """Everything written out, defaults included."""
    return {
        "targets": [
            {"model": one.model, "weight": one.weight, "max_running": one.max_running} for one in route.targets
        ],
        "sticky_by": route.sticky_by,
        "rules": [{one.source: one.key, str(one.match): one.value, "target": one.target} for one in route.rules],
        "fallback": list(route.fallback),
        "shadow": [{"model": one.model, "share": one.share, "log": one.log} for one in route.shadow],
        "ramp": None
        if (ramp := route.ramp) is None
        else {
            "target": ramp.target,
            "steps": list(ramp.steps),
            "every": ramp.every,
            "started_at": ramp.started_at,
        },
        "guard": None
        if (guard := route.guard) is None
        else {
            "baseline": guard.baseline,
            "max_error_rate": guard.max_error_rate,
            "max_non_finite": guard.max_non_finite,
            "max_latency_ratio": guard.max_latency_ratio,
            "min_requests": guard.min_requests,
            "window": guard.window,
        },
        "gate": None if route.gate is None else {"min_pass": route.gate.min_pass},
    }


def _target(read: "JsonObject") -> Target:
    target = Target(read.text("model"), read.number("weight", 1.0), read.count("max_running", None))
    read.end()
    return target


def _rule(read: "JsonObject") -> Rule:
    source = read.one_of("header", "metadata")
    key = read.text(source)
    match = Match(read.one_of(*map(str, Match)))
    rule = Rule(source, key.lower() if source == "header" else key, match, read.text(str(match)), read.text("target"))
    read.end()
    return rule


def _shadow(read: "JsonObject") -> Shadow:
    shadow = Shadow(read.text("model"), read.number("share", 1.0), read.flag("log", False))
    read.end()
    return shadow


def _guard(read: "JsonObject") -> Guard:
    usual = Guard("")
    guard = Guard(
        baseline=read.text("baseline"),
        max_error_rate=read.number("max_error_rate", usual.max_error_rate),
        max_non_finite=read.count("max_non_finite", usual.max_non_finite) or 0,
        max_latency_ratio=read.number("max_latency_ratio") if read.has("max_latency_ratio") else None,
        min_requests=read.count("min_requests", usual.min_requests) or 0,
        window=read.number("window", usual.window),
    )
    read.end()
    return guard


def _gate(read: "JsonObject") -> Gate:
    gate = Gate(read.number("min_pass", Gate().min_pass))
    read.end()
    return gate


def _sticky(text: str) -> str:
    return text.lower() if text.startswith("header:") else text


class JsonObject:
    """The fields of one JSON object, each taken once; `end` refuses those that are left. null is absence."""

    def __init__(self, value: Any, name: str):
        self._name = name
        if not isinstance(value, Mapping):
            raise self._refused("is not a JSON object")
        self._left = {key: one for key, one in value.items() if one is not None}

    def text(self, field: str, default: str | None = None) -> str:
        value = self._take(field, default)
        if not isinstance(value, str) or not 0 < len(value) <= MAX_CHARS:
            raise self._refused(f"needs {field!r}, a text of 1 to {MAX_CHARS} characters")
        return value

    def has(self, field: str) -> bool:
        return field in self._left

    def number(self, field: str, default: float | None = None) -> float:
        value = self._take(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e15:
            raise self._refused(f"needs a number as {field!r}")
        return float(value)

    def count(self, field: str, default: int | None) -> int | None:
        value = self._take(field, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > 1 << 31):
            raise self._refused(f"needs a whole number as {field!r}")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self._take(field, default)
        if not isinstance(value, bool):
            raise self._refused(f"needs true or false as {field!r}")
        return value

    def numbers(self, field: str, default: tuple[float, ...]) -> list[float]:
        return [JsonObject({field: one}, self._name).number(field, 0.0) for one in self._list(field, default)]

    def texts(self, field: str) -> list[str]:
        return [JsonObject({field: one}, self._name).text(field) for one in self._list(field, ())]

    def object(self, field: str) -> "JsonObject | None":
        value = self._take(field, None)
        return None if value is None else JsonObject(value, field)

    def objects(self, field: str, shorthand: str | None = None) -> list["JsonObject"]:
        """A list of objects; a text in it is short for an object with nothing but the field `shorthand`."""
        found = self._list(field, ())
        return [JsonObject({shorthand: one} if shorthand and isinstance(one, str) else one, field) for one in found]

    def one_of(self, *fields: str) -> str:
        found = [field for field in fields if field in self._left]
        if len(found) != 1:
            raise self._refused(f"needs exactly one of {', '.join(map(repr, fields))}")
        return found[0]

    def end(self) -> None:
        if self._left:
            unknown = ", ".join(repr(str(key)[:40]) for key in sorted(map(str, self._left))[:5])
            raise self._refused(f"has fields that this server does not know: {unknown}")

    def _list(self, field: str, default: tuple[Any, ...]) -> list[Any]:
        value = self._take(field, default)
        if not isinstance(value, list | tuple) or len(value) > 256:
            raise self._refused(f"needs a list as {field!r}, of at most 256")
        return list(value)

    def _take(self, field: str, default: Any) -> Any:
        return self._left.pop(field, default)

    def _refused(self, what: str) -> InvalidRequest:
        return InvalidRequest(f"The route's {self._name!r} {what}.", param=self._name, code="invalid_route")

"""Router: a request of a route -> its target. No clock, no dice: both are given in.

Sticky requests are dealt out by weighted rendezvous hashing (Thaler and Ravishankar 1998; the weights as in
Schindelhauer and Schomaker 2005): target i has the score ln(u_i) / share_i, u_i in (0, 1) a hash of (alias, key,
model), and the highest wins. Raising the share of one target moves keys to it only, lowering it from it only.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import regex

from loraplex.routing.route import Match, Route, Rule, Target

RULE, STICKY, CHANCE = "rule", "sticky", "chance"
MAX_MATCHED_CHARS = 4096
REGEX_SECONDS = 0.005
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UNIT = 2.0**-53


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request brings that decides where it goes. `headers` finds names in lower case."""

    user: str | None = None
    api_key: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, hash=False)
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Decision:
    """`by`: RULE, STICKY, or CHANCE, also for a request that brings nothing to stick by."""

    target: Target
    by: str


@dataclass(frozen=True, slots=True)
class Routed:
    """How a request came to its answer. `reason`: None when `target` answers; else why a fallback does."""

    alias: str
    target: str
    by: str
    reason: str | None = None


class Router:
    def __init__(self, route: Route):
        self.route = route
        self._rules = [(rule, _matcher(rule), route.targets[route.index[rule.target]]) for rule in route.rules]
        self._key = _key_reader(route.sticky_by)
        self._salt = hashlib.blake2b(route.alias.encode(), digest_size=16).digest()
        steps = 1 if route.ramp is None else len(route.ramp.steps)
        self._tables = [_Table(route, step) for step in range(steps)]

    def decide(self, asked: Asked, chance: float, now: float) -> Decision:
        """`chance` in [0, 1), `now` in seconds since the epoch."""
        for rule, matches, target in self._rules:
            value = (asked.headers if rule.source == "header" else asked.metadata).get(rule.key)
            if isinstance(value, str) and matches(value):
                return Decision(target, RULE)
        ramp = self.route.ramp
        table = self._tables[0 if ramp is None else ramp.step(now)]
        key = self._key(asked)
        if not key:
            return Decision(table.by_chance(chance), CHANCE)
        # what a client sends may hold half characters
        digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8, key=self._salt).digest()
        return Decision(table.by_hash(int.from_bytes(digest)), STICKY)


class _Table:
    """The targets that have a share, during one step of the ramp."""

    def __init__(self, route: Route, step: int):
        shares = route.shares(0.0) if route.ramp is None else route.shares_at(step)
        live = [(target, share) for target, share in zip(route.targets, shares, strict=True) if share > 0]
        self._targets = [target for target, _ in live]
        self._edges = list(accumulate(share for _, share in live))[:-1]
        self._seeds = np.array([_seed(target.model) for target in self._targets], np.uint64)
        self._per_share = np.array([1 / share for _, share in live])

    def by_chance(self, chance: float) -> Target:
        return self._targets[bisect_right(self._edges, chance)]

    def by_hash(self, key: int) -> Target:
        # the finalizer of splitmix64: mixes key and target until every bit depends on every other
        x = self._seeds ^ np.uint64(key)
        x = (x ^ (x >> 30)) * _MIX_1
        x = (x ^ (x >> 27)) * _MIX_2
        scores = np.log(((x ^ (x >> 31)) >> 11) * _UNIT + _UNIT / 2) * self._per_share
        return self._targets[int(scores.argmax())]


def _seed(model: str) -> int:
    return int.from_bytes(hashlib.blake2b(model.encode(), digest_size=8).digest())


def _key_reader(sticky_by: str) -> Callable[[Asked], str | None]:
    kind, _, name = sticky_by.partition(":")
    if kind == "header":
        return lambda asked: asked.headers.get(name)
    return {"user": lambda asked: asked.user, "api_key": lambda asked: asked.api_key}.get(kind, lambda asked: None)


def _matcher(rule: Rule) -> Callable[[str], bool]:
    wanted = rule.value
    if rule.match is Match.EXACT:
        return lambda value: value == wanted
    if rule.match is Match.PREFIX:
        return lambda value: value.startswith(wanted)
    pattern = regex.compile(wanted)

    def matches(value: str) -> bool:
        """An expression that runs out of time, or is asked about a very long text, does not match."""
        try:
            return len(value) <= MAX_MATCHED_CHARS and pattern.fullmatch(value, timeout=REGEX_SECONDS) is not None
        except TimeoutError:
            return False

    return matches

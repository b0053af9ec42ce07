"""Routes: aliases that are policies: their revisions, a request's way to a target, and what is seen of the targets.

Every decision asks the registry for the alias's revision, as every name is asked for: so a change counts at once, also
one that another process made, and a request sees one revision, the old or the new. Statistics and `max_running` are of
this process.
"""

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

import structlog

from loraplex.engine.async_engine import EngineClient
from loraplex.errors import (
    AdapterConflict,
    AdapterLoadFailed,
    AdapterQuarantined,
    InvalidRequest,
    LoraplexError,
    ModelNotFound,
    Overloaded,
)
from loraplex.lora.event import (
    ROUTE_DELETE,
    ROUTE_PROMOTE,
    ROUTE_RAMP,
    ROUTE_ROLLBACK,
    ROUTE_SET,
    SERVER,
)
from loraplex.lora.route_revisions import Document, RouteRevision, RouteRevisions, Within, route_not_found
from loraplex.routing.composition import parse_composition
from loraplex.routing.document import JsonObject, document_of, ramp_of, route_of
from loraplex.routing.guard import Verdict, judge
from loraplex.routing.observed import Observed, Window
from loraplex.routing.route import Gate, Route, Shadow, Target
from loraplex.routing.router import RULE, Asked, Routed, Router
from loraplex.serving.flight import Flight
from loraplex.serving.gating import Gating
from loraplex.serving.resolution import Held, Names

logger = structlog.get_logger(__name__)

UNAVAILABLE = (ModelNotFound, AdapterQuarantined, AdapterLoadFailed)
"""What makes a fallback answer, beside OVER_LIMIT."""
OVER_LIMIT = "over_limit"
MAX_ARMS = 16_384
"""Targets of which something is remembered."""
_LATENCY_EVERY = 0.1
"""Seconds between two looks at a target's times, which take half a millisecond of the event loop; at its errors each
request that ends has one."""


@dataclass(frozen=True, slots=True)
class Live:
    """A revision that holds, ready to decide."""

    revision: RouteRevision
    router: Router

    @property
    def route(self) -> Route:
        return self.router.route


class Arm:
    """A target of an alias as it is seen by this process. `num_running`: requests that it has now. `timed_at`: when its
    times were last judged."""

    def __init__(self) -> None:
        self.window = Window()
        self.num_running = 0
        self.timed_at = -math.inf


class Routes:
    """`clock` gives seconds since the epoch, for ramps; `chance` numbers in [0, 1)."""

    def __init__(
        self,
        book: RouteRevisions,
        names: Names,
        base_name: str,
        gating: Gating,
        clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ):
        self._book = book
        self._names = names
        self._base_name = base_name
        self._gating = gating
        self._clock = clock
        self._chance = chance
        self._lock = threading.Lock()  # over what follows
        self._live: dict[str, Live] = {}
        self._arms: dict[tuple[str, str], Arm] = {}
        self._taking_out: set[str] = set()  # aliases whose failed target is just being taken out
        self._tasks: set[asyncio.Future[Any]] = set()

    # -- what holds (blocking) --------------------------------------------------------------------------------

    def load(self) -> None:
        """Read every route, so that the first requests need not."""
        for revision in self._book.list():
            self._adopt(revision)

    def find(self, alias: str) -> Live | None:
        """The route that `alias` means now; None when it is no route's."""
        if alias == self._base_name:
            return None
        revision = self._book.revision(alias)
        live = self._live.get(alias)
        if revision is None:
            self._live.pop(alias, None)
            return None
        if live is not None and live.revision.revision == revision:
            return live
        try:
            return self._adopt(self._book.get(alias))
        except ModelNotFound:  # deleted between the two questions
            return None

    def get(self, alias: str) -> Live:
        """Raises ModelNotFound."""
        live = self.find(alias)
        return self._adopt(self._book.get(alias)) if live is None else live

    def all(self) -> Sequence[Live]:
        """All routes, by alias."""
        return [self._adopt(revision) for revision in self._book.list()]

    def _adopt(self, revision: RouteRevision) -> Live:
        with self._lock:
            live = self._live.get(revision.alias)
            if live is not None and live.revision.revision >= revision.revision:
                return live
            live = Live(revision, Router(route_of(revision.alias, revision.document, self._clock())))
            self._live[revision.alias] = live
            now = time.monotonic()
            for (alias, _), arm in self._arms.items():
                if alias == revision.alias:
                    arm.window.mark(now)
            return live

    # -- requests ---------------------------------------------------------------------------------------------

    def hold(self, model: str, asked: Asked, lifetime: AsyncExitStack) -> Held:
        """What answers `model`, as `Names.hold`; through the route when it is an alias. Blocking. Raises as `hold`, and
        Overloaded for a target over its limit without a fallback."""
        live = self._route_of(model)
        if live is None:
            return self._names.hold(model, lifetime)
        decision = live.router.decide(asked, self._chance(), self._clock())
        target, route = decision.target, live.route
        arm = self.arm(route.alias, target.model)
        arm.window.count("ruled" if decision.by == RULE else "drawn", time.monotonic())
        routed = Routed(route.alias, target.model, decision.by)
        try:
            held = replace(self._names.hold(target.model, lifetime), routed=routed)
            if not self._enter(arm, target, lifetime):
                raise Overloaded(
                    f"{target.model!r}, to which the route {route.alias!r} sends this request, has the "
                    f"{target.max_running} requests that it may have at once. Try again in a moment.",
                    retry_after=1,
                )
            return held
        except (Overloaded, *UNAVAILABLE) as error:
            over = isinstance(error, Overloaded)
            arm.window.count(OVER_LIMIT if over else "unavailable", time.monotonic())
            if not over and (judged := self._judge(route.alias, target.model)) is not None:
                self._take_out(*judged)
            reason = OVER_LIMIT if over else error.code
            held = self._fall_back(route, replace(routed, reason=reason), lifetime)
            if held is None:
                raise
            return held

    def _route_of(self, model: str) -> Live | None:
        return None if any(sign in model for sign in "@:+") else self.find(model)

    def _enter(self, arm: Arm, target: Target, lifetime: AsyncExitStack) -> bool:
        """Count a request of `arm` for the length of `lifetime`; False when it would be one too many."""
        with self._lock:
            if target.max_running is not None and arm.num_running >= target.max_running:
                return False
            arm.num_running += 1
        lifetime.callback(self._leave, arm)
        return True

    def _leave(self, arm: Arm) -> None:
        with self._lock:
            arm.num_running -= 1

    def _fall_back(self, route: Route, routed: Routed, lifetime: AsyncExitStack) -> Held | None:
        for model in route.fallback:
            try:
                return replace(self._names.hold(model, lifetime), routed=routed)
            except UNAVAILABLE:
                continue
        return None

    def watched(self, engine: EngineClient, routed: Routed | None) -> EngineClient:
        """`engine` for one request; what its target does is noted, if it is the target that answers."""
        if routed is None or routed.reason is not None:
            return engine
        arm = self.arm(routed.alias, routed.target)
        return Flight(engine, arm.window, lambda: self._judge_soon(routed.alias, routed.target))

    def main_target(self, model: str) -> str:
        """Of a route the target with the largest share, else `model` itself. Blocking."""
        live = self._route_of(model)
        return model if live is None else live.route.main(self._clock()).model

    # -- what is seen -----------------------------------------------------------------------------------------

    def arm(self, alias: str, model: str) -> Arm:
        with self._lock:
            key = (alias, model)
            if key not in self._arms:
                if len(self._arms) >= MAX_ARMS:  # the oldest that has no requests: those that run are counted
                    idle = (old for old, arm in self._arms.items() if not arm.num_running)
                    self._arms.pop(next(idle, key), None)
                self._arms[key] = Arm()
            return self._arms[key]

    def shadows(self, alias: str) -> tuple[Shadow, ...]:
        """Of the revision that the last decision saw."""
        live = self._live.get(alias)
        return () if live is None else live.route.shadow

    def shadow_arm(self, alias: str, model: str) -> Arm:
        return self.arm(alias, f"shadow:{model}")

    def arms(self) -> list[tuple[str, str, Arm]]:
        """Alias, target, and what is known of it, oldest first."""
        with self._lock:
            return [(alias, model, arm) for (alias, model), arm in self._arms.items()]

    def seen(self, route: Route, seconds: float) -> dict[str, Observed]:
        """Of each target, over the last `seconds`."""
        now = time.monotonic()
        return {one.model: self.arm(route.alias, one.model).window.since(seconds, now) for one in route.targets}

    def seen_shadows(self, route: Route, seconds: float) -> dict[str, Observed]:
        """Of each shadow, over the last `seconds`."""
        now = time.monotonic()
        return {one.model: self.shadow_arm(route.alias, one.model).window.since(seconds, now) for one in route.shadow}

    def shares(self, route: Route) -> tuple[float, ...]:
        """That the targets should have now."""
        return route.shares(self._clock())

    # -- the guard --------------------------------------------------------------------------------------------

    def _judge_soon(self, alias: str, model: str) -> None:
        """On the event loop, when a request of the target has ended."""
        if (judged := self._judge(alias, model)) is not None:
            task = asyncio.ensure_future(asyncio.to_thread(self._take_out, *judged))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _judge(self, alias: str, model: str) -> tuple[Live, Verdict] | None:
        """The route and why `model` is to be taken out of it; whoever is told must do it."""
        live = self._live.get(alias)
        if live is None or (guard := live.route.guard) is None or not live.route.leads_to(model):
            return None
        now = time.monotonic()
        arms = {one: self.arm(alias, one) for one in (model, guard.baseline)}
        with_times = guard.max_latency_ratio is not None and now - arms[model].timed_at >= _LATENCY_EVERY
        if with_times:
            arms[model].timed_at = now
        seen = {one: arm.window.since_mark(guard.window, now, with_times) for one, arm in arms.items()}
        verdict = judge(live.route, seen)
        with self._lock:
            if verdict is None or alias in self._taking_out:
                return None
            self._taking_out.add(alias)
        return live, verdict

    def _take_out(self, live: Live, verdict: Verdict) -> None:
        """If the route is still the one that was judged. Blocking."""
        route = live.route
        assert route.guard is not None
        out = document_of(route.without(verdict.target, instead=route.guard.baseline))
        try:
            self._adopt(
                self._book.change(
                    route.alias,
                    lambda was: out,
                    who=SERVER,
                    action=ROUTE_ROLLBACK,
                    expected=live.revision.revision,
                    reason=verdict.to_json(),
                )
            )
        except LoraplexError as error:
            logger.warning("a target was not taken out of its route", route=route.alias, reason=error.message)
        else:
            logger.warning("target taken out of its route", route=route.alias, **verdict.to_json())
        finally:
            with self._lock:
                self._taking_out.discard(route.alias)

    async def settled(self) -> None:
        """When what the guard has begun is done."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -- changes (blocking) -----------------------------------------------------------------------------------

    def put(self, alias: str, document: Any, *, who: str, expected: int | None = None) -> Live:
        """Make `alias` mean what the document says. Raises InvalidRequest, also for what it names and is not there,
        AdapterConflict for a name that is taken, RouteChanged, RouteRefused for what its gate does not let pass."""
        if alias == self._base_name:
            raise AdapterConflict(f"{alias!r} is the name of the base model; choose another alias.", param="alias")
        route = route_of(alias, document, self._clock())
        self._check_models(route.models)
        if route.gate is not None:
            self._check_versions(route)
        written = document_of(route)
        models = [target.model for target in route.targets]
        return self._change(alias, lambda was: written, who, ROUTE_SET, expected, self._gate(alias, models))

    def ramp(self, alias: str, document: Any, *, who: str, expected: int | None = None) -> Live:
        """Start a ramp now, from its first step, instead of the one there is. Raises RouteRefused when the gate does
        not let its target pass."""
        ramp = ramp_of(JsonObject(document, "ramp"), self._clock())
        gate = self._gate(alias, [ramp.target])
        return self._edit(alias, lambda route: route.ramping(ramp), who, ROUTE_RAMP, expected, gate)

    def promote(self, alias: str, model: str, *, who: str, expected: int | None = None) -> Live:
        """Send all to the target `model`, but what rules lead elsewhere. Raises RouteRefused when the gate does not
        let it pass."""
        gate = self._gate(alias, [model])
        return self._edit(alias, lambda route: route.promoted(model), who, ROUTE_PROMOTE, expected, gate)

    def settle(
        self,
        alias: str,
        within: Within,
        *,
        has_passed: Callable[[Gate, str], bool],
        who: str,
        reason: Mapping[str, Any],
    ) -> Live:
        """`within` changes what targets have passed: a ramp under way to a target that has not `has_passed` it ends
        where it stands, in the same transaction, if the route has a gate. Raises ModelNotFound."""

        def make(was: Document | None) -> Document:
            now = self._clock()
            document = self._existing(alias, was)
            route = route_of(alias, document, now)
            ramp = route.ramp
            if route.gate is None or ramp is None or ramp.step(now) == len(ramp.steps) - 1:
                return document
            return document if has_passed(route.gate, ramp.target) else document_of(route.halted(now))

        return self._adopt(self._book.change(alias, make, who=who, action=ROUTE_RAMP, reason=reason, within=within))

    def rollback(self, alias: str, to: int | None, *, who: str, expected: int | None = None) -> Live:
        """Make the revision before, or `to`, hold again, without the ramp it may have had."""

        def settled(document: Document) -> Document:
            return {**document, "ramp": None}

        return self._adopt(self._book.rollback(alias, to, settled, who=who, expected=expected))

    def delete(self, alias: str, *, who: str, expected: int | None = None) -> RouteRevision:
        """Forget the alias; its revisions stay in the history. Raises ModelNotFound."""

        def gone(was: Document | None) -> None:
            self._existing(alias, was)

        within = self._gating.forgetting(alias, who)
        deleted = self._book.change(alias, gone, who=who, action=ROUTE_DELETE, expected=expected, within=within)
        with self._lock:
            self._live.pop(alias, None)
            for key in [key for key in self._arms if key[0] == alias]:
                del self._arms[key]
        return deleted

    def _edit(
        self,
        alias: str,
        edit: Callable[[Route], Route],
        who: str,
        action: str,
        expected: int | None,
        within: Within,
    ) -> Live:
        def make(was: Document | None) -> Document:
            route = route_of(alias, self._existing(alias, was), self._clock())
            return document_of(edit(route))

        return self._change(alias, make, who, action, expected, within)

    def _gate(self, alias: str, models: Sequence[str]) -> Within:
        return self._gating.gate(alias, models, self._clock)

    def _change(
        self,
        alias: str,
        make: Callable[[Document | None], Document],
        who: str,
        action: str,
        expected: int | None,
        within: Within,
    ) -> Live:
        return self._adopt(self._book.change(alias, make, who=who, action=action, expected=expected, within=within))

    def _existing(self, alias: str, document: Document | None) -> Document:
        if document is None:
            raise route_not_found(alias)
        return document

    def _check_versions(self, route: Route) -> None:
        """What a name means can change without the route's doing, and nothing would have checked it."""
        for target in route.targets:
            for part in parse_composition(target.model):
                if part.ref.version is None and part.ref.name != self._base_name:
                    raise InvalidRequest(
                        f"A route with a gate names its targets with their versions: write {part.ref.name}@1, or what "
                        f"{part.ref.name!r} means now, instead of {target.model!r}. What a name means can change, and "
                        "the gate would not see it.",
                        param="gate",
                        code="invalid_route",
                    )

    def _check_models(self, models: Iterable[str]) -> None:
        """A model that is not there is a slip of the pen; one in quarantine may come back."""
        for model in models:
            if self._route_of(model) is not None:
                raise InvalidRequest(
                    f"{model!r} is a route, and routes do not lead to routes. Name its targets instead.",
                    param="targets",
                    code="invalid_route",
                )
            try:
                self._names.resolve(model)
            except AdapterQuarantined:
                continue
            except ModelNotFound as error:
                raise InvalidRequest(
                    f"The route names a model that is not there. {error.message}",
                    param="targets",
                    code="unknown_target",
                ) from error

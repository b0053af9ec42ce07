"""Routes over a real registry: ramps by a clock that is given, limits, and the guard's part in what requests meet."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import loraplex.serving.routes
from loraplex.engine.messages import EngineRequest, Failure, FinishReason, SequenceOutput
from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import AdapterQuarantined, Overloaded
from loraplex.lora.event import ROUTE_ROLLBACK, SERVER
from loraplex.lora.registry import Registry
from loraplex.routing.router import Asked
from loraplex.serving.gating import Gating
from loraplex.serving.resolution import Held, Resolved
from loraplex.serving.routes import Routes

TWO = [{"model": "sql@1", "weight": 9}, {"model": "sql@2", "weight": 1}]


class AllButBroken:
    """Names of which each is there, but for those in quarantine."""

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def resolve(self, model: str) -> Resolved:
        if model in self.broken:
            raise AdapterQuarantined(f"{model} is in quarantine.")
        return Resolved(model)

    def hold(self, model: str, lifetime: AsyncExitStack) -> Held:
        return Held(self.resolve(model))


class Answering:
    """An engine that ends each sequence with a token, or with `failure`."""

    def __init__(self, failure: Failure | None = None):
        self._failure = failure
        self.is_alive = True

    async def submit(self, requests: tuple[EngineRequest, ...]) -> AsyncGenerator[SequenceOutput]:
        for request in requests:
            reason = FinishReason.LENGTH if self._failure is None else FinishReason.ERROR
            token = 5 if self._failure is None else None
            yield SequenceOutput(request.seq_id, token, finish_reason=reason, failure=self._failure)

    def abort(self, seq_ids: tuple[str, ...]) -> None: ...

    async def command(self, name: str, **arguments: Any) -> Any: ...


class Rig:
    """`clock` and `chance` are what they are set to. `ask` is a request from its decision to its end."""

    def __init__(self, registry: Registry):
        self.clock, self.chance = 0.0, 0.0
        self.names = AllButBroken()
        self.registry = registry
        gating = Gating(registry.evaluations, self.names, "base")  # type: ignore[arg-type]
        clocks = (lambda: self.clock, lambda: self.chance)
        self.routes = Routes(registry.routes, self.names, "base", gating, *clocks)  # type: ignore[arg-type]

    def put(self, **document: Any) -> None:
        self.routes.put("prod", {"targets": TWO, **document}, who="me")

    async def hold(self, lifetime: AsyncExitStack, user: str | None = None) -> Held:
        return await asyncio.to_thread(self.routes.hold, "prod", Asked(user=user), lifetime)

    async def ask(self, user: str | None = None, failure: Failure | None = None) -> str:
        """The name that answered."""
        async with AsyncExitStack() as lifetime:
            held = await self.hold(lifetime, user)
            await self.run(held, failure)
        await self.routes.settled()
        return held.resolved.model

    async def run(self, held: Held, failure: Failure | None = None) -> None:
        engine = self.routes.watched(Answering(failure), held.routed)
        async for _ in engine.submit((EngineRequest(seq_id="s", token_ids=(1,), params=SamplingParams()),)):
            pass

    @property
    def revision(self) -> int:
        return self.routes.get("prod").revision.revision

    @property
    def shares(self) -> tuple[float, ...]:
        return self.routes.get("prod").route.shares(self.clock)

    def rollbacks(self) -> list[dict[str, Any]]:
        events, _ = self.registry.events("prod")
        assert all(event.who == SERVER for event in events if event.action == ROUTE_ROLLBACK)
        return [dict(event.detail["reason"]) for event in events if event.action == ROUTE_ROLLBACK]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with Registry(f"sqlite:///{tmp_path / 'registry.db'}", "base") as registry:
        yield Rig(registry)


NAN = Failure("non_finite_logits", "NaN")
FAILED = Failure("adapter_load_failed", "gone")


async def test_a_ramp_goes_by_the_clock(rig: Rig):
    rig.put(sticky_by="user")
    rig.clock = 1000.0
    rig.routes.ramp("prod", {"target": "sql@2", "steps": [0, 50, 100], "every": 60}, who="me")
    users = [str(number) for number in range(40)]
    had: set[str] = set()
    for clock, least, most in (
        (1000, 0, 0),
        (1059.9, 0, 0),
        (1060, 5, 35),
        (1119, 5, 35),
        (1120, 40, 40),
        (1e9, 40, 40),
    ):
        rig.clock = clock
        new = {user for user in users if await rig.ask(user) == "sql@2"}
        assert least <= len(new) <= most
        assert had <= new, "nobody is sent back"
        had = new


async def test_a_target_that_only_fails_to_be_there_is_taken_out(rig: Rig):
    """All requests are answered by the fallback, so none ends at the target; the rollback comes all the same."""
    rig.put(fallback=["base"], guard={"baseline": "sql@1", "min_requests": 5})
    rig.routes.promote("prod", "sql@2", who="me")
    rig.names.broken.add("sql@2")
    answered = [await rig.ask() for _ in range(6)]
    assert answered == ["base"] * 5 + ["sql@1"]
    (why,) = rig.rollbacks()
    assert (why["target"], why["kind"], why["rate"], why["requests"]) == ("sql@2", "error_rate", 1.0, 5)


async def test_who_was_taken_out_cannot_end_the_next_ones_ramp(rig: Rig):
    """Its last requests fail later; the route is another by then."""
    rig.put(targets=[*TWO, {"model": "sql@3", "weight": 0}], guard={"baseline": "sql@1"})
    rig.chance = 0.95
    async with AsyncExitStack() as lifetime:
        late = await rig.hold(lifetime)
        assert late.resolved.model == await rig.ask(failure=NAN) == "sql@2"
        rig.routes.ramp("prod", {"target": "sql@3", "steps": [25, 50]}, who="me")
        revision = rig.revision
        await rig.run(late, NAN)
        await rig.routes.settled()
    assert (rig.revision, rig.shares) == (revision, (0.75, 0.0, 0.25))
    assert [why["target"] for why in rig.rollbacks()] == ["sql@2"]


async def test_many_failures_at_once_are_one_rollback(rig: Rig):
    rig.put(guard={"baseline": "sql@1"})
    rig.chance = 0.95
    async with AsyncExitStack() as lifetime:
        held = [await rig.hold(lifetime) for _ in range(8)]
        await asyncio.gather(*(rig.run(one, NAN) for one in held))
        await rig.routes.settled()
    assert len(rig.rollbacks()) == 1
    assert rig.revision == 2


async def test_the_baseline_is_not_taken_out(rig: Rig):
    rig.put(guard={"baseline": "sql@1", "min_requests": 1})
    for _ in range(3):
        assert await rig.ask(failure=NAN) == "sql@1"
    assert not rig.rollbacks()


async def test_a_change_under_way_decides_before_the_guard(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    """Somebody changes the route between the verdict and the rollback: theirs holds, and is judged anew."""
    rig.put(guard={"baseline": "sql@1"})
    rig.chance = 0.95
    judge = loraplex.serving.routes.judge

    def and_then_changed(*judged):
        found = judge(*judged)
        if found is not None and rig.revision == 1:
            rig.put(guard={"baseline": "sql@1", "max_non_finite": 9})
        return found

    monkeypatch.setattr(loraplex.serving.routes, "judge", and_then_changed)
    assert await rig.ask(failure=NAN) == "sql@2"
    assert (rig.revision, rig.rollbacks()) == (2, [])
    for _ in range(10):
        assert not rig.rollbacks()
        assert await rig.ask(failure=NAN) == "sql@2"
    assert [why["count"] for why in rig.rollbacks()] == [10]


async def test_errors_beside_the_baselines(rig: Rig):
    rig.put(guard={"baseline": "sql@1", "min_requests": 10, "max_error_rate": 0.2})
    for number in range(10):
        await rig.ask(failure=FAILED if number == 0 else None)
    rig.chance = 0.95
    for number in range(10):
        await rig.ask(failure=FAILED if number < 3 else None)
    assert not rig.rollbacks(), "three in ten, beside one in ten and two in ten allowed"
    await rig.ask(failure=FAILED)
    (why,) = rig.rollbacks()
    assert (why["rate"], why["limit"], why["requests"], why["baseline_requests"]) == (0.3636, 0.3, 11, 10)
    assert rig.shares == (1.0, 0.0)


async def test_a_place_is_taken_by_what_runs_there(rig: Rig):
    """A request that the fallback answers takes none of its target's."""
    rig.put(targets=[{"model": "sql@1", "max_running": 1}], fallback=["base"])
    async with AsyncExitStack() as lifetime:
        rig.names.broken.add("sql@1")
        assert (await rig.hold(lifetime)).resolved.model == "base"
        rig.names.broken.clear()
        assert (await rig.hold(lifetime)).resolved.model == "sql@1"
        full = await rig.hold(lifetime)
        assert full.resolved.model == "base"
        assert full.routed is not None
        assert full.routed.reason == "over_limit"
    assert await rig.ask() == "sql@1"


async def test_what_runs_is_remembered(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    """However many targets are met: or a limit would be forgotten."""
    monkeypatch.setattr(loraplex.serving.routes, "MAX_ARMS", 3)
    rig.put(targets=[{"model": "sql@1", "max_running": 1}])
    async with AsyncExitStack() as lifetime:
        await rig.hold(lifetime)
        for number in range(5):
            rig.routes.arm(f"other-{number}", "sql@1")
        with pytest.raises(Overloaded):
            await rig.hold(lifetime)
    assert len(rig.routes.arms()) == 3
    assert await rig.ask() == "sql@1"

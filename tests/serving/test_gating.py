"""The gate of a route: promotions, ramps and weights wait for a pass, on both databases, by a clock that is given."""

import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import pytest

from loraplex.errors import InvalidRequest, ModelNotFound, RouteRefused
from loraplex.lora.evaluation_book import Result
from loraplex.lora.event import SERVER
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.registry import Registry
from loraplex.lora.version import READY, Version
from loraplex.serving.gating import Gating
from loraplex.serving.resolution import Resolved, Use
from loraplex.serving.routes import Live, Routes

FACTS = AdapterFacts(1, 1.0, False, 1, ("q_proj",), "F32", 100, 10)
OLD, NEW = "sql@1", "sql@2"
RAMP = {"target": NEW, "steps": [1, 10, 100], "every": 60}


class AnyVersion:
    """Names of which each is a version; `files` of a name may be exchanged."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}

    def resolve(self, model: str) -> Resolved:
        if model == "gone@1":
            raise ModelNotFound("gone")
        digest = self.files.get(model, model)
        version = Version(
            name=model,
            version=1,
            digest=digest,
            base_fingerprint="base",
            state=READY,
            created_at=datetime.now(UTC),
            source="",
            facts=FACTS,
        )
        return Resolved(model, (Use(version),), version)


class Rig:
    def __init__(self, registry: Registry):
        self.clock = 0.0
        self.names = AnyVersion()
        self.book = registry.evaluations
        self.gating = Gating(self.book, self.names, "base")  # type: ignore[arg-type]
        self.routes = Routes(registry.routes, self.names, "base", self.gating, lambda: self.clock)  # type: ignore[arg-type]
        self.registry = registry

    def put(self, old: float = 100, new: float = 0, gate: Any = True, **more: Any) -> Live:
        targets = [{"model": OLD, "weight": old}, {"model": NEW, "weight": new}]
        gates = {"gate": {"min_pass": 0.9}} if gate is True else {"gate": gate}
        return self.routes.put("prod", {"targets": targets, **gates, **more}, who="me")

    def write_set(self, content: bytes = b"one") -> None:
        def within(connection, was, now):
            self.book.write(connection, "prod", content, 10, "me")

        self.routes.settle("prod", within, has_passed=lambda gate, model: False, who="me", reason={"set": "changed"})

    def reach(self, model: str, passed: int) -> None:
        """A run ends with so many of ten."""
        stored = self.book.get("prod")
        run = self.book.begin(stored, [model], 10, "me")
        identity = self.gating.identity(model) or ""
        result = Result(identity, model, stored.revision, passed, 10)

        def within(connection, was, now):
            self.book.finish(connection, run, [result], {})

        self.routes.settle(
            "prod",
            within,
            has_passed=lambda gate, one: one != model or passed / 10 >= gate.min_pass,
            who=SERVER,
            reason={"run": run.run_id},
        )

    @property
    def share(self) -> float:
        """Of the new one."""
        live = self.routes.get("prod")
        return self.routes.shares(live.route)[1]


@pytest.fixture
def rig(registry_url: str) -> Iterator[Rig]:
    with Registry(registry_url, "base") as registry:
        rig = Rig(registry)
        rig.put()
        yield rig
        registry.check_integrity()


def refused(rig: Rig, text: str) -> None:
    """Every way to more traffic."""
    ways = [
        lambda: rig.routes.promote("prod", NEW, who="me"),
        lambda: rig.routes.ramp("prod", RAMP, who="me"),
        lambda: rig.put(99, 1),
        lambda: rig.put(ramp=RAMP),
    ]
    before = rig.routes.get("prod").revision
    for way in ways:
        with pytest.raises(RouteRefused, match=text) as error:
            way()
        assert error.value.code == "gate_closed"
        assert "loraplex route eval run prod --target sql@2" in error.value.message
    assert rig.routes.get("prod").revision == before


def test_the_gate_is_closed_until_a_pass(rig: Rig):
    refused(rig, "has not been run")
    rig.write_set()
    refused(rig, "has not been run")
    rig.reach(NEW, 8)
    refused(rig, r"passed 8 of 10 cases \(0.8\), and 0.9 is asked for")
    rig.reach(OLD, 10)
    refused(rig, "passed 8 of 10")
    rig.reach(NEW, 9)
    rig.routes.promote("prod", NEW, who="me")
    assert rig.share == 1.0
    rig.routes.rollback("prod", None, who="me")
    assert rig.share == 0.0, "a way back is never closed"


def test_another_set_or_other_files_need_another_pass(rig: Rig):
    rig.write_set()
    rig.reach(NEW, 10)
    rig.write_set(b"two")
    refused(rig, "has not been run")
    rig.reach(NEW, 10)
    rig.names.files[NEW] = "other files"
    refused(rig, "has not been run")
    rig.names.files.clear()
    rig.reach(NEW, 3)
    refused(rig, "passed 3 of 10")  # the latest run counts


def test_a_changed_set_ends_a_ramp_where_it_stands(rig: Rig):
    rig.write_set()
    rig.reach(NEW, 9)
    rig.routes.ramp("prod", RAMP, who="me")
    assert rig.share == pytest.approx(0.01)
    rig.clock = 61.0
    assert rig.share == pytest.approx(0.1), "it goes on by itself"
    rig.write_set(b"two")
    live = rig.routes.get("prod")
    assert live.route.ramp is None
    rig.clock = 1000.0
    assert rig.share == pytest.approx(0.1)
    event = next(one for one in rig.registry.events("prod")[0] if one.action == "route_ramp")
    assert event.detail["reason"] == {"set": "changed"}
    with pytest.raises(RouteRefused, match="has not been run"):
        rig.routes.ramp("prod", RAMP, who="me")


def test_a_run_that_fails_ends_a_ramp(rig: Rig):
    rig.write_set()
    rig.reach(NEW, 9)
    rig.routes.ramp("prod", RAMP, who="me")
    rig.clock = 61.0
    rig.reach(OLD, 0)
    assert rig.routes.get("prod").route.ramp is not None, "it is not the ramp's target"
    rig.reach(NEW, 5)
    assert rig.routes.get("prod").route.ramp is None
    assert rig.routes.get("prod").revision.who == SERVER


def test_a_ramp_that_has_arrived_stays(rig: Rig):
    rig.write_set()
    rig.reach(NEW, 9)
    rig.routes.ramp("prod", RAMP, who="me")
    rig.clock = 1000.0
    rig.write_set(b"two")
    assert rig.share == 1.0
    assert rig.routes.get("prod").route.ramp is not None


def test_less_traffic_needs_no_pass(rig: Rig):
    rig.put(gate=None)
    rig.put(50, 50, gate=None)
    rig.put(50, 50)  # the gate comes with what is there
    with pytest.raises(RouteRefused, match="closed to 'sql@1'"):
        rig.put(90, 10)
    rig.write_set()
    rig.reach(OLD, 9)
    rig.put(90, 10)
    rig.put(90, 10, sticky_by="user")
    rig.put(0, 10, gate=None)  # without the gate, which the history shows
    assert rig.share == 1.0


def test_a_gated_route_names_versions(rig: Rig):
    for model in ("sql", "sql:0.5+pig@1"):
        with pytest.raises(InvalidRequest, match="with their versions") as error:
            rig.routes.put("desk", {"targets": [model], "gate": {}}, who="me")
        assert error.value.param == "gate"
    for gate in ({"min_pass": 1.5}, {"min_pas": 1}, {"min_pass": "all"}):
        with pytest.raises(InvalidRequest, match="gate"):
            rig.routes.put("desk", {"targets": [OLD], "gate": gate}, who="me")
    rig.routes.put("desk", {"targets": ["base", "sql@1:0.5+pig@1"], "gate": {}}, who="me")


def test_the_set_goes_with_the_route(rig: Rig):
    rig.write_set()
    rig.reach(NEW, 10)
    rig.routes.delete("prod", who="me")
    assert rig.book.find("prod") is None
    rig.put()
    refused(rig, "has not been run")


def test_what_cannot_be_served_has_no_identity(rig: Rig):
    assert rig.gating.identity("gone@1") is None
    rig.write_set()
    targets = [{"model": OLD}, {"model": "gone@1", "weight": 0}]
    rig.put(gate=None)
    rig.registry.routes.change(
        "prod",
        lambda was: {**(was or {}), "targets": targets, "gate": {"min_pass": 0.0}},
        who="me",
        action="route_set",
    )
    with pytest.raises(RouteRefused, match="cannot be served now"):
        rig.routes.promote("prod", "gone@1", who="me")
    assert rig.gating.results("prod", ["gone@1", NEW]) == {"gone@1": None, NEW: None}


def test_no_promotion_slips_between_a_pass_and_another_set(rig: Rig):
    """The events are in the order of the changes: no promotion comes while the set is one that nobody has passed."""
    stop = threading.Event()
    outcomes: Counter[str] = Counter()

    def promote() -> None:
        while not stop.is_set():
            try:
                rig.routes.promote("prod", NEW, who="me")
                rig.put()
                outcomes["promoted"] += 1
            except RouteRefused:
                outcomes["refused"] += 1

    with ThreadPoolExecutor(2) as pool:
        promoting = [pool.submit(promote) for _ in range(2)]
        try:
            for _ in range(12):
                rig.write_set(b"one")
                rig.reach(NEW, 10)
                rig.write_set(b"two")
        finally:
            stop.set()
        for one in promoting:
            one.result()
    assert outcomes["refused"] > 0
    rig.write_set(b"one")
    rig.reach(NEW, 10)
    rig.routes.promote("prod", NEW, who="me")
    sets = {digest_of(content): content for content in (b"one", b"two")}
    present = b""
    for event in reversed(rig.registry.events("prod", limit=10_000)[0]):
        if event.action == "evaluation_set":
            present = sets[event.detail["now"]["digest"]]
        elif event.action == "route_promote":
            assert present == b"one"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Disk, RAM and device in one machine, against plain dicts. The second half of the file shows that it has teeth."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky
from hypothesis.stateful import run_state_machine_as_test
from tiers_machine import TiersMachine

from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_pool import AdapterPool
from loraplex.engine.adapter_residency import AdapterResidency
from loraplex.engine.engine import Engine
from loraplex.lora.pins import Pins
from loraplex.lora.store import AdapterStore
from loraplex.serving.catalog import AdapterCatalog


def run(num_runs: int, num_steps: int) -> None:
    chosen = settings(
        max_examples=num_runs,
        stateful_step_count=num_steps,
        report_multiple_bugs=False,
        phases=[Phase.generate],  # shrinking takes many minutes; add it to look into a failure
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(TiersMachine, settings=chosen)


def test_three_tiers():
    run(15, 50)


@pytest.mark.slow
def test_three_tiers_for_long():
    run(50, 500)


# -- teeth: each of these faults must be noticed ------------------------------------------------------------------

Method = Callable[..., Any]


def every(count: int, method: Method, instead: Method = lambda *_, **__: None) -> Method:
    """`method`, but each `count`-th call is another's."""
    calls = 0

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (method if calls % count else instead)(*args, **kwargs)

    return sometimes


def remembered(method: Method) -> Method:
    known: dict[Any, Any] = {}
    return lambda self, *key: known.setdefault((self, *key), method(self, *key))


def lost(put: Method) -> Method:
    def put_and_lose(self: AdapterStore, folder: Any, blob: Any) -> None:
        put(self, folder, blob)
        shutil.rmtree(blob)

    return put_and_lose


def forget_place(engine: Engine, digest: str) -> None:
    engine.places.release(digest)


def load_another(pool: AdapterPool, place: int, weights: Any) -> None:
    load(pool, place, weights)
    pool.modules["model.layers.0.self_attn.q_proj"].offset_a[place] += 1


load = AdapterPool.load

FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a lease is not returned": (AdapterCache, "release", every(5, AdapterCache.release)),
    "a hold on files is not returned": (AdapterStore, "release", every(5, AdapterStore.release)),
    "a pinned adapter is evicted": (
        AdapterCache,
        "_is_held",
        lambda self, digest: bool(self._leases.get(digest)),
    ),
    "an adapter that runs is evicted": (
        AdapterCache,
        "_is_held",
        lambda self, digest: digest in self._pins or (bool(self._leases) and digest not in self._leases),
    ),
    "evicted beyond need": (AdapterCache, "can_reserve", lambda self, *_: True),
    "a place is not emptied": (Engine, "_forget_place", forget_place),
    "a place holds other bytes": (AdapterPool, "load", load_another),
    "a rename is lost": (AdapterStore, "_put", every(4, AdapterStore._put, lost(AdapterStore._put))),
    "a damaged blob is kept": (AdapterStore, "_is_intact", lambda self, digest: (self.blobs / digest).exists()),
    "the sweep heeds no hold": (AdapterStore, "_hold", lambda self, digest: self._holds.update([digest])),
    "a stale version is resolved": (AdapterCatalog, "get", remembered(AdapterCatalog.get)),
    "a quarantined version answers": (AdapterCatalog, "get", lambda self, *ref: self.registry.look(*ref)),
    "a pin is not written down": (Pins, "add", every(2, Pins.add)),
    "what is idle stays": (AdapterResidency, "expire", lambda self, seconds: ()),
}


LATE = ("a damaged blob is kept", "the sweep heeds no hold", "a pin is not written down", "what is idle stays")
"""Faults that need many operations to show."""


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.slow if name in LATE else ()) for name in FAULTS]
)
def test_notices(fault: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(
        (AssertionError, KeyError, Flaky)
    ):  # a fault at each n-th call is another one when it is replayed
        run(80, 100)  # it ends at the first run that notices

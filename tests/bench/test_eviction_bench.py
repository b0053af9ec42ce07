"""Traces against the RAM tier."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from loraplex.bench.eviction import Clairvoyant, EvictionBench, EvictionSettings, Gdsf, Trace
from loraplex.cli import app
from loraplex.engine.eviction import Lrfu, Lru

SMALL = EvictionSettings(adapters=60, in_ram=8, requests=600, in_flight=4)
TINY = EvictionSettings(adapters=4, in_ram=2, in_flight=1)


def trace(*requests: int) -> Trace:
    return Trace("", np.array(requests), np.full(4, 100))


def test_rates_of_a_trace_that_can_be_counted():
    requests = trace(0, 1, 0, 2, 0, 1)
    rates = EvictionBench(TINY).replay(requests, Lru())
    assert rates == {"hit_rate": 2 / 6, "byte_hit_rate": 2 / 6, "cost_bytes": (Lrfu.FIXED_BYTES + 100) * 4 / 6}
    assert EvictionBench(TINY).replay(trace(0, 1, 0, 1), Lru())["hit_rate"] == 0.5


def test_who_knows_the_future_keeps_what_comes_next():
    requests = trace(0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1)
    hits = {
        policy: EvictionBench(TINY).replay(requests, policy)["hit_rate"]
        for policy in (Lru(), Clairvoyant(requests.requests))
    }
    assert [round(rate * 12) for rate in hits.values()] == [0, 4]


def test_more_running_than_ram_holds_waits():
    crowded = EvictionSettings(adapters=4, in_ram=2, in_flight=9)
    assert EvictionBench(crowded).replay(trace(0, 1, 2, 3, 0), Lru())["hit_rate"] == 0


def test_gdsf_is_frequency_by_size_over_a_clock_that_rises():
    policy = Gdsf()
    policy.insert("small", Lrfu.FIXED_BYTES)  # weight 2
    policy.insert("large", 2 * Lrfu.FIXED_BYTES)  # weight 1.5
    for digest in ("small", "large", "large"):
        policy.use(digest)
    assert [policy.worth("small"), policy.worth("large")] == [2.0, 3.0]
    policy.remove("small")
    policy.insert("small", Lrfu.FIXED_BYTES)
    policy.use("small")
    assert policy.worth("small") == 4.0


@pytest.mark.parametrize("seed", [0, 1])
def test_every_policy_on_every_trace(seed: int):
    settings = EvictionSettings(**{**{name: getattr(SMALL, name) for name in SMALL.__slots__}, "seed": seed})
    bench = EvictionBench(settings)
    seen = []
    result = bench.run(lambda: seen.append(1))
    assert len(seen) == bench.num_replays == 12 * 4
    for row in result["rows"]:
        rates = {name: replay["hit_rate"] for name, replay in row["policies"].items()}
        assert all(0 <= rate < 1 for rate in rates.values())
        if "ranks" not in row["trace"].replace("ranks move", ""):
            assert rates["clairvoyant"] == max(rates.values()), row["trace"]
    zipf = result["rows"][0]["policies"]
    assert zipf["lrfu"]["hit_rate"] > zipf["lru"]["hit_rate"]


def test_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["bench", "eviction", "--adapters", "50", "--in-ram", "6", "--requests", "300", "--in-flight", "4"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0
    assert "Zipf 1.0, ranks 8 to 64" in shown.output
    assert "clairvoyant" in shown.output
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert len(json.loads(found.output)["rows"]) == 12

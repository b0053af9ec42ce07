"""`bench tiers` against a real server of a tiny random base."""

import json
from pathlib import Path

import pytest

from loraplex.bench.tables import tiers_table
from loraplex.bench.tiers import PHASES, TiersBench, TiersSettings

TINY = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


@pytest.mark.slow  # three servers, one after the other
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")
def test_tiers(limits):
    settings = TiersSettings(adapters=9, rank=2, in_ram=3, loads=24, rounds=2, repeats=1, page=4, shape=TINY)
    shown: list[str] = []
    result = TiersBench(settings, shown.append, limits).run()
    assert shown[-1] == "load, 2 of 2"
    assert min(result["start_seconds"].values()) > 0
    assert result["loads"]["count"] >= 9
    assert len(result["loads"]["anonymous"]) == 2
    assert set(result["loads"]["mean_ms"]) == set(PHASES)
    assert all(value > 0 for value in [*result["loads"]["mean_ms"].values(), *result["list"].values()])
    assert json.loads(json.dumps(result)) == result
    assert tiers_table(result).row_count == 11

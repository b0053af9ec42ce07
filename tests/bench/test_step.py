"""`bench step` on a tiny model: what it prints, and that its variants do what they are named for."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loraplex import bench
from loraplex.bench.step import StepBench, StepSettings, Variant

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
LINEARS = 2 * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128)
RANK_1 = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture
def make(limits) -> Callable[..., StepBench]:
    def make_bench(**changes) -> StepBench:
        sizes = {"rounds": 1, "context": 10, "ranks": (2,), "prefill": 0, "merged": False}
        settings = StepSettings(**{**sizes, "dtype": "float32", "device": "cpu", "shape": TINY, **changes})
        return StepBench(settings, limits)

    return make_bench


def test_rows_and_ratios(make):
    rounds = []
    made = make(rounds=2, context=20, prefill=32)
    result = made.run(lambda: rounds.append(1))
    assert len(rounds) == made.num_rounds == 2 * 5
    assert [(row["batch"], row["adapters"], row["rank"]) for row in result["rows"]] == [
        (batch, count, 2 if count else 0) for batch in (1, 8, 32, 64) for count in (0, 1, 8, 32, 64) if count <= batch
    ]
    rate = {(row["batch"], row["adapters"]): row["tokens_per_second"] for row in result["rows"]}
    ratios = result["ratios"]
    assert ratios["distinct_32_of_32"] == rate[32, 32] / rate[32, 0]
    assert ratios["distinct_8_of_8"] == rate[8, 8] / rate[8, 0]
    assert ratios["single_batch_1"] == rate[1, 1] / rate[1, 0]
    assert ratios["base_share_of_bandwidth_batch_1"] == result["rows"][0]["share_of_bandwidth"]
    assert ratios["lora_ops_in_base_only_step"] == 0
    assert all(row["step_ms"] >= row["step_ms_min"] > 0 for row in result["rows"])
    assert result["base"] == {str(batch): rate[batch, 0] for batch in (1, 8, 32, 64)}


def test_a_merged_adapter_runs_no_lora_op_and_stands_beside_the_unmerged(make):
    result = make(batches=(1, 8), adapters=(0, 1), merged=True).run()
    rows = {(row["batch"], row["adapters"], row["merged"]): row for row in result["rows"]}
    assert set(rows) == {(batch, *kind) for batch in (1, 8) for kind in ((0, False), (1, False), (1, True))}
    for batch in (1, 8):
        base, merged = rows[batch, 0, False], rows[batch, 1, True]
        assert merged["lora_ops"] == 0
        assert rows[batch, 1, False]["lora_ops"] > 0
        assert merged["bytes"] == base["bytes"]
        ratio = merged["tokens_per_second"] / base["tokens_per_second"]
        assert result["ratios"][f"merged_batch_{batch}"] == merged["ratio_to_base"] == ratio


def test_a_step_with_adapters_is_seen_by_the_counter(make):
    """Or the zero of the base-only step would mean nothing."""
    result = make(batches=(4,), adapters=(0, 2)).run()
    base, adapted = result["rows"]
    assert base["lora_ops"] == 0
    assert adapted["lora_ops"] > 0


def test_shares_are_of_bytes_and_arithmetic(make):
    result = make(batches=(2,), adapters=(0, 2), prefill=8).run()
    base, adapted = result["rows"]
    weights = 4 * (LINEARS + 128 * 64)
    assert weights < base["bytes"] < 1.1 * weights, "weights, and a little KV"
    assert adapted["bytes"] - base["bytes"] == 4 * 2 * 2 * RANK_1, "two adapters of rank 2 are read"
    assert adapted["flops"] - base["flops"] == 2 * 2 * 2 * RANK_1, "two rows pass one each"
    for row in result["rows"] + result["prefill"]:
        seconds = row["step_ms"] / 1e3
        assert row["share_of_bandwidth"] == pytest.approx(row["bytes"] / 1e9 / seconds)
        assert row["share_of_flops"] == pytest.approx(row["flops"] / 1e9 / seconds)
        assert row["limit_ms"] == pytest.approx(1e3 * max(row["bytes"], row["flops"]) / 1e9)
        assert row["share_of_limit"] == max(row["share_of_bandwidth"], row["share_of_flops"])


def test_prefill_counts_all_its_tokens(make):
    rows = make(batches=(1,), adapters=(0, 8), prefill=64).run()["prefill"]
    assert [(row["batch"], row["adapters"], row["tokens"]) for row in rows] == [
        (1, 0, 64),
        (1, 1, 64),
        (8, 0, 64),
        (8, 8, 64),
    ]
    assert rows[0]["tokens_per_second"] == pytest.approx(64 / rows[0]["step_ms"] * 1e3)
    assert rows[0]["flops"] > 2 * 64 * LINEARS


def test_ranks_are_variants_with_weights_of_their_own(make):
    made = make(batches=(2,), adapters=(0, 2), ranks=(1, 4))
    places = {rank: made._places(Variant(2, 2, rank)) for rank in (1, 4)}
    assert places == {1: [0, 1], 4: [2, 3]}
    assert [made._runner.pool.max_rank([place]) for place in range(4)] == [1, 1, 4, 4]
    assert [(row["adapters"], row["rank"]) for row in made.run()["rows"]] == [(0, 0), (2, 1), (2, 4)]


def test_variants_run_the_adapters_they_are_named_for(make):
    made = make()
    for batch, count in ((32, 32), (32, 8), (8, 1), (1, 0)):
        entries = made._make_batch(Variant(batch, count, 2 if count else 0))
        places = [entry.places for entry in entries]
        assert len(places) == batch
        assert len({place for place in places if place}) == count
        assert places == sorted(places)
        assert all(entry.seq.num_new_tokens == 1 for entry in entries), "the context is in the cache"


def test_adapters_change_the_tokens(make):
    """A variant whose adapters did nothing would be measured as fast as the base."""
    made = make(ranks=(32,), rounds=12)
    plain, adapted = made._make_batch(Variant(8, 0, 0)), made._make_batch(Variant(8, 8, 32))
    for _ in range(12):
        made._timed_step(plain)
        made._timed_step(adapted)
    assert [e.seq.token_ids for e in plain] != [e.seq.token_ids for e in adapted]


def test_it_asks_for_torch_and_transformers_alone():
    """What the rest of the package asks for, tests/test_layout.py sees to."""
    known = sys.stdlib_module_names | {"torch", "transformers", "safetensors", "tokenizers", "loraplex"}
    todo, seen = ["step"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        tree = ast.parse((Path(bench.__path__[0]) / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module.partition(".")[0] for module in modules} <= known, f"{name} imports {modules}"
            todo += [m.rpartition(".")[2] for m in modules if m.startswith("loraplex.bench.")]
    assert seen == {"step", "lora_calls", "machine", "random_model", "roofline"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # bitsandbytes' own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_quantised_base(make):
    result = make(batches=(2,), adapters=(0, 2), quantization="nf4", merged=True).run()
    assert [(row["adapters"], row["merged"]) for row in result["rows"]] == [(0, False), (2, False)]
    assert result["quantization"]["kind"] == "nf4"
    assert 0 < result["quantization"]["divergence"] < 1
    assert result["quantization"]["nbytes"] < result["quantization"]["plain_nbytes"]

"""`bench step` on a tiny model: what it prints, and that its variants do what they are named for."""

import pytest

import tiny
from loraplex.bench import step
from loraplex.bench.step import StepBench, StepSettings


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "_random_llama", lambda dtype: tiny.make_model("llama", dtype=dtype))


def test_rows_and_ratios():
    rounds = []
    result = StepBench(StepSettings(rounds=2, context=20, dtype="float32", device="cpu", rank=2)).run(
        lambda: rounds.append(1)
    )
    assert len(rounds) == 2 * len(step.BATCHES)
    assert [(row["batch"], row["adapters"]) for row in result["rows"]] == [
        (batch, count) for batch in step.BATCHES for count in step.ADAPTERS if count <= batch
    ]
    rate = {(row["batch"], row["adapters"]): row["tokens_per_second"] for row in result["rows"]}
    assert result["ratios"]["distinct_32_of_32"] == rate[32, 32] / rate[32, 0]
    assert result["ratios"]["distinct_8_of_8"] == rate[8, 8] / rate[8, 0]
    assert result["ratios"]["single_batch_1"] == rate[1, 1] / rate[1, 0]
    assert all(row["step_ms"] >= row["step_ms_min"] > 0 for row in result["rows"])


def test_variants_run_the_adapters_they_are_named_for():
    bench = StepBench(StepSettings(rounds=1, context=10, dtype="float32", device="cpu", rank=2))
    for batch, count in ((32, 32), (32, 8), (8, 1), (1, 0)):
        entries = bench._make_batch(batch, count)
        places = [entry.places for entry in entries]
        assert len(places) == batch
        assert len({place for place in places if place}) == count
        assert places == sorted(places)
        assert all(entry.seq.num_new_tokens == 1 for entry in entries), "the context is in the cache"


def test_adapters_change_the_tokens():
    """A variant whose adapters did nothing would be measured as fast as the base."""
    bench = StepBench(StepSettings(rounds=1, context=10, dtype="float32", device="cpu", rank=8))
    plain, adapted = bench._make_batch(8, 0), bench._make_batch(8, 8)
    for _ in range(6):
        bench._timed_step(plain)
        bench._timed_step(adapted)
    assert [e.seq.token_ids for e in plain] != [e.seq.token_ids for e in adapted]

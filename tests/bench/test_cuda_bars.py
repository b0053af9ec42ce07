"""The CUDA bars' program on a tiny model and a CPU: that it runs, what it compares, and how it judges."""

import itertools
import json

import pytest
from test_step import TINY

from loraplex.bench import cuda_bars
from loraplex.bench.cuda_bars import CudaBars, CudaSettings, bars_notes, markdown, step_bars, swap_bars
from loraplex.bench.generate import GenerateBench, GenerateSettings
from loraplex.bench.swaps import SwapBench, SwapSettings
from loraplex.bench.tables import bars_table

CPU = {"dtype": "float32", "device": "cpu", "shape": TINY}


def test_the_whole_run(limits):
    shown: list[str] = []
    settings = CudaSettings(
        batches=(1, 32), adapters=(0, 1, 32), context=20, prefill=16, rounds=1, swap_tokens=12, **CPU
    )
    result = CudaBars(settings, shown.append, limits).run()
    assert len(shown) >= 3
    assert [bar["limit"] for bar in result["bars"]] == [0.60, 0.70, 0.78, 0.99, 0.99, 8, 1.15]
    assert all(bar["measured"] > 0 for bar in result["bars"])
    assert {row["library"] for row in result["generate"]} == {"transformers", "PEFT mixed batch"}
    assert json.dumps(result), "what is written to a file"
    assert bars_table(result).row_count == 7
    assert bars_notes(result)[1].startswith("transformers, batch 1: ")
    text = markdown(result)
    assert "| 32 adapters in 32 / base only | ≥ 0.78 × |" in text
    assert "| PEFT mixed batch | 32 | 32 |" in text
    assert "| loraplex, merged | 32 | 1 |" in text


def row(batch: int, adapters: int, limit: float, ratio: float, share: float = 0.5, merged: bool = False) -> dict:
    return {
        "batch": batch,
        "adapters": adapters,
        "merged": merged,
        "limit_ms": limit,
        "ratio_to_base": ratio,
        "share_of_bandwidth": share,
    }


def test_bars_are_of_their_rows():
    rows = [row(1, 0, 4, 1.0, 0.61), row(64, 0, 5, 1.0, 0.69), row(64, 64, 6, 0.75), row(1, 1, 4, 0.98, merged=True)]
    bars = {bar.bar: (bar.measured, bar.bound, bar.is_met) for bar in step_bars({"rows": rows})}
    assert bars == {
        "base at batch 1, share of the bandwidth": (0.61, 1.0, True),
        "base at batch 64, share of the bandwidth": (0.69, 1.0, False),
        "64 adapters in 64 / base only": (0.75, 5 / 6, True),
        "one merged adapter at batch 1 / base": (0.98, 1.0, False),
    }
    swaps = {"adapter_bytes": 84e6, "copy_ms": 8.5, "ratio_p99": 1.15}
    assert [(bar.measured, bar.is_met) for bar in swap_bars(swaps)] == [(8.5, False), (1.15, True)]


def test_adapters_come_in_one_half_and_stand_in_the_other():
    settings = SwapSettings(
        steady=4, steady_adapters=2, others=9, spare=2, tokens=24, rounds=2, context=20, rank=2, **CPU
    )
    bench = SwapBench(settings)
    try:
        result = bench.run()
    finally:
        bench.close()
    assert result["copies"]["standing"] == 0
    assert result["copies"]["coming"] >= 3
    assert result["copy_ms"] > 0
    for spread in result["gaps_ms"].values():
        assert 0 < spread["p50"] <= spread["p99"] <= spread["max"]
        assert spread["count"] > 4 * 10
    assert result["ratio_p99"] == result["gaps_ms"]["coming"]["p99"] / result["gaps_ms"]["standing"]["p99"]


def test_generate_times_the_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch):
    bench = GenerateBench(GenerateSettings(batches=(2,), adapters=3, rank=2, context=8, tokens=5, rounds=2, **CPU))
    asked = []

    def seconds(model, ids, count, mixed):
        asked.append((type(model).__name__, tuple(ids.shape), count, mixed.get("adapter_names")))
        return 1.0 + 0.5 * count

    monkeypatch.setattr(bench, "_seconds", seconds)
    rows = bench.run()
    assert [(row["library"], row["batch"], row["adapters"], row["ms"]) for row in rows] == [
        ("transformers", 2, 0, 500.0),
        ("PEFT mixed batch", 2, 2, 500.0),
    ]
    plain, mixed = itertools.islice(asked, 6), itertools.islice(asked, 6, None)
    assert {(name, names) for name, _, _, names in plain} == {("LlamaForCausalLM", None)}
    assert {tuple(names) for *_, names in mixed} == {("a0", "a1")}


def test_the_program(limits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path):
    seen = []
    told = {
        "settings": {"graphs": True},
        "where": dict.fromkeys(("date", "device", "torch", "triton", "transformers", "peft"), "x"),
        "bars": [],
    }
    told |= {"step": {"shape": "s", "rows": []}, "generate": []}
    monkeypatch.setattr(
        cuda_bars, "CudaBars", lambda settings, show: seen.append(settings) or type("", (), {"run": lambda _: told})()
    )
    cuda_bars.main(
        ["--device", "cpu", "--batches", "1,2", "--shape", '{"hidden_size": 64}', "--output", str(tmp_path / "f")]
    )
    assert seen[0].batches == (1, 2)
    assert not seen[0].graphs
    assert seen[0].shape["hidden_size"] == 64
    assert seen[0].shape["vocab_size"] == 128256
    assert json.loads((tmp_path / "f").read_text())["step"]["shape"] == "s"
    assert capsys.readouterr().out.startswith("x, x, torch x")

"""Figures from outcomes that are written down by hand."""

import json

import numpy as np
import pytest

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.dialect import Dialect
from loraplex.bench.load import LoadResult, Outcome, Workload
from loraplex.bench.plot import require_plots, save_plot
from loraplex.bench.popularity import Popularity
from loraplex.bench.report import ServingRoofline, serve_report
from loraplex.bench.roofline import ModelCost
from loraplex.bench.server import BenchFailed, ServerFacts
from loraplex.bench.tables import serve_notes, serve_table, warnings_of

FACTS = ServerFacts({}, "base", ("base", "a", "b"), None)
COUNTERS = {"loraplex_adapter_loads": 2.0, "loraplex_engine_steps": 10.0, "vllm:generation_tokens": 100.0}
COST = ModelCost(linear_numel=1000, head_numel=100, value_bytes=2, kv_numel=10, attention_flops=4, rank_numel=7)


def outcome(model: str, ttft: float, *, due: float = 0.0, tokens: int = 3, is_cold: bool = False, **changes) -> Outcome:
    """Tokens every 0.1 s after the first."""
    one = Outcome(model, is_cold, due, sent=due + 0.01, answered=model)
    for index in range(tokens):
        one.see_text(due + ttft + 0.1 * index)
    one.ended, one.prompt_tokens, one.output_tokens = one.last, 5, tokens
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def result_of(*outcomes: Outcome, seconds: float = 10.0, is_interrupted: bool = False, **changes) -> LoadResult:
    sizes = {"popularity": Popularity("uniform"), "requests": 9, "output_tokens": 3, "prompt_tokens": 5, **changes}
    workload = Workload(models=("a", "b"), arrivals=ClosedLoop(2), **sizes)
    return LoadResult(workload, Dialect(), list(outcomes), 0.0, seconds, 1.0, is_interrupted)


def report_of(result: LoadResult, before=None, after=None, roofline=None) -> dict:
    return serve_report(result, FACTS, "http://x", before or {}, after or {}, roofline, "no reason")


def test_figures():
    bad = outcome("b", 9.0, error="HTTP 500", tokens=1)
    report = report_of(result_of(outcome("a", 1.0), outcome("a", 3.0, due=2.0), outcome("b", 2.0, is_cold=True), bad))
    assert report["tokens_per_second"] == pytest.approx(9 / 10)
    assert report["requests_per_second"] == pytest.approx(0.3)
    assert report["ttft_ms"]["count"] == 3, "without the failed one"
    assert report["ttft_ms"]["p50"] == pytest.approx(2000)
    assert report["ttft_ms"]["max"] == pytest.approx(3000)
    assert report["ttft_warm_ms"]["p50"] == pytest.approx(2000)
    assert report["ttft_cold_ms"] == pytest.approx(
        {"count": 1, "p50": 2000, "p90": 2000, "p99": 2000, "mean": 2000, "max": 2000}
    )
    assert report["gap_ms"]["count"] == 6
    assert report["gap_ms"]["p99"] == pytest.approx(100)
    assert report["time_per_token_ms"]["p50"] == pytest.approx(100)
    assert report["latency_ms"]["max"] == pytest.approx(3200)
    assert report["client"] == pytest.approx({"cpu_share": 0.1, "late_ms_max": 10})
    assert report["requests"] == {
        "sent": 4,
        "good": 3,
        "failed": 1,
        "unfinished": 0,
        "errors": {"HTTP 500": 1},
        "answered_by_another_model": 0,
        "without_usage": 0,
        "shorter_than_asked": 0,
        "cold": 1,
        "models_seen": 2,
    }
    assert (report["machine"], report["limits"], report["rates"]) == (None, None, None)
    assert json.loads(json.dumps(report)) == report


def test_starvation_names_the_worst():
    report = report_of(result_of(*(outcome("a", 1.0) for _ in range(5)), outcome("b", 4.0), outcome("base", 2.0)))
    assert report["starvation"] == pytest.approx(
        {
            "worst_model": "b",
            "worst_model_requests": 1,
            "worst_p99_ttft_ms": 4000,
            "median_p99_ttft_ms": 2000,
            "ratio": 2,
            "longest_wait_ms": 4000,
        }
    )
    assert report_of(result_of(outcome("a", 1.0)))["starvation"] is None


def test_rates_are_differences_of_the_server_s_counters():
    after = {**COUNTERS, "loraplex_adapter_loads": 3.0, "loraplex_engine_steps": 16.0, "vllm:generation_tokens": 112.0}
    result = result_of(outcome("a", 1.0), outcome("a", 1.0), outcome("b", 1.0), outcome("base", 1.0))
    rates = report_of(result, COUNTERS, after)["rates"]
    assert rates["adapter_requests"] == 3
    assert rates["ram_hit_rate"] == pytest.approx(2 / 3)
    assert rates["tokens_per_step"] == 2
    assert rates["prefix_hit_rate"] is None
    assert report_of(result, {"other": 1.0}, {"other": 2.0})["rates"] is None


def test_limits_and_shares(limits):
    roofline = ServingRoofline(limits, COST, 70.0, "float32")
    result = result_of(outcome("a", 1.0), outcome("b", 1.0), seconds=1.2)
    report = report_of(result, roofline=roofline)
    in_flight = 2.0
    distinct = 2 * (1 - 0.5**2)
    nbytes = 2 * 1100 + in_flight * 6.5 * 10 * 2 + distinct * 70 * 2
    flops = in_flight * (2 * 1100 + 6.5 * 4 + 2 * 70)
    found = report["limits"]
    assert found["mean_in_flight"] == pytest.approx(in_flight)
    assert found["mean_distinct_adapters"] == pytest.approx(distinct)
    assert found["gap_ms"] == pytest.approx(1e3 * max(nbytes, flops) / 1e9)
    prefill = 2 * 5 * 1000 + 2 * 100 + 5 * 3 * 4 + 2 * 5 * 70
    assert found["ttft_ms"] == pytest.approx(1e3 * prefill / 1e9)
    assert found["tokens_per_second"] == pytest.approx(6 / ((3 * flops + 2 * prefill) / 1e9))
    assert report["shares"]["ttft_p50"] == pytest.approx(found["ttft_ms"] / 1000)
    assert report["shares"]["gap_p50"] == pytest.approx(found["gap_ms"] / 100)
    assert report["shares"]["tokens_per_second"] == pytest.approx(5 / found["tokens_per_second"])


def test_a_run_without_one_good_request_has_a_report(limits):
    roofline = ServingRoofline(limits, COST, 0.0, "float32")
    report = report_of(result_of(outcome("a", 1.0, error="HTTP 500")), roofline=roofline)
    assert report["ttft_ms"] is None
    assert report["shares"] == {"tokens_per_second": None, "ttft_p50": None, "gap_p50": None}
    assert serve_table(report).row_count == 2
    assert "ERROR 1 × HTTP 500" in serve_notes(report)


def test_what_lessens_the_figures_is_said():
    doubtful = outcome("a", 1.0, tokens=2, answered="other", output_tokens=None, cached_tokens=4)
    hanging = Outcome("b", False, 0.0)
    report = report_of(result_of(doubtful, hanging, is_interrupted=True, cold_share=0.9, requests=20))
    said = "\n".join(warnings_of(report))
    for text in ("another model", "without usage", "shorter", "4 prompt tokens", "INTERRUPTED: 1"):
        assert text in said, text
    assert not warnings_of(report_of(result_of(outcome("a", 1.0))))


def test_a_picture(tmp_path):
    result = result_of(outcome("a", 1.0), outcome("b", 2.0), outcome("a", 1.5, due=3.0))
    for name in ("plot.svg", "plot.png"):
        require_plots(tmp_path / name)
        save_plot(result, "a title", tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    assert "a title" in (tmp_path / "plot.svg").read_text() or b"<svg" in (tmp_path / "plot.svg").read_bytes()
    save_plot(result_of(), "nothing came", tmp_path / "empty.png")
    with pytest.raises(BenchFailed, match="known are"):
        require_plots(tmp_path / "plot.xyz")
    with pytest.raises(BenchFailed, match="does not exist"):
        require_plots(tmp_path / "no" / "plot.png")


def test_latencies_of_many_are_percentiles():
    times = np.arange(1, 101) / 100
    report = report_of(result_of(*(outcome("a", float(time)) for time in times)))
    assert report["ttft_ms"]["p99"] == pytest.approx(1e3 * np.percentile(times, 99))
    assert report["ttft_ms"]["p90"] == pytest.approx(1e3 * np.percentile(times, 90))

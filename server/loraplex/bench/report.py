"""ServeReport: the figures of a load test, as plain data for JSON.

Latencies are of requests that ended well. A share is a limit over a time, or a rate over its limit: 1 is the machine's
best. The limits are those of `roofline`, for as many requests as were under way on average.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraplex.bench.load import LoadResult, Outcome
from loraplex.bench.machine import MachineLimits
from loraplex.bench.roofline import ModelCost
from loraplex.bench.server import ServerFacts

VERSION = 1


@dataclass(frozen=True, slots=True)
class ServingRoofline:
    """What bounds the server: its machine, its base, and the mean weights of an adapter of the workload."""

    limits: MachineLimits
    cost: ModelCost
    adapter_numel: float
    dtype: str

    def figures(self, result: LoadResult, in_flight: float) -> dict[str, float]:
        """The least times and the largest rate for `in_flight` requests at once."""
        good = result.good
        output = sum(outcome.num_tokens for outcome in good)
        if not good or not output:
            return {}
        prompt = _mean([outcome.prompt_tokens or result.workload.prompt_tokens for outcome in good])
        context = prompt + output / len(good) / 2
        bandwidth, flop_rate = self.limits.bandwidth, self.limits.flops[self.dtype]
        batch = max(1.0, in_flight)
        distinct = 0.0
        if self.adapter_numel:
            workload = result.workload
            distinct = workload.popularity.expected_distinct(len(workload.warm_models), batch)
        step = self.cost.decode(batch, context, distinct, self.adapter_numel)
        alone = self.cost.prefill(1, prompt, min(distinct, 1.0), self.adapter_numel)
        reading = output / batch * step.nbytes / bandwidth
        computing = (output / batch * step.flops + len(good) * alone.flops) / flop_rate
        return {
            "mean_in_flight": in_flight,
            "mean_distinct_adapters": distinct,
            "tokens_per_second": output / max(reading, computing),
            "ttft_ms": 1e3 * alone.seconds(bandwidth, flop_rate),
            "gap_ms": 1e3 * step.seconds(bandwidth, flop_rate),
        }


def serve_report(
    result: LoadResult,
    facts: ServerFacts,
    url: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    roofline: ServingRoofline | None,
    why_no_limits: str = "",
) -> dict[str, Any]:
    """`before` and `after`: the server's counters. What `loraplex bench serve --json` prints."""
    workload, good = result.workload, result.good
    pmf = workload.popularity.pmf(len(workload.warm_models))
    output = sum(outcome.num_tokens for outcome in good)
    seconds = max(result.seconds, 1e-9)
    latencies = [outcome.ended - outcome.due for outcome in good if outcome.ended is not None]
    per_token = [
        (outcome.last - outcome.first) / (outcome.num_tokens - 1)
        for outcome in good
        if outcome.first is not None and outcome.last is not None and outcome.num_tokens > 1
    ]
    report: dict[str, Any] = {
        "report": VERSION,
        "server": {"url": url, "base": facts.base, "is_loraplex": facts.is_loraplex, **dict(facts.version)},
        "workload": {
            "arrivals": str(workload.arrivals),
            "popularity": str(workload.popularity),
            "models": len(workload.models),
            "cold_models": workload.num_cold,
            "pmf": [float(p) for p in pmf],
            "requests": workload.requests,
            "seconds": workload.seconds,
            "prompt_tokens": workload.prompt_tokens,
            "output_tokens": workload.output_tokens,
            "ignore_eos": result.dialect.ignore_eos,
            "cold_share": workload.cold_share,
            "seed": workload.seed,
        },
        "machine": None if roofline is None else roofline.limits.to_json(),
        "is_interrupted": result.is_interrupted,
        "requests": _count(result),
        "seconds": result.seconds,
        "tokens_per_second": output / seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens": output,
        "prompt_tokens": sum(outcome.prompt_tokens or 0 for outcome in good),
        "cached_prompt_tokens": sum(outcome.cached_tokens for outcome in good),
        "tokens_per_event": _ratio(output, sum(outcome.events for outcome in good)),
        "ttft_ms": _spread(_ttfts(good)),
        "ttft_warm_ms": _spread(_ttfts([outcome for outcome in good if not outcome.is_cold])),
        "ttft_cold_ms": _spread(_ttfts([outcome for outcome in good if outcome.is_cold])),
        "gap_ms": _spread([gap for outcome in good for gap in outcome.gaps]),
        "time_per_token_ms": _spread(per_token),
        "latency_ms": _spread(latencies),
        "starvation": _starvation(good),
        "rates": _rates(result, facts, before, after),
        "client": {
            "cpu_share": result.cpu_seconds / seconds,
            "late_ms_max": 1e3 * max((outcome.sent - outcome.due for outcome in result.outcomes), default=0.0),
        },
    }
    limits = {} if roofline is None else roofline.figures(result, sum(latencies) / seconds)
    report["limits"] = limits or None
    report["why_no_limits"] = "" if limits else why_no_limits or "no request ended well"
    report["shares"] = {
        "tokens_per_second": _ratio(report["tokens_per_second"], limits.get("tokens_per_second", 0)),
        "ttft_p50": _share(limits, "ttft_ms", report),
        "gap_p50": _share(limits, "gap_ms", report),
    }
    return report


def _count(result: LoadResult) -> dict[str, Any]:
    good = result.good
    wanted = result.workload.output_tokens
    return {
        "sent": len(result.outcomes),
        "good": len(good),
        "failed": len(result.failed),
        "unfinished": len(result.unfinished),
        "errors": dict(Counter(str(outcome.error) for outcome in result.failed).most_common()),
        "answered_by_another_model": sum(outcome.is_another_model for outcome in good),
        "without_usage": sum(outcome.output_tokens is None for outcome in good),
        "shorter_than_asked": sum(outcome.num_tokens < wanted for outcome in good),
        "cold": sum(outcome.is_cold for outcome in result.outcomes),
        "models_seen": len({outcome.model for outcome in result.outcomes}),
    }


def _ttfts(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.first - outcome.due for outcome in outcomes if outcome.first is not None]


def _spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Of times in seconds, in milliseconds; None: there are none."""
    if not seconds:
        return None
    times = 1e3 * np.asarray(seconds)
    p50, p90, p99 = np.percentile(times, (50, 90, 99)).tolist()
    extremes = {"mean": float(times.mean()), "max": float(times.max())}
    return {"count": len(times), "p50": p50, "p90": p90, "p99": p99, **extremes}


def _starvation(good: Sequence[Outcome]) -> dict[str, Any] | None:
    """Whether some model waits longer than others. None with fewer than two models."""
    by_model: dict[str, list[float]] = defaultdict(list)
    for outcome in good:
        by_model[outcome.model] += _ttfts([outcome])
    p99 = {model: float(np.percentile(times, 99)) for model, times in by_model.items() if times}
    if len(p99) < 2:
        return None
    worst = max(p99, key=lambda model: p99[model])
    median = float(np.median(list(p99.values())))
    return {
        "worst_model": worst,
        "worst_model_requests": len(by_model[worst]),
        "worst_p99_ttft_ms": 1e3 * p99[worst],
        "median_p99_ttft_ms": 1e3 * median,
        "ratio": _ratio(p99[worst], median),
        "longest_wait_ms": 1e3 * max(max(times) for times in by_model.values() if times),
    }


def _rates(
    result: LoadResult, facts: ServerFacts, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any] | None:
    """What the server's counters say of the run; None where it has not loraplex's."""
    if not {"loraplex_adapter_loads", "loraplex_engine_steps"} <= before.keys() & after.keys():
        return None

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    adapted = sum(outcome.model != facts.base for outcome in result.good)
    loads = grown("loraplex_adapter_loads")
    return {
        "adapter_requests": adapted,
        "adapter_loads": loads,
        "ram_hit_rate": None if not adapted else max(0.0, 1 - loads / adapted),
        "ram_evictions": grown("loraplex_adapter_ram_evictions"),
        "prefix_hit_rate": _ratio(grown("vllm:prefix_cache_hits"), grown("vllm:prefix_cache_queries")),
        "preemptions": grown("vllm:num_preemptions"),
        "steps": grown("loraplex_engine_steps"),
        "tokens_per_step": _ratio(grown("vllm:generation_tokens"), grown("loraplex_engine_steps")),
        "generated_tokens": grown("vllm:generation_tokens"),
    }


def _share(limits: Mapping[str, float], name: str, report: Mapping[str, Any]) -> float | None:
    spread = report[name]
    return _ratio(limits.get(name, 0.0), spread["p50"]) if spread and limits else None


def _ratio(value: float, of: float) -> float | None:
    return value / of if of else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

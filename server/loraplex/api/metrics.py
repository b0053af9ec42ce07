"""Prometheus metrics: vLLM's names where routers and dashboards read them, our own for the adapter tiers.

Gauges and counters of the engine come from one snapshot a scrape. `vllm:lora_requests_info` is one series, whose
`running_lora_adapters` are the adapters resident on the device, as the Kubernetes model-server protocol says.
"""

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from loraplex import __version__
from loraplex.api.route_metrics import route_families
from loraplex.engine.durations import BOUNDS, DurationCounts
from loraplex.engine.engine import EngineStats
from loraplex.engine.messages import FinishReason
from loraplex.errors import NotReady
from loraplex.service import Service
from loraplex.serving.generation import ChoiceDelta, Generation

_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class RequestWatch:
    """Times one request as its deltas pass."""

    def __init__(self, metrics: "Metrics"):
        self._metrics = metrics
        self._started = time.perf_counter()
        self._has_first = False

    def see(self, delta: ChoiceDelta) -> None:
        if not self._has_first:
            self._has_first = True
            self._metrics.ttft.labels(self._metrics.model).observe(time.perf_counter() - self._started)
        if delta.finish_reason is not None:
            self._metrics.finished.labels(self._metrics.model, str(delta.finish_reason)).inc()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started


class Metrics:
    def __init__(self, service: Service):
        self._service = service
        self.model = service.base_name
        self._registry = CollectorRegistry()
        self._snapshot: EngineStats | None = None
        labels = ("model_name",)
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "Time to the first token", labels, _TTFT)
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "Time of whole requests", labels, _LATENCY)
        self.finished = self._counter("vllm:request_success", "Sequences that ended", ("model_name", "finished_reason"))
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of ended requests", labels)
        self.uploads = self._counter("loraplex_uploads", "Adapter uploads", ("result",))
        self._registry.register(self)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    @contextmanager
    def watching(self, generation: Generation) -> Iterator[RequestWatch]:
        watch = RequestWatch(self)
        try:
            yield watch
        except BaseException as error:
            reason = FinishReason.ERROR if isinstance(error, Exception) else FinishReason.ABORT
            self.finished.labels(self.model, str(reason)).inc()
            raise
        finally:
            self.prompt_tokens.labels(self.model).inc(generation.usage.prompt_tokens)
            self.e2e.labels(self.model).observe(watch.seconds)

    async def render(self) -> bytes:
        """The exposition. Without the engine's part when it is dead: that is when somebody looks."""
        try:
            self._snapshot = await self._service.stats()
        except NotReady:
            self._snapshot = None
        return await asyncio.to_thread(generate_latest, self._registry)

    def collect(self) -> Iterable[Metric]:
        """The snapshot as metric families (prometheus-client's collector protocol)."""
        info = GaugeMetricFamily("loraplex_build_info", "Version of the server", labels=("version",))
        info.add_metric((__version__,), 1)
        yield info
        yield from route_families(self._service.routes)
        yield from self._measurements()
        yield _by_phase(
            "loraplex_upload_seconds",
            "An upload's way: its body to synced files, checked, proven, entered in the registry",
            {phase: durations.counts for phase, durations in self._service.acceptance.seconds.items()},
        )
        stats = self._snapshot
        if stats is None:
            return
        for name, text, value in (
            ("vllm:num_requests_running", "Sequences in the running batch", stats.num_running),
            ("vllm:num_requests_waiting", "Sequences waiting", stats.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", stats.kv_usage),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((self.model,), value)
            yield gauge
        for name, text, value in (
            ("vllm:generation_tokens", "Tokens generated", stats.num_generated),
            ("vllm:num_preemptions", "Sequences preempted", stats.num_preemptions),
            ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", stats.prefix_hits),
            ("loraplex_engine_steps", "Engine steps", stats.num_steps),
            ("loraplex_merged_steps", "Engine steps on merged weights", stats.num_merged_steps),
            ("loraplex_adapter_loads", "Adapters read from disk", stats.num_loads),
            ("loraplex_adapter_ram_evictions", "Adapters evicted from RAM", stats.num_ram_evictions),
        ):
            counter = CounterMetricFamily(name, text, labels=("model_name",))
            counter.add_metric((self.model,), value)
            yield counter
        yield from self._tiers(stats)

    def _measurements(self) -> Iterable[Metric]:
        """What this process did beside serving."""
        cases = CounterMetricFamily("loraplex_evaluation_cases", "Answers judged in evaluations", labels=("result",))
        cases.add_metric(("passed",), self._service.evaluations.num_passed)
        cases.add_metric(("failed",), self._service.evaluations.num_failed)
        yield cases
        comparisons = self._service.comparisons
        yield CounterMetricFamily("loraplex_comparisons", "Comparisons that ended", value=comparisons.num_ended)
        yield CounterMetricFamily(
            "loraplex_comparison_scored_tokens",
            "Tokens of texts that were scored, and of prompts",
            value=comparisons.num_scored_tokens,
        )

    def _tiers(self, stats: EngineStats) -> Iterable[Metric]:
        size = GaugeMetricFamily("loraplex_adapter_cache_bytes", "Bytes of adapters in RAM", labels=("tier",))
        size.add_metric(("ram",), stats.ram_bytes)
        yield size
        capacity = GaugeMetricFamily("loraplex_adapter_cache_capacity_bytes", "Budget of the tier", labels=("tier",))
        capacity.add_metric(("ram",), stats.ram_budget)
        yield capacity
        merged = GaugeMetricFamily("loraplex_merged_bytes", "Bytes of merged weights")
        merged.add_metric((), sum(one.nbytes for one in stats.merges if one.state == "ready"))
        yield merged
        yield _by_phase(
            "loraplex_adapter_load_seconds",
            "An adapter's way: its files read and verified, converted, put into its place",
            stats.load_seconds,
        )
        config = self._service.info.config
        names = self._names_by_digest()
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters resident on the device and adapters waited for; the value is a timestamp",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        resident = ",".join(sorted(name for d in stats.device_digests for name in names.get(d, [d[:12]])))
        waiting = ",".join(sorted(name for d in stats.waiting_digests for name in names.get(d, [d[:12]])))
        info.add_metric((str(config.max_loras), resident, waiting), time.time())
        yield info

    def _names_by_digest(self) -> dict[str, list[str]]:
        """Several names may stand for the same files."""
        names: dict[str, list[str]] = {}
        for version in self._service.catalog.page():
            names.setdefault(version.digest, []).append(version.name)
        return names


def _by_phase(name: str, text: str, phases: Mapping[str, DurationCounts]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=("phase",))
    for phase, durations in phases.items():
        bounds = [*map(str, BOUNDS), "+Inf"]
        buckets = list(zip(bounds, accumulate(durations.counts), strict=True))
        family.add_metric((phase,), buckets, durations.seconds)
    return family

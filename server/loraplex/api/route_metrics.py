"""What is seen of routes as Prometheus families. At most MAX_TARGETS targets, those that were asked first, have series
of their own; the rest are one, with the labels "other"."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from loraplex.routing.observed import Observed, cumulative
from loraplex.serving.routes import Routes

MAX_TARGETS = 200
OTHER = ("other", "other")
_OUTCOMES = ("answered", "failed", "aborted", "unavailable", "over_limit", "dropped")
_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_LABELS = ("route", "target")


def route_families(routes: Routes) -> Iterable[Metric]:
    """A target that only shadows is "shadow:MODEL"."""
    seen: dict[tuple[str, str], Observed] = {}
    running: dict[tuple[str, str], int] = {}
    for number, (alias, model, arm) in enumerate(routes.arms()):
        labels = (alias, model) if number < MAX_TARGETS else OTHER
        seen.setdefault(labels, Observed()).add(arm.window.everything())
        running[labels] = running.get(labels, 0) + arm.num_running
    decided = CounterMetricFamily("loraplex_route_decisions", "Requests sent to a target", labels=(*_LABELS, "by"))
    ended = CounterMetricFamily(
        "loraplex_route_requests", "Requests of a target that ended", labels=(*_LABELS, "outcome")
    )
    broken = CounterMetricFamily("loraplex_route_non_finite", "Requests that ended with NaN", labels=_LABELS)
    now = GaugeMetricFamily("loraplex_route_running", "Requests that a target has now", labels=_LABELS)
    first = HistogramMetricFamily("loraplex_route_ttft_seconds", "From decision to first token", labels=_LABELS)
    between = HistogramMetricFamily("loraplex_route_inter_token_seconds", "Between tokens", labels=_LABELS)
    for labels, one in seen.items():
        decided.add_metric((*labels, "weight"), one.drawn)
        decided.add_metric((*labels, "rule"), one.ruled)
        for outcome in _OUTCOMES:
            if count := getattr(one, outcome):
                ended.add_metric((*labels, outcome), count)
        broken.add_metric(labels, one.non_finite)
        now.add_metric(labels, running[labels])
        for family, times, total in ((first, one.ttft, one.ttft_seconds), (between, one.between, one.between_seconds)):
            counts = [*cumulative(times, _BOUNDS), times.total()]
            bounds = [*map(str, _BOUNDS), "+Inf"]
            family.add_metric(labels, list(zip(bounds, counts, strict=True)), total)
    yield from (decided, ended, broken, now, first, between)

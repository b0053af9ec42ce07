"""RoutingBench: what a route costs: a decision, the question which revision holds, a judgement, a change, a start.

Everything is the server's own, over a registry of its own on SQLite in the temporary folder.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from loraplex.lora.event import ROUTE_SET
from loraplex.lora.registry import Registry
from loraplex.lora.route_revisions import RouteRevisions
from loraplex.routing.document import document_of, route_of
from loraplex.routing.guard import judge
from loraplex.routing.observed import WINDOW, Window
from loraplex.routing.router import Asked, Router
from loraplex.serving.gating import Gating
from loraplex.serving.resolution import Names
from loraplex.serving.routes import Routes

MICRO = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """decisions   of each kind
    routes         kept in the registry, each with `targets` targets
    repeats        of loads and changes; medians are shown
    """

    decisions: int = 20_000
    routes: int = 1000
    targets: int = 10
    repeats: int = 5


class RoutingBench:
    def __init__(self, settings: RoutingSettings):
        self._settings = settings

    def run(self) -> dict[str, Any]:
        """{"settings", "decisions_us" by targets and kind, "judgements_us", "revision_us", "change_ms", "load_ms"}."""
        decisions = {count: self._decisions(count) for count in (2, self._settings.targets, 64)}
        with tempfile.TemporaryDirectory() as folder:
            url = f"sqlite:///{Path(folder) / 'registry.sqlite'}"
            with Registry(url, "bench") as registry:
                return {
                    "settings": asdict(self._settings),
                    "decisions_us": decisions,
                    "judgements_us": {"errors": self._judgement(None), "times": self._judgement(1000.0)},
                    **self._registry(registry.routes),
                }

    def _decisions(self, num_targets: int) -> dict[str, float]:
        """Microseconds of one, by what decides: chance, a key, or the last of three rules."""
        count = self._settings.decisions
        first = "model-0"
        rules = [
            {"header": "x-tier", "exact": "gold", "target": first},
            {"metadata": "plan", "prefix": "trial-", "target": first},
            {"header": "x-build", "regex": r"v2\.\d+", "target": first},
        ]
        loose, ruled = (router_of(num_targets), router_of(num_targets, rules=rules))
        sticky = router_of(num_targets, sticky_by="user")
        asked = [Asked(user=f"user-{number}", headers={"x-build": "v2.17"}) for number in range(count)]
        dice = Random(0)
        chances = [dice.random() for _ in range(count)]
        taken = {}
        for kind, router in (("chance", loose), ("sticky", sticky), ("rule", ruled)):
            started = time.perf_counter()
            for one, chance in zip(asked, chances, strict=True):
                router.decide(one, chance, 0.0)
            taken[kind] = (time.perf_counter() - started) / count * MICRO
        return taken

    def _judgement(self, max_latency_ratio: float | None) -> float:
        """Microseconds of the guard's look at a target and the baseline, after a busy window."""
        guard = {"baseline": "model-0", "max_latency_ratio": max_latency_ratio, "window": WINDOW}
        route = router_of(2, guard=guard).route
        windows = {target.model: Window() for target in route.targets}
        dice = Random(0)
        for second in range(int(WINDOW)):
            for window in windows.values():
                window.count("answered", float(second))
                window.time("ttft", dice.lognormvariate(-2, 0.5), float(second))
                for _ in range(20):
                    window.time("between", dice.lognormvariate(-4, 0.5), float(second))

        def once() -> None:
            with_times = max_latency_ratio is not None
            seen = {model: window.since_mark(WINDOW, WINDOW, with_times) for model, window in windows.items()}
            assert judge(route, seen) is None

        return median_seconds(once, 50) * MICRO

    def _registry(self, book: RouteRevisions) -> dict[str, float]:
        settings = self._settings
        changes = []
        for number in range(settings.routes):
            document = document_of(router_of(settings.targets, number, sticky_by="user").route)
            started = time.perf_counter()
            book.change(f"route-{number}", lambda was, now=document: now, who="bench", action=ROUTE_SET)
            changes.append(time.perf_counter() - started)

        def load() -> None:
            routes = Routes(book, cast(Names, None), "base", cast(Gating, None))  # to load, neither is asked
            routes.load()

        return {
            "change_ms": statistics.median(changes) * 1e3,
            "load_ms": median_seconds(load, settings.repeats) * 1e3,
            "revision_us": median_seconds(lambda: book.revision("route-0"), 200) * MICRO,
        }


def router_of(num_targets: int, seed: int = 0, **document: Any) -> Router:
    targets = [{"model": f"model-{number}", "weight": 1 + (number + seed) % 7} for number in range(num_targets)]
    return Router(route_of("bench", {"targets": targets, **document}, 0.0))


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)

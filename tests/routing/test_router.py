"""The router: shares, stability under sticky keys, rules, ramps; and the guard's judgement."""

import math
import random
from collections import Counter

import pytest

from loraplex.errors import InvalidRequest
from loraplex.routing.document import document_of, route_of
from loraplex.routing.guard import judge
from loraplex.routing.observed import Observed, Window, bin_of, quantile
from loraplex.routing.router import CHANCE, RULE, STICKY, Asked, Router

N = 20_000


def router(now: float = 0.0, **document) -> Router:
    return Router(route_of("prod", document, now))


def weighted(*weights: float, **document) -> Router:
    targets = [{"model": f"sql@{number}", "weight": weight} for number, weight in enumerate(weights, 1)]
    return router(targets=targets, **document)


def dealt(chosen: Router, now: float = 0.0) -> dict[str, str]:
    """The target of each of N users."""
    return {user: chosen.decide(Asked(user=user), 0.0, now).target.model for user in map(str, range(N))}


def assert_within_three_sigma(counts: Counter[str], shares: dict[str, float]) -> None:
    for model, share in shares.items():
        sigma = math.sqrt(N * share * (1 - share))
        assert abs(counts[model] - N * share) <= 3 * sigma, (model, counts[model], N * share)


@pytest.mark.parametrize("weights", [(9, 1), (1, 1, 1), (70, 25, 5), tuple(range(1, 11))])
def test_observed_shares_are_the_desired_ones(weights):
    shares = {f"sql@{number}": weight / sum(weights) for number, weight in enumerate(weights, 1)}
    sticky = Counter(dealt(weighted(*weights, sticky_by="user")).values())
    assert_within_three_sigma(sticky, shares)
    chi_squared = sum((sticky[model] - N * share) ** 2 / (N * share) for model, share in shares.items())
    freedom = len(weights) - 1
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)  # far in the tail
    dice = random.Random(5)
    loose = weighted(*weights)
    drawn = Counter(loose.decide(Asked(), dice.random(), 0.0).target.model for _ in range(N))
    assert_within_three_sigma(drawn, shares)


@pytest.mark.parametrize(("before", "after"), [((90, 10), (75, 25)), ((1, 1, 1), (1, 1, 4)), ((5, 3, 2), (5, 3, 0))])
def test_only_the_share_that_must_move_moves(before, after):
    was, now = (dealt(weighted(*weights, sticky_by="user")) for weights in (before, after))
    moved = {(was[user], now[user]) for user in was if was[user] != now[user]}
    changed = {f"sql@{at}" for at, pair in enumerate(zip(before, after, strict=True), 1) if pair[0] != pair[1]}
    grows = {
        f"sql@{at}" for at in range(1, len(after) + 1) if after[at - 1] / sum(after) > before[at - 1] / sum(before)
    }
    assert all(target in grows and source not in grows for source, target in moved)
    assert changed
    must = sum(max(a / sum(after) - b / sum(before), 0) for a, b in zip(after, before, strict=True))
    count = sum(was[user] != now[user] for user in was)
    assert abs(count - N * must) <= 3 * math.sqrt(N * must)


def test_a_new_target_takes_from_all_and_moves_nobody_else():
    was, now = dealt(weighted(1, 1, sticky_by="user")), dealt(weighted(1, 1, 1, sticky_by="user"))
    assert {now[user] for user in was if was[user] != now[user]} == {"sql@3"}
    assert {was[user] for user in was if was[user] != now[user]} == {"sql@1", "sql@2"}


def test_another_alias_deals_otherwise():
    targets = ["a", "b"]
    one, two = (dealt(Router(route_of(alias, {"targets": targets, "sticky_by": "user"}, 0.0))) for alias in ("x", "y"))
    same = sum(two[user] == model for user, model in one.items())
    assert abs(same - N / 2) < 3 * math.sqrt(N / 4)


def test_what_requests_stick_by():
    asked = Asked(user="u", api_key="k", headers={"x-session": "s"})
    for sticky_by, key in (("user", "user"), ("api_key", "api_key"), ("header:X-Session", "headers"), ("none", "")):
        chosen = weighted(1, 1, sticky_by=sticky_by)
        decisions = {chosen.decide(asked, chance, 0.0).target.model for chance in (0.1, 0.9)}
        assert len(decisions) == (1 if key else 2)
        assert chosen.decide(asked, 0.1, 0.0).by == (STICKY if key else CHANCE)
        assert chosen.decide(Asked(), 0.1, 0.0).by == CHANCE, "it brings nothing to stick by"
    assert weighted(1, 1, sticky_by="user").decide(Asked(user="\ud800 half"), 0.0, 0.0).by == STICKY


def test_rules_in_order_then_weights():
    rules = [
        {"header": "x-a", "exact": "1", "target": "b"},
        {"metadata": "plan", "prefix": "tr", "target": "c"},
        {"header": "x-a", "regex": "[0-9]+", "target": "c"},
    ]
    chosen = router(targets=["a", {"model": "b", "weight": 0}, {"model": "c", "weight": 0}], rules=rules)

    def target(headers=None, metadata=None) -> str:
        decision = chosen.decide(Asked(headers=headers or {}, metadata=metadata or {}), 0.0, 0.0)
        assert decision.by == (CHANCE if decision.target.model == "a" else RULE)
        return decision.target.model

    assert [target({"x-a": value}) for value in ("1", "12", "12x", "")] == ["b", "c", "a", "a"]
    assert [target(metadata={"plan": value}) for value in ("trial", "T", 7, None)] == ["c", "a", "a", "a"]


def test_an_expression_that_runs_away_does_not_match():
    evil = router(
        targets=["a", {"model": "b", "weight": 0}], rules=[{"header": "x", "regex": "(a|a?)+$b", "target": "b"}]
    )
    assert evil.decide(Asked(headers={"x": "a" * 4000}), 0.0, 0.0).target.model == "a"
    fine = router(targets=["a", {"model": "b", "weight": 0}], rules=[{"header": "x", "regex": "a+", "target": "b"}])
    assert fine.decide(Asked(headers={"x": "a" * 4096}), 0.0, 0.0).target.model == "b"
    assert fine.decide(Asked(headers={"x": "a" * 4097}), 0.0, 0.0).target.model == "a", "too long to look at"


def test_a_ramp_moves_users_one_way():
    ramp = {"target": "sql@2", "steps": [1, 5, 25, 100], "every": 60}
    chosen = weighted(1, 0, sticky_by="user", ramp=ramp)
    assert chosen.route.ramp is not None
    seen = [dealt(chosen, now) for now in (-5, 0, 59, 60, 120, 180, 1e9)]
    shares = [0.01, 0.01, 0.01, 0.05, 0.25, 1.0, 1.0]
    for users, share in zip(seen, shares, strict=True):
        assert_within_three_sigma(Counter(users.values()), {"sql@2": share})
    for earlier, later in zip(seen, seen[1:], strict=False):
        assert all(later[user] == "sql@2" for user, model in earlier.items() if model == "sql@2")


def test_documents_come_back_as_they_went():
    document = {
        "targets": ["a", {"model": "b@2:0.5+c", "weight": 2, "max_running": 3}],
        "sticky_by": "header:X-Y",
        "rules": [{"header": "X-A", "exact": "1", "target": "a"}, {"metadata": "M", "regex": "x+", "target": "a"}],
        "fallback": ["a"],
        "shadow": ["c", {"model": "d", "share": 0.5, "log": True}],
        "ramp": {"target": "a", "steps": [1, 100]},
        "guard": {"baseline": "a", "max_latency_ratio": 2},
    }
    route = route_of("prod", document, 7.0)
    written = document_of(route)
    assert route_of("prod", written, 99.0) == route
    assert written["ramp"]["started_at"] == 7.0
    assert (written["rules"][0]["header"], written["rules"][1]["metadata"]) == ("x-a", "M")
    with pytest.raises(InvalidRequest, match="tragets"):
        route_of("prod", {"targets": ["a"], "tragets": []}, 0.0)


def test_what_is_left_when_a_target_is_taken_out():
    ramp = {"target": "b", "steps": [50, 100]}
    rules = [{"header": "x", "exact": "1", "target": "b"}]
    route = router(targets=["a", "b"], ramp=ramp, rules=rules, fallback=["b", "c"]).route
    left = route.without("b", instead="a")
    assert (left.shares(0.0), left.rules, left.fallback, left.ramp) == ((1.0, 0.0), (), ("c",), None)
    alone = router(targets=[{"model": "a", "weight": 0}, "b"]).route.without("b", instead="a")
    assert alone.shares(0.0) == (1.0, 0.0)


def test_who_gets_requests():
    ramp = {"target": "c", "steps": [0, 10]}
    rules = [{"header": "x", "exact": "1", "target": "d"}]
    targets = ["a", *({"model": model, "weight": 0} for model in "bcd")]
    route = router(targets=targets, ramp=ramp, rules=rules, fallback=["b"]).route
    assert {model: route.leads_to(model) for model in "abcde"} == dict(
        zip("abcde", (True, False, True, True, False), strict=True)
    )


def seen_of(answered: int = 0, failed: int = 0, seconds: float = 0.1, **counts: int) -> Observed:
    one = Observed(answered=answered, failed=failed, **counts)
    one.ttft[bin_of(seconds)] = max(answered, 1)
    return one


def test_the_guard():
    route = weighted(9, 1, guard={"baseline": "sql@1", "max_latency_ratio": 2, "min_requests": 20}).route

    def verdict(one: Observed, baseline: Observed | None = None) -> str | None:
        found = judge(route, {"sql@1": baseline or seen_of(100), "sql@2": one})
        assert found is None or found.target == "sql@2"
        return found and found.kind

    assert verdict(seen_of(100)) is None
    assert verdict(seen_of(1, failed=1, non_finite=1)) == "non_finite", "at once"
    assert verdict(seen_of(9, failed=10)) is None, "too few to say"
    assert verdict(seen_of(18, failed=2)) == "error_rate"
    assert verdict(seen_of(18, unavailable=2)) == "error_rate"
    assert verdict(seen_of(18, failed=2), seen_of(90, failed=10)) is None, "the baseline fails as often"
    assert verdict(seen_of(30, seconds=0.19)) is None
    assert verdict(seen_of(30, seconds=0.25)) == "latency"
    assert verdict(seen_of(30, seconds=0.25), seen_of(19)) is None
    assert judge(weighted(9, 1).route, {"sql@2": seen_of(failed=100, non_finite=100)}) is None


def test_windows_forget_and_marks_divide():
    window = Window()
    for now in (0.0, 30.0, 60.0):
        window.count("answered", now)
        window.time("ttft", 0.2, now)
    assert window.since(40, 61.0).answered == 2
    assert window.since(600, 61.0).answered == 3
    window.mark(62.0)
    window.count("failed", 63.0)
    assert (window.since(600, 64.0).ended, window.since_mark(600, 64.0).ended) == (4, 1)
    for now in range(100, 9_000):
        window.mark(now)
    assert window.since(600, 9_000.0).ended == 0
    assert len(window._buckets) < 10, "a mark by itself takes no memory"
    window.count("failed", 10_000.0)
    assert (window.since(600, 10_000.0).ended, window.everything().ended) == (1, 5)
    assert quantile(window.everything().ttft, 0.5) == pytest.approx(0.2, rel=0.03)
    assert quantile(Observed().ttft, 0.5) is None

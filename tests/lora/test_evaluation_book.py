"""Evaluation sets, runs and results, on both databases."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from loraplex.errors import ModelNotFound, RouteChanged, RouteRefused
from loraplex.lora import evaluation_book as book_module
from loraplex.lora.evaluation_book import CANCELLED, DONE, INTERRUPTED, RUNNING, Result, StoredRun, StoredSet
from loraplex.lora.registry import Registry
from loraplex.lora.tables import evaluation_runs

DOCUMENT = {"targets": ["sql@1"]}
A, B = "a" * 64, "b" * 64


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with Registry(registry_url, "base") as registry:
        registry.routes.change("prod", lambda was: DOCUMENT, who="me", action="route_set")
        yield registry


def write(registry: Registry, content: bytes | None, num_cases: int = 1, **more: Any) -> StoredSet | None:
    written: list[StoredSet | None] = []
    registry.routes.change(
        "prod",
        lambda was: was,
        who="me",
        action="route_set",
        within=lambda connection, was, now: written.append(
            registry.evaluations.write(connection, "prod", content, num_cases, "key:1", **more)
        ),
    )
    return written[-1]


def finish(registry: Registry, run: StoredRun, *results: Result) -> bool:
    return registry.evaluations.finish_alone(run, results, {"targets": []})


def test_a_set_is_kept_with_its_history(registry: Registry, registry_url: str):
    evaluations = registry.evaluations
    assert evaluations.find("prod") is None
    with pytest.raises(ModelNotFound, match="no evaluation set"):
        evaluations.get("prod")
    first = write(registry, b"one", 1, expected=0)
    assert first is not None
    assert (first.revision, first.content, first.num_cases, first.who) == (1, b"one", 1, "key:1")
    assert write(registry, b"one") == first, "the same again changes nothing"
    second = write(registry, b"two\n\x00\xff", 2, expected=1)
    with Registry(registry_url, "base") as again:
        assert again.evaluations.get("prod") == second
    with pytest.raises(RouteChanged, match="revision 2 now, not 1"):
        write(registry, b"three", expected=1)
    assert write(registry, None) is None
    assert evaluations.find("prod") is None
    assert write(registry, None) is None
    third = write(registry, b"one", expected=0)
    assert third is not None
    assert third.revision == 4, "a revision is never given twice"
    told = registry.events("prod")[0]
    assert [(one.action, one.version) for one in told[:4]] == [
        ("evaluation_set", 4),
        ("evaluation_delete", 3),
        ("evaluation_set", 2),
        ("evaluation_set", 1),
    ]
    assert told[2].detail == {
        "was": {"digest": first.digest, "cases": 1},
        "now": {"digest": second and second.digest, "cases": 2},
    }
    assert registry.routes.revision("prod") == 1, "the route itself did not change"


def test_what_fails_within_a_change_undoes_it(registry: Registry):
    def within(connection, was, now):
        registry.evaluations.write(connection, "prod", b"lost", 1, "me")
        raise RouteRefused("no")

    with pytest.raises(RouteRefused):
        registry.routes.change("prod", lambda was: {"targets": []}, who="me", action="route_set", within=within)
    assert registry.evaluations.find("prod") is None
    assert registry.routes.get("prod").document == DOCUMENT


def test_a_run_from_beginning_to_end(registry: Registry):
    evaluations = registry.evaluations
    stored = write(registry, b"one")
    assert stored is not None
    run = evaluations.begin(stored, ["sql@1"], 10, "me")
    with pytest.raises(RouteRefused, match="0 of 10") as refused:
        evaluations.begin(stored, ["sql@1"], 10, "me")
    assert refused.value.code == "evaluation_running"
    assert evaluations.progress(run.run_id, 4)
    assert (evaluations.run("prod").state, evaluations.run("prod").done) == (RUNNING, 4)
    assert finish(registry, run, Result(A, "sql@1", 1, 9, 10))
    ended = evaluations.run("prod", run.run_id)
    assert (ended.state, ended.done, ended.report) == (DONE, 10, {"targets": []})
    assert ended.ended_at is not None
    assert evaluations.results("prod") == {A: Result(A, "sql@1", 1, 9, 10)}
    assert evaluations.results("prod")[A].rate == 0.9
    assert not evaluations.progress(run.run_id, 3)
    assert not evaluations.end(run.run_id, CANCELLED)
    assert not finish(registry, run)
    with pytest.raises(ModelNotFound, match="no such run"):
        evaluations.run("prod", "other")


def test_results_are_of_the_set_that_holds_and_the_latest(registry: Registry):
    evaluations = registry.evaluations
    for content, passed in ((b"one", 10), (b"one", 3)):
        stored = write(registry, content)
        assert stored is not None
        run = evaluations.begin(stored, ["sql@1"], 10, "me")
        finish(registry, run, Result(A, "sql@1", stored.revision, passed, 10), Result(B, "x", stored.revision, 1, 10))
    assert evaluations.results("prod")[A].passed == 3
    write(registry, b"two")
    assert evaluations.results("prod") == {}
    write(registry, None)
    assert evaluations.results("prod") == {}


def test_a_cancelled_run_has_no_results(registry: Registry):
    stored = write(registry, b"one")
    assert stored is not None
    run = registry.evaluations.begin(stored, ["sql@1"], 10, "me")
    assert registry.evaluations.end(run.run_id, CANCELLED)
    assert not registry.evaluations.progress(run.run_id, 5)
    assert not finish(registry, run, Result(A, "sql@1", 1, 10, 10))
    assert registry.evaluations.results("prod") == {}


def test_a_run_whose_process_is_gone_is_in_nobodys_way(registry: Registry):
    evaluations = registry.evaluations
    stored = write(registry, b"one")
    assert stored is not None
    run = evaluations.begin(stored, ["sql@1"], 10, "me")
    long_ago = datetime.now(UTC) - timedelta(seconds=book_module.STALE_SECONDS + 1)
    registry._database.write(lambda connection: connection.execute(update(evaluation_runs).values(seen_at=long_ago)))
    assert evaluations.run("prod").state == INTERRUPTED
    evaluations.begin(stored, ["sql@1"], 10, "me")
    assert [one.state for one in evaluations.runs("prod")] == [RUNNING, INTERRUPTED]
    assert run.run_id == evaluations.runs("prod")[1].run_id
    assert not evaluations.progress(run.run_id, 5), "should it come back, it finds out"


def test_the_last_runs_are_remembered(registry: Registry):
    stored = write(registry, b"one")
    assert stored is not None
    for _ in range(book_module.MAX_RUNS + 3):
        finish(registry, registry.evaluations.begin(stored, ["sql@1"], 1, "me"))
    assert len(registry.evaluations.runs("prod")) == book_module.MAX_RUNS

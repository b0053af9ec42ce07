"""EvaluationBook: the evaluation sets of routes, the runs of each, and what targets reached, in the registry.

A set is bytes here; what they mean is `loraplex.evaluation`'s. `revision` counts the changes of an alias's set from 1,
deletions included. A result holds for one revision of the set and one identity of a target; the latest one holds.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from loraplex.errors import ModelNotFound, RouteChanged, RouteRefused
from loraplex.lora.database import Database
from loraplex.lora.event import EVALUATION_DELETE, EVALUATION_SET
from loraplex.lora.rows import in_utc
from loraplex.lora.tables import adapters, evaluation_results, evaluation_runs, evaluation_sets, events

RUNNING, DONE, CANCELLED, INTERRUPTED = "running", "done", "cancelled", "interrupted"
MAX_RUNS = 20
"""Of an alias that are remembered."""
STALE_SECONDS = 30.0
"""A run of which nothing was heard for so long has lost its process."""


@dataclass(frozen=True, slots=True)
class StoredSet:
    """`digest`: SHA-256 of `content`."""

    alias: str
    revision: int
    content: bytes
    digest: str
    num_cases: int
    at: datetime
    who: str


@dataclass(frozen=True, slots=True)
class StoredRun:
    """`targets`: concrete names. `done` of `total` answers are judged."""

    run_id: str
    alias: str
    set_revision: int
    state: str
    targets: tuple[str, ...]
    done: int
    total: int
    who: str
    started_at: datetime
    seen_at: datetime
    ended_at: datetime | None = None
    report: Mapping[str, Any] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Result:
    """What a target reached in a run of the set's revision."""

    identity: str
    model: str
    set_revision: int
    passed: int
    total: int

    @property
    def rate(self) -> float:
        return self.passed / self.total


class EvaluationBook:
    """Any thread may call any method, and several processes may share the database. Methods with a `connection` belong
    to a change of the route (`RouteRevisions.change`), the others are a transaction each. Every method raises
    StorageFull when the database refuses."""

    def __init__(self, database: Database):
        self._database = database

    # -- sets -------------------------------------------------------------------------------------------------

    def find(self, alias: str) -> StoredSet | None:
        with self._database.reading() as connection:
            return _set_of(connection, alias)

    def get(self, alias: str) -> StoredSet:
        """Raises ModelNotFound."""
        found = self.find(alias)
        if found is None:
            raise ModelNotFound(
                f"The route {alias[:64]!r} has no evaluation set. PUT /v1/routes/{alias[:64]}/evaluation stores one.",
                code="evaluation_not_found",
            )
        return found

    def write(
        self,
        connection: Connection,
        alias: str,
        content: bytes | None,
        num_cases: int,
        who: str,
        expected: int | None = None,
    ) -> StoredSet | None:
        """Make `content` the alias's set (None: it has none any more); the same content again changes nothing.
        `expected`: the revision that the caller has seen, 0 for none. Raises RouteChanged."""
        row = connection.execute(select(evaluation_sets).where(evaluation_sets.c.alias == alias)).first()
        was = None if row is None or row.content is None else _set_of_row(row)
        holds = 0 if was is None else was.revision
        if expected is not None and expected != holds:
            raise RouteChanged(
                f"The evaluation set of {alias!r} is at revision {holds} now, not {expected}: somebody changed it. "
                "Look at it again, then send the change with its ETag.",
                param="if-match",
            )
        if (None if was is None else was.content) == content:
            return was
        now = datetime.now(UTC)
        values = {
            "revision": 1 if row is None else row.revision + 1,
            "content": content,
            "digest": "" if content is None else hashlib.sha256(content).hexdigest(),
            "num_cases": num_cases,
            "at": now,
            "who": who[:128],
        }
        if row is None:
            connection.execute(insert(evaluation_sets).values(alias=alias, **values))
        else:
            connection.execute(update(evaluation_sets).where(evaluation_sets.c.alias == alias).values(values))
        seen = {"was": _shown(was), "now": None if content is None else _shown_of(values)}
        action = EVALUATION_DELETE if content is None else EVALUATION_SET
        event = {"at": now, "who": who[:128], "action": action, "name": alias, "version": values["revision"]}
        connection.execute(insert(events).values(**event, detail=seen))
        return None if content is None else StoredSet(alias=alias, **values)

    def drop(self, connection: Connection, alias: str, who: str) -> None:
        """Forget the set, if there is one."""
        if _set_of(connection, alias) is not None:
            self.write(connection, alias, None, 0, who)

    # -- runs -------------------------------------------------------------------------------------------------

    def begin(self, stored: StoredSet, targets: Sequence[str], total: int, who: str) -> StoredRun:
        """Raises RouteRefused while another run of the alias goes on."""
        now = datetime.now(UTC)
        run = StoredRun(
            run_id=secrets.token_hex(8),
            alias=stored.alias,
            set_revision=stored.revision,
            state=RUNNING,
            targets=tuple(targets),
            done=0,
            total=total,
            who=who[:128],
            started_at=now,
            seen_at=now,
        )

        def write(connection: Connection) -> None:
            # others who begin one, or change the route or its set, wait here
            connection.execute(select(adapters.c.name).where(adapters.c.name == stored.alias).with_for_update())
            runs = _runs(connection, stored.alias)
            if other := next((one for one in runs if one.state == RUNNING), None):
                raise RouteRefused(
                    f"The evaluation set of {stored.alias!r} is being run already ({other.run_id}, {other.done} of "
                    f"{other.total}). Wait for it, or cancel it: DELETE "
                    f"/v1/routes/{stored.alias}/evaluation/runs/{other.run_id}.",
                    code="evaluation_running",
                )
            lost = [one.run_id for one in runs if one.state == INTERRUPTED]
            forget = update(evaluation_runs).where(evaluation_runs.c.id.in_(lost))
            connection.execute(forget.values(state=INTERRUPTED))  # should its process come back, it finds out
            old = [one.run_id for one in runs[MAX_RUNS - 1 :]]
            connection.execute(delete(evaluation_runs).where(evaluation_runs.c.id.in_(old)))
            values = {name: getattr(run, name) for name in run.__dataclass_fields__ if name != "run_id"}
            connection.execute(insert(evaluation_runs).values(id=run.run_id, **{**values, "targets": list(targets)}))

        self._database.write(write)
        return run

    def progress(self, run_id: str, done: int) -> bool:
        """The run goes on; False: it was cancelled."""
        values = {"done": done, "seen_at": datetime.now(UTC)}
        return self._update(run_id, values)

    def end(self, run_id: str, state: str) -> bool:
        """It ended without results; False: it had ended before."""
        return self._update(run_id, {"state": state, "ended_at": datetime.now(UTC)})

    def _update(self, run_id: str, values: Mapping[str, Any]) -> bool:
        change = update(evaluation_runs).where(evaluation_runs.c.id == run_id, evaluation_runs.c.state == RUNNING)
        return self._database.write(lambda connection: connection.execute(change.values(values)).rowcount > 0)

    def finish(
        self, connection: Connection, run: StoredRun, results: Sequence[Result], report: Mapping[str, Any]
    ) -> bool:
        """It ended with results, which hold from now on; False and nothing: it was cancelled before."""
        now = datetime.now(UTC)
        ended = {"state": DONE, "done": run.total, "seen_at": now, "ended_at": now, "report": dict(report)}
        change = update(evaluation_runs).where(evaluation_runs.c.id == run.run_id, evaluation_runs.c.state == RUNNING)
        if not connection.execute(change.values(ended)).rowcount:
            return False
        for one in results:
            is_it = (evaluation_results.c.alias == run.alias) & (evaluation_results.c.identity == one.identity)
            connection.execute(delete(evaluation_results).where(is_it))
            values = {name: getattr(one, name) for name in Result.__dataclass_fields__}
            values["model"] = one.model[:1024]
            connection.execute(insert(evaluation_results).values(alias=run.alias, run_id=run.run_id, at=now, **values))
        return True

    def finish_alone(self, run: StoredRun, results: Sequence[Result], report: Mapping[str, Any]) -> bool:
        """The same, where the route is gone."""
        return self._database.write(lambda connection: self.finish(connection, run, results, report))

    def runs(self, alias: str) -> Sequence[StoredRun]:
        """The latest first, without reports."""
        with self._database.reading() as connection:
            return [replace(run, report=None) for run in _runs(connection, alias)]

    def run(self, alias: str, run_id: str | None = None) -> StoredRun:
        """A run of the alias, by default the latest. Raises ModelNotFound."""
        with self._database.reading() as connection:
            for one in _runs(connection, alias):
                if run_id in (None, one.run_id):
                    return one
        raise ModelNotFound(
            f"The route {alias[:64]!r} has no such run. GET /v1/routes/{alias[:64]}/evaluation/runs lists its runs.",
            code="evaluation_not_found",
        )

    # -- results ----------------------------------------------------------------------------------------------

    def results(self, alias: str, connection: Connection | None = None) -> Mapping[str, Result]:
        """By identity, of the revision of the set that holds; empty without a set."""
        if connection is None:
            with self._database.reading() as reading:
                return self.results(alias, reading)
        query = select(evaluation_results).join(
            evaluation_sets,
            (evaluation_sets.c.alias == evaluation_results.c.alias)
            & (evaluation_sets.c.revision == evaluation_results.c.set_revision),
        )
        rows = connection.execute(
            query.where(evaluation_results.c.alias == alias, evaluation_sets.c.content.is_not(None))
        )
        return {row.identity: Result(row.identity, row.model, row.set_revision, row.passed, row.total) for row in rows}


def _set_of(connection: Connection, alias: str) -> StoredSet | None:
    row = connection.execute(select(evaluation_sets).where(evaluation_sets.c.alias == alias)).first()
    return None if row is None or row.content is None else _set_of_row(row)


def _set_of_row(row: Row[Any]) -> StoredSet:
    return StoredSet(row.alias, row.revision, row.content, row.digest, row.num_cases, in_utc(row.at), row.who)


def _runs(connection: Connection, alias: str) -> list[StoredRun]:
    query = select(evaluation_runs).where(evaluation_runs.c.alias == alias)
    rows = connection.execute(query.order_by(evaluation_runs.c.started_at.desc(), evaluation_runs.c.id))
    return [_run_of_row(row) for row in rows]


def _run_of_row(row: Row[Any]) -> StoredRun:
    seen = in_utc(row.seen_at)
    is_lost = row.state == RUNNING and datetime.now(UTC) - seen > timedelta(seconds=STALE_SECONDS)
    return StoredRun(
        run_id=row.id,
        alias=row.alias,
        set_revision=row.set_revision,
        state=INTERRUPTED if is_lost else row.state,
        targets=tuple(row.targets),
        done=row.done,
        total=row.total,
        who=row.who,
        started_at=in_utc(row.started_at),
        seen_at=seen,
        ended_at=None if row.ended_at is None else in_utc(row.ended_at),
        report=row.report,
    )


def _shown(stored: StoredSet | None) -> dict[str, Any] | None:
    return None if stored is None else _shown_of({"digest": stored.digest, "num_cases": stored.num_cases})


def _shown_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"digest": values["digest"], "cases": values["num_cases"]}

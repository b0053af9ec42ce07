"""RouteRevisions: the routes of the registry, every revision of each, and who made it.

A route is a document here; what it means is `loraplex.routing`'s. A revision and its event are one transaction, so what
was acknowledged is there after a crash, and a reader sees the one before or the one after.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, func, insert, select

from loraplex.errors import AdapterConflict, ModelNotFound, RouteChanged
from loraplex.lora.database import Database
from loraplex.lora.event import ROUTE_ROLLBACK
from loraplex.lora.rows import in_utc
from loraplex.lora.steps import Step, unwatched
from loraplex.lora.tables import adapters, events, routes, versions
from loraplex.lora.version import READY
from loraplex.routing.names import validate_name

Document = Mapping[str, Any]
Within = Callable[[Connection, Document | None, Document | None], None]
"""What else belongs to a change of a route: called in its transaction with the documents before and after, when both
are known. It may write, and what it raises undoes the change. Others who change the alias wait meanwhile."""


@dataclass(frozen=True, slots=True)
class RouteRevision:
    """What an alias means since `at`. `revision` counts from 1 over all changes of the alias, deletions included;
    `origin` is the revision that first said this. `document` None: the route was deleted."""

    alias: str
    revision: int
    origin: int
    document: Document | None = field(hash=False)
    at: datetime
    who: str


class RouteRevisions:
    """Any thread may call any method, and several processes may share the database. Every method raises StorageFull
    when the database refuses."""

    def __init__(self, database: Database, step: Step = unwatched):
        self._database = database
        self._step = step

    # -- questions --------------------------------------------------------------------------------------------

    def revision(self, alias: str) -> int | None:
        """The number of the revision that holds; None when there is no such route."""
        query = select(routes.c.revision, routes.c.document.is_(None)).where(routes.c.alias == alias)
        with self._database.reading() as connection:
            row = connection.execute(query.order_by(routes.c.revision.desc()).limit(1)).first()
            return None if row is None or row[1] else row[0]

    def get(self, alias: str) -> RouteRevision:
        """The revision that holds. Raises ModelNotFound."""
        with self._database.reading() as connection:
            found = _last(connection, alias)
        if found is None or found.document is None:
            raise route_not_found(alias)
        return found

    def list(self) -> Sequence[RouteRevision]:
        """The revisions that hold, by alias."""
        last = select(routes.c.alias, func.max(routes.c.revision).label("last")).group_by(routes.c.alias).subquery()
        query = (
            select(routes)
            .join(last, (routes.c.alias == last.c.alias) & (routes.c.revision == last.c.last))
            .where(routes.c.document.is_not(None))
            .order_by(routes.c.alias)
        )
        with self._database.reading() as connection:
            return tuple(map(_of_row, connection.execute(query)))

    def refuse_alias(self, name: str) -> None:
        """Raises AdapterConflict when `name` is a route's."""
        with self._database.reading() as connection:
            refuse_alias(connection, name)

    # -- changes ----------------------------------------------------------------------------------------------

    def change(
        self,
        alias: str,
        make: Callable[[Document | None], Document | None],
        *,
        who: str,
        action: str,
        expected: int | None = None,
        reason: Mapping[str, Any] | None = None,
        within: Within = lambda connection, was, now: None,
    ) -> RouteRevision:
        """Make the document that `make` makes of the present one (None: there is none) the alias's next revision; a
        document that says the same makes none. `expected`: the revision that the caller has seen, 0 for none.

        Raises RouteChanged when another holds, AdapterConflict when the name is an adapter's, InvalidName, and what
        `make` and `within` raise.
        """
        validate_name(alias)

        def write(connection: Connection) -> RouteRevision:
            self._step("route: begun")
            current = _claim(connection, alias)
            was = None if current is None else current.document
            _expect(alias, current, expected)
            now = make(was)
            within(connection, was, now)
            if now == was:
                if current is None:
                    raise route_not_found(alias)
                return current
            number = 1 if current is None else current.revision + 1
            return self._write(connection, RouteRevision(alias, number, number, now, _now(), who), action, was, reason)

        return self._committed(write)

    def rollback(
        self,
        alias: str,
        to: int | None,
        make: Callable[[Document], Document],
        *,
        who: str,
        expected: int | None = None,
    ) -> RouteRevision:
        """Make the revision `to` hold again, by default the one before what holds now: again, and the one before that
        follows. `make` has the last word on the document. Raises ModelNotFound, AdapterConflict, RouteChanged."""

        def write(connection: Connection) -> RouteRevision:
            self._step("route: begun")
            current = _claim(connection, alias)
            _expect(alias, current, expected)
            if current is None or current.document is None:
                raise route_not_found(alias)
            number = current.origin - 1 if to is None else to
            row = connection.execute(_revisions(alias).where(routes.c.revision == number)).first()
            target = None if row is None else _of_row(row)
            if target is None or target.document is None:
                raise AdapterConflict(
                    f"There is nothing to roll back to: the route {alias!r} has no revision {number} with targets. GET "
                    f"/v1/routes/{alias}/history lists its revisions.",
                    param="revision",
                )
            document = make(target.document)
            new = RouteRevision(alias, current.revision + 1, target.origin, document, _now(), who)
            return self._write(connection, new, ROUTE_ROLLBACK, current.document, {"to": number})

        return self._committed(write)

    def _write(
        self,
        connection: Connection,
        new: RouteRevision,
        action: str,
        was: Document | None,
        reason: Mapping[str, Any] | None,
    ) -> RouteRevision:
        connection.execute(
            insert(routes).values(
                alias=new.alias,
                revision=new.revision,
                origin=new.origin,
                document=None if new.document is None else dict(new.document),
                at=new.at,
                who=new.who[:128],
            )
        )
        self._step("route: revision written")
        detail = {"was": was, "now": new.document, **({} if reason is None else {"reason": dict(reason)})}
        connection.execute(
            insert(events).values(
                at=new.at, who=new.who[:128], action=action, name=new.alias, version=new.revision, detail=detail
            )
        )
        self._step("route: event written")
        return new

    def _committed(self, write: Callable[[Connection], RouteRevision]) -> RouteRevision:
        changed = self._database.write(write)
        self._step("route: committed")
        return changed

    def check_integrity(self) -> None:
        """No name is both a route and an adapter. Raises AssertionError."""
        aliases = {one.alias for one in self.list()}
        with self._database.reading() as connection:
            names = connection.execute(select(versions.c.name).where(versions.c.state == READY).distinct()).scalars()
            assert not (both := aliases & set(names)), f"routes and adapters at once: {sorted(both)}"


def refuse_alias(connection: Connection, name: str) -> None:
    """Within the transaction that makes `name` an adapter's. Raises AdapterConflict when it is a route's."""
    found = _last(connection, name)
    if found is not None and found.document is not None:
        raise AdapterConflict(
            f"{name!r} is the name of a route, and adapters and routes share one name space. Choose another name, or "
            f"delete the route.",
            param="name",
        )


def _claim(connection: Connection, alias: str) -> RouteRevision | None:
    """The last revision. Until the transaction ends others who change the name, as route or adapter, wait. Raises
    AdapterConflict when it is an adapter's."""
    query = select(adapters.c.last_version).where(adapters.c.name == alias)
    if connection.execute(query.with_for_update()).scalar() is None:
        connection.execute(insert(adapters).values(name=alias, last_version=0))
    taken = select(versions.c.version).where(versions.c.name == alias, versions.c.state == READY).limit(1)
    if connection.execute(taken).first() is not None:
        raise AdapterConflict(
            f"{alias!r} is the name of an adapter, and adapters and routes share one name space. Choose another alias.",
            param="alias",
        )
    return _last(connection, alias)


def _expect(alias: str, current: RouteRevision | None, expected: int | None) -> None:
    holds = 0 if current is None or current.document is None else current.revision
    if expected is not None and expected != holds:
        raise RouteChanged(
            f"The route {alias!r} is at revision {holds} now, not {expected}: somebody changed it. Look at it again, "
            "then send the change with its ETag.",
            param="if-match",
        )


def route_not_found(alias: str) -> ModelNotFound:
    return ModelNotFound(
        f"There is no route {alias[:64]!r}. 'loraplex route show' and GET /v1/routes list those there are."
    )


def _last(connection: Connection, alias: str) -> RouteRevision | None:
    row = connection.execute(_revisions(alias).limit(1)).first()
    return None if row is None else _of_row(row)


def _revisions(alias: str) -> Select[Any]:
    return select(routes).where(routes.c.alias == alias).order_by(routes.c.revision.desc())


def _of_row(row: Row[Any]) -> RouteRevision:
    return RouteRevision(row.alias, row.revision, row.origin, row.document, in_utc(row.at), row.who)


def _now() -> datetime:
    return datetime.now(UTC)

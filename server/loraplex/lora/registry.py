"""Registry: which versions of which adapters exist, what a name means, the files they are made of, and who changed it.

A version is named here only after its files are durable in the store, and files leave the store only after no
version names them. Version numbers of a name only grow, also over deletion. Every change writes its Event in its own
transaction.

What a name means is decided by precedence: of its ready versions on the base the one with the highest. A push gives
the next higher one; a rollback sets those above its target to 0, so it undoes pushes as a stack does, and a later push
is on top again. Versions with 0 count only where there is no other: then the newest.

A quarantined version keeps its precedence: what it is the meaning of gets an error, and no other version in its place.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import URL, ColumnElement, Connection, Select, case, func, insert, select, true, update

from loraplex.errors import AdapterConflict, InvalidRequest, ModelNotFound
from loraplex.lora.database import Database
from loraplex.lora.digest import validate_digest
from loraplex.lora.evaluation_book import EvaluationBook
from loraplex.lora.event import DELETE, PUSH, QUARANTINE, ROLLBACK, Event
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.parents import Parents, check_parent, refuse_parents
from loraplex.lora.pins import Pins
from loraplex.lora.route_revisions import RouteRevisions, refuse_alias
from loraplex.lora.rows import event_of_row, row_of_version, version_of_row
from loraplex.lora.steps import Step, unwatched
from loraplex.lora.tables import adapters, events, identity, versions
from loraplex.lora.version import DELETED, INCOMPATIBLE, QUARANTINED, READY, Version, refuse_quarantined
from loraplex.routing.names import ModelRef, validate_name

_MAX_SOURCE_CHARS = 1024
_BY_PRECEDENCE = (versions.c.precedence.desc(), versions.c.version.desc())
_IS_READY = versions.c.state == READY
_LISTING = "'loraplex ls' and GET /v1/models list"


@dataclass(frozen=True, slots=True)
class Change:
    """What a name means now, and what it meant before (None: nothing). `is_new`: the version was created."""

    version: Version
    previous: Version | None
    is_new: bool = False


class Registry:
    """The registry in the database `url`, as seen by one who serves the base `base_fingerprint`: versions of other
    bases are INCOMPATIBLE, which are listed, and never what a name means.

    Any thread may call any method, and several processes may share the database. Changes are durable when they return.
    Every method raises StorageFull when the database refuses. Closed by `close` or as a `with`. Raises StartupError
    when the database cannot be opened or was made by a newer release.
    """

    def __init__(self, url: str | URL, base_fingerprint: str, step: Step = unwatched):
        self._database = Database(url)
        self._base = base_fingerprint
        self._step = step
        self.routes = RouteRevisions(self._database, step)
        self.evaluations = EvaluationBook(self._database)
        self.pins = Pins(self._database, base_fingerprint)
        self.parents = Parents(self._database, base_fingerprint)
        self._listed: tuple[Hashable, Sequence[Version]] = (None, ())  # all that names mean, at a revision
        self._is_mine = _IS_READY & (versions.c.base_fingerprint == base_fingerprint)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def identity(self) -> str:
        """What tells this registry from any other: 32 hexadecimal digits."""
        with self._database.reading() as connection:
            return connection.execute(select(identity.c.id)).scalar_one()

    # -- changes ----------------------------------------------------------------------------------------------

    def publish(
        self,
        name: str,
        digest: str,
        facts: AdapterFacts,
        *,
        source: str,
        who: str,
        report: Mapping[str, Any] | None = None,
        proof: Mapping[str, Any] | None = None,
        parent: ModelRef | None = None,
    ) -> Change:
        """Make `name` mean the files `digest`, on top of the version `parent`.

        If a ready version of the name on this base is made of them and has that parent, it is that version, with the
        new report and proof if it had none, and out of quarantine; else they become the next version. Raises
        InvalidName, AdapterConflict for the name of a route, and as `check_parent`.
        """
        validate_name(name)
        validate_digest(digest)
        new = Version(
            name=name,
            version=0,
            digest=digest,
            base_fingerprint=self._base,
            state=READY,
            created_at=datetime.now(UTC),
            # a path may hold bytes that are no text
            source=source[:_MAX_SOURCE_CHARS].encode(errors="replace").decode(),
            facts=facts,
            report=report,
            proof=proof,
            parent=parent,
        )

        def change(connection: Connection) -> Change:
            self._step("publish: begun")
            last = self._claim(connection, name, parent)
            refuse_alias(connection, name)
            if parent is not None:
                check_parent(connection, parent, name, self._base)
            same = self._first(connection, self._mine(name).where(versions.c.digest == digest, _stands_on(parent)))
            previous = self._current(connection, name)
            if previous is not None and (previous.digest, previous.parent) == (digest, parent):
                same = previous
            if same is not None:
                renewed, changes = _renewed(same, new)
                if same != previous:
                    changes["precedence"] = self._top(connection, name)
                if changes:
                    connection.execute(update(versions).where(_is(same)).values(changes))
                if same != previous or same.state == QUARANTINED:
                    lifted = {"lifted": "quarantine"} if same.state == QUARANTINED else {}
                    self._record(connection, who, PUSH, same, was=previous, now=same, is_new=False, **lifted)
                return Change(renewed, previous)
            version = replace(new, version=last + 1)
            connection.execute(update(adapters).where(adapters.c.name == name).values(last_version=version.version))
            self._step("publish: numbered")
            row = {**row_of_version(version), "state": READY, "precedence": self._top(connection, name)}
            connection.execute(insert(versions).values(row))
            self._step("publish: version written")
            told = {"source": new.source, **({} if parent is None else {"parent": str(parent)})}
            self._record(connection, who, PUSH, version, was=previous, now=version, is_new=True, **told)
            self._step("publish: event written")
            return Change(version, previous, is_new=True)

        changed = self._database.write(change)
        self._step("publish: committed")
        return changed

    def rollback(self, name: str, to: int | None = None, *, who: str) -> Change:
        """Make `name` mean the version `to` again, by default the one that it meant before the last push.

        The versions that went live after it are withdrawn: `name` does not come back to them by itself, only to
        `name@n`, by another rollback `to` them or by a push of their files. Raises ModelNotFound, and AdapterConflict
        when there is nothing to roll back to.
        """

        def change(connection: Connection) -> Change:
            self._step("rollback: begun")
            self._lock(connection, name)
            current = self._current(connection, name)
            if current is None:
                raise self._not_found(connection, name, None)
            target = self._before(connection, current) if to is None else self._exactly(connection, name, to)
            refuse_quarantined(target)
            if target == current:
                return Change(current, current)
            above = self._precedence(connection, target)
            if above == 0:  # withdrawn itself: it comes back on top
                chosen = update(versions).where(_is(target)).values(precedence=self._top(connection, name))
            else:
                chosen = (
                    update(versions)
                    .where(self._is_mine, versions.c.name == name, versions.c.precedence > above)
                    .values(precedence=0)
                )
            connection.execute(chosen)
            self._step("rollback: others withdrawn")
            self._record(connection, who, ROLLBACK, target, was=current, now=target)
            self._step("rollback: event written")
            return Change(target, current)

        changed = self._database.write(change)
        self._step("rollback: committed")
        return changed

    def delete(self, name: str, version: int | None = None, *, who: str) -> Sequence[Version]:
        """Delete `version` of `name`, which may be incompatible, or all its versions on this base; returns them as they
        were, oldest first. Raises ModelNotFound, and AdapterConflict when others stand on one of them.

        Only the registry forgets them: running requests hold the files, and the store's sweep removes them
        later.
        """
        which = (versions.c.name == name) & (self._is_mine if version is None else _IS_READY)
        if version is not None:
            which &= versions.c.version == version

        def change(connection: Connection) -> Sequence[Version]:
            self._step("delete: begun")
            self._lock(connection, name)
            deleted = self._all(connection, select(versions).where(which).order_by(versions.c.version))
            if not deleted:
                raise self._not_found(connection, name, version)
            refuse_parents(connection, deleted)
            was = self._current(connection, name)
            connection.execute(update(versions).where(which).values(state=DELETED, deleted_at=datetime.now(UTC)))
            self._step("delete: version marked")
            now = self._current(connection, name)
            for one in deleted:
                self._record(connection, who, DELETE, one, was=was, now=now)
                was = now  # one event tells of the change, so that each begins where the one before it ended
            self._step("delete: event written")
            return deleted

        changed = self._database.write(change)
        self._step("delete: committed")
        return changed

    def quarantine(self, digest: str, reason: str, *, who: str) -> Sequence[Version]:
        """Serve no version that is made of these files on this base, until one is pushed again; returns those that were
        served until now."""
        which = self._is_mine & (versions.c.digest == digest) & versions.c.quarantine.is_(None)

        def change(connection: Connection) -> Sequence[Version]:
            found = self._all(connection, select(versions).where(which).order_by(versions.c.name, versions.c.version))
            for name in dict.fromkeys(one.name for one in found):
                self._lock(connection, name)
            why = {"reason": reason, "at": datetime.now(UTC).isoformat(timespec="milliseconds")}
            connection.execute(update(versions).where(which).values(quarantine=why))
            for one in found:
                current = self._current(connection, one.name)
                self._record(connection, who, QUARANTINE, one, was=current, now=current, reason=reason)
            return found

        return self._database.write(change)

    # -- questions --------------------------------------------------------------------------------------------

    def get(self, name: str, version: int | None = None) -> Version:
        """What `name` means, or exactly `version`, to be served. Raises ModelNotFound, also for INCOMPATIBLE ones, and
        AdapterQuarantined."""
        with self._database.reading() as connection:
            query = self._mine(name) if version is None else self._mine(name).where(versions.c.version == version)
            found = self._first(connection, query)
            if found is None:
                raise self._not_found(connection, name, version)
        refuse_quarantined(found)
        return found

    def look(self, name: str, version: int | None = None) -> Version:
        """As `get`, to be shown: an INCOMPATIBLE or QUARANTINED version, too. Raises ModelNotFound."""
        query = select(versions).where(versions.c.name == name, _IS_READY).order_by(*self._mine_first())
        if version is not None:
            query = query.where(versions.c.version == version)
        with self._database.reading() as connection:
            found = self._first(connection, query)
            if found is None:
                raise self._not_found(connection, name, version)
            return found

    def list(self, offset: int = 0, limit: int | None = None) -> Sequence[Version]:
        """What every name means, by name; of a name that means nothing on this base its newest INCOMPATIBLE version."""
        rank = func.row_number().over(partition_by=versions.c.name, order_by=self._mine_first()).label("place")
        ranked = select(versions.c.name, versions.c.version, rank).where(_IS_READY).subquery()
        query = (
            select(versions)
            .join(ranked, (versions.c.name == ranked.c.name) & (versions.c.version == ranked.c.version))
            .where(ranked.c.place == 1)
            .order_by(versions.c.name)
        )
        is_all = offset == 0 and limit is None
        revision = self._database.revision() if is_all else None  # asked first: it may be older than what is read
        known, found = self._listed
        if is_all and revision == known:
            return found
        with self._database.reading() as connection:
            found = self._all(connection, _page(query, offset, limit))
        if is_all:
            self._listed = (revision, found)
        return found

    def versions(self, name: str) -> Sequence[Version]:
        """The versions of `name` that are not deleted, newest first; empty if there are none."""
        query = select(versions).where(versions.c.name == name, _IS_READY).order_by(versions.c.version.desc())
        with self._database.reading() as connection:
            return self._all(connection, query)

    def count(self) -> int:
        """How many names have a version that is not deleted."""
        query = select(func.count(versions.c.name.distinct())).where(_IS_READY)
        with self._database.reading() as connection:
            return connection.execute(query).scalar_one()

    def events(self, name: str | None = None, offset: int = 0, limit: int | None = None) -> tuple[Sequence[Event], int]:
        """The changes of `name` or of all names, latest first, and how many there are. Raises ModelNotFound for a name
        that never was."""
        which = true() if name is None else events.c.name == name
        query = _page(select(events).where(which).order_by(events.c.id.desc()), offset, limit)
        with self._database.reading() as connection:
            total = connection.execute(select(func.count(events.c.id)).where(which)).scalar_one()
            if name is not None and not total and not self._was_ever(connection, name):
                raise self._not_found(connection, name, None)
            return tuple(map(event_of_row, connection.execute(query))), total

    def proofs(self, digest: str) -> Sequence[Mapping[str, Any]]:
        """What proofs of these files on this base found, as far as nothing has spoken against them since, latest
        first."""
        holds = versions.c.proof.is_not(None) & versions.c.quarantine.is_(None)
        query = select(versions.c.proof).where(self._is_mine, versions.c.digest == digest, holds)
        with self._database.reading() as connection:
            return connection.execute(query.order_by(versions.c.created_at.desc()).limit(8)).scalars().all()

    def live_digests(self) -> frozenset[str]:
        """The digests that a version names, of whatever base; the store's sweep keeps them."""
        with self._database.reading() as connection:
            return frozenset(connection.execute(select(versions.c.digest).where(_IS_READY).distinct()).scalars())

    def check_integrity(self) -> None:
        """Raise AssertionError if a version is newer than its name's last number, two share a precedence, or a route
        has an adapter's name."""
        beyond = (
            select(versions.c.name, versions.c.version)
            .join(adapters, adapters.c.name == versions.c.name)
            .where(versions.c.version > adapters.c.last_version)
        )
        doubled = select(versions.c.name).where(versions.c.precedence > 0)
        doubled = doubled.group_by(versions.c.name, versions.c.precedence).having(func.count() > 1)
        with self._database.reading() as connection:
            assert (row := connection.execute(beyond).first()) is None, f"{row} is beyond its name's last version"
            assert (row := connection.execute(doubled).first()) is None, f"two versions of {row} have one precedence"
        self.routes.check_integrity()
        self.parents.check_integrity()

    # -- within a transaction ---------------------------------------------------------------------------------

    def _lock(self, connection: Connection, *names: str) -> Mapping[str, int]:
        """The last numbers of those that are there. Until the transaction ends others who change them wait. Several are
        locked in one order, so that nobody waits for who waits for them."""
        query = select(adapters.c.name, adapters.c.last_version).where(adapters.c.name.in_(names))
        rows = connection.execute(query.order_by(adapters.c.name).with_for_update())
        return {row.name: row.last_version for row in rows}

    def _claim(self, connection: Connection, name: str, parent: ModelRef | None) -> int:
        """As `_lock` for a name that need not be there yet, and that of its parent. Of two who make it at once the
        second waits, and is then run again by `Database.write`."""
        last = self._lock(connection, name, *([] if parent is None else [parent.name])).get(name)
        if last is None:
            connection.execute(insert(adapters).values(name=name, last_version=0))
        return last or 0

    def _mine(self, name: str) -> Select[Any]:
        return select(versions).where(versions.c.name == name, self._is_mine).order_by(*_BY_PRECEDENCE)

    def _mine_first(self) -> tuple[ColumnElement[Any], ...]:
        return (case((versions.c.base_fingerprint == self._base, 0), else_=1), *_BY_PRECEDENCE)

    def _current(self, connection: Connection, name: str) -> Version | None:
        return self._first(connection, self._mine(name))

    def _exactly(self, connection: Connection, name: str, version: int) -> Version:
        found = self._first(connection, self._mine(name).where(versions.c.version == version))
        if found is None:
            raise self._not_found(connection, name, version)
        return found

    def _before(self, connection: Connection, current: Version) -> Version:
        earlier = self._mine(current.name).where(
            versions.c.precedence > 0,
            versions.c.precedence < self._precedence(connection, current),
            versions.c.quarantine.is_(None),
        )
        target = self._first(connection, earlier)
        if target is None:
            raise AdapterConflict(
                f"There is nothing to roll back to: no version of {current.name!r} that is still there went live "
                f"before {current.model_id}. Name the version to roll back to, or push another.",
                param="version",
            )
        return target

    def _precedence(self, connection: Connection, version: Version) -> int:
        return connection.execute(select(versions.c.precedence).where(_is(version))).scalar_one()

    def _top(self, connection: Connection, name: str) -> int:
        """A precedence above all that the name's versions have, deleted ones included."""
        highest = connection.execute(select(func.max(versions.c.precedence)).where(versions.c.name == name)).scalar()
        return (highest or 0) + 1

    def _first(self, connection: Connection, query: Select[Any]) -> Version | None:
        row = connection.execute(query.limit(1)).first()
        return None if row is None else version_of_row(row, self._base)

    def _all(self, connection: Connection, query: Select[Any]) -> Sequence[Version]:
        return tuple(version_of_row(row, self._base) for row in connection.execute(query))

    def _record(
        self,
        connection: Connection,
        who: str,
        action: str,
        version: Version,
        *,
        was: Version | None,
        now: Version | None,
        **detail: Any,
    ) -> None:
        meant = {"was": was and was.model_id, "now": now and now.model_id}
        connection.execute(
            insert(events).values(
                at=datetime.now(UTC),
                who=who[:128],
                action=action,
                name=version.name,
                version=version.version,
                detail={"digest": version.digest, **meant, **detail},
            )
        )

    def _was_ever(self, connection: Connection, name: str) -> bool:
        """Whether it was an adapter's; a route's name has a row without versions."""
        query = select(adapters.c.name).where(adapters.c.name == name, adapters.c.last_version > 0)
        return connection.execute(query).first() is not None

    def _not_found(self, connection: Connection, name: str, version: int | None) -> ModelNotFound:
        there = select(versions).where(versions.c.name == name, _IS_READY).order_by(versions.c.version)
        found = self._all(connection, there)
        foreign = [one.model_id for one in found if one.state == INCOMPATIBLE]
        numbers = [str(one.version) for one in found]
        if foreign and (len(foreign) == len(found) if version is None else f"{name}@{version}" in foreign):
            which = foreign[-10:] if version is None else [f"{name}@{version}"]
            were = "was" if len(which) == 1 else "were"
            return ModelNotFound(
                f"{', '.join(map(repr, which))} {were} checked on another base model than the one served now, and so "
                "not served. Push the adapter again to have it checked on this one, or delete it by name and version.",
                param="model",
                code="adapter_incompatible",
            )
        if numbers and version is not None:
            message = f"The adapter {name!r} has no version {version}. Its versions are {', '.join(numbers[-10:])}."
        elif self._was_ever(connection, name):
            message = f"The adapter {name!r} was deleted. Push it again, or choose another; {_LISTING} them."
        else:
            message = f"There is no adapter {name[:64]!r}. {_LISTING} those there are."
        return ModelNotFound(message, param="model")


def _renewed(version: Version, pushed: Version) -> tuple[Version, dict[str, Any]]:
    """A version whose files were pushed again, and the columns that change: what its checks found, if it is not known
    or they have just lifted a quarantine."""
    changes: dict[str, Any] = {}
    if version.state == QUARANTINED:
        changes["quarantine"] = None
        version = replace(version, state=READY, quarantine=None, proof=None if pushed.proof else version.proof)
    for found in ("report", "proof"):
        new = getattr(pushed, found)
        if new is not None and getattr(version, found) is None:
            changes[found] = dict(new)
            version = replace(version, **{found: new})
    return version, changes


def _stands_on(parent: ModelRef | None) -> ColumnElement[bool]:
    if parent is None:
        return versions.c.parent.is_(None)
    return (versions.c.parent == parent.name) & (versions.c.parent_version == parent.version)


def _is(version: Version) -> ColumnElement[bool]:
    return (versions.c.name == version.name) & (versions.c.version == version.version)


def _page(query: Select[Any], offset: int, limit: int | None) -> Select[Any]:
    if offset < 0 or (limit is not None and limit < 0):
        raise InvalidRequest("offset and limit are counts, so they are not negative. Leave them out for all.")
    return query.offset(offset).limit(limit)

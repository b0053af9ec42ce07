"""Pins: the operators' wishes that an adapter stay in RAM, kept over restarts. The engine fulfils them.

A pin of a name follows it to its next versions; a pin of `name@n` is that version's.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import ColumnElement, Connection, delete, exists, func, insert, select

from loraplex.lora.database import Database
from loraplex.lora.event import PIN, UNPIN
from loraplex.lora.rows import version_of_row
from loraplex.lora.tables import events, pins, versions
from loraplex.lora.version import READY, Version

_WHATEVER = 0


@dataclass(frozen=True, slots=True)
class Pin:
    """`version` None: whatever the name means."""

    name: str
    version: int | None

    @property
    def model(self) -> str:
        """As a request names it."""
        return self.name if self.version is None else f"{self.name}@{self.version}"


class Pins:
    """Those of the servers of the base `base_fingerprint`. Any thread may call any method. Every method raises
    StorageFull when the database refuses."""

    def __init__(self, database: Database, base_fingerprint: str):
        self._database = database
        self._base = base_fingerprint
        self._is_mine = pins.c.base_fingerprint == base_fingerprint

    def add(self, pin: Pin, *, who: str) -> bool:
        """Remember it, durably; False: it was known."""
        values = {"name": pin.name, "version": pin.version or _WHATEVER, "base_fingerprint": self._base}

        def change(connection: Connection) -> bool:
            if connection.execute(select(pins).where(self._is_mine, self._is(pin))).first() is not None:
                return False
            connection.execute(insert(pins).values(values))
            self._record(connection, PIN, pin, who)
            return True

        return self._database.write(change)

    def remove(self, wanted: Collection[Pin], *, who: str) -> None:
        """Forget them, durably; those that are not there are no mistake."""

        def change(connection: Connection) -> None:
            for pin in wanted:
                if connection.execute(delete(pins).where(self._is_mine, self._is(pin))).rowcount:
                    self._record(connection, UNPIN, pin, who)

        self._database.write(change)

    def list(self, name: str | None = None) -> Sequence[Pin]:
        """All, or those of a name."""
        query = select(pins.c.name, pins.c.version).where(self._is_mine).order_by(pins.c.name, pins.c.version)
        if name is not None:
            query = query.where(pins.c.name == name)
        with self._database.reading() as connection:
            return tuple(Pin(row.name, row.version or None) for row in connection.execute(query))

    def drop_deleted(self) -> None:
        """Forget the pins of names and versions that were deleted."""
        alive = exists().where(
            versions.c.name == pins.c.name,
            (versions.c.version == pins.c.version) | (pins.c.version == _WHATEVER),
            versions.c.state == READY,
            versions.c.base_fingerprint == pins.c.base_fingerprint,
        )
        self._database.write(lambda connection: connection.execute(delete(pins).where(self._is_mine, ~alive)))

    def largest_other(self, digests: Collection[str]) -> Version | None:
        """Of the versions on this base that are not made of `digests` the one with the most values."""
        query = (
            select(versions)
            .where(
                versions.c.state == READY,
                versions.c.base_fingerprint == self._base,
                versions.c.digest.not_in(list(digests)),
            )
            .order_by(versions.c.num_values.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(query).first()
            return None if row is None else version_of_row(row, self._base)

    def named(self, offset: int, limit: int, digests: Collection[str] | None = None) -> tuple[Sequence[Version], int]:
        """The versions on this base by name and number, all or those that are made of `digests`; and how many there
        are."""
        query = select(versions).where(versions.c.state == READY, versions.c.base_fingerprint == self._base)
        if digests is not None:
            query = query.where(versions.c.digest.in_(list(digests)))
        rows = query.order_by(versions.c.name, versions.c.version).offset(offset).limit(limit)
        with self._database.reading() as connection:
            total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
            return tuple(version_of_row(row, self._base) for row in connection.execute(rows)), total

    def _is(self, pin: Pin) -> ColumnElement[bool]:
        return (pins.c.name == pin.name) & (pins.c.version == (pin.version or _WHATEVER))

    def _record(self, connection: Connection, action: str, pin: Pin, who: str) -> None:
        at = datetime.now(UTC)
        row = {"at": at, "who": who[:128], "action": action, "name": pin.name, "version": pin.version, "detail": {}}
        connection.execute(insert(events).values(row))

"""Registry: which versions of which adapters exist, and the files they are made of.

A version is named here only after its files are durable in the store, and files leave the store only after no
version names them. Version numbers of a name only grow, also over deletion.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Row, Select, create_engine, event, func, insert, select, update
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from loraplex.errors import AdapterConflict, InvalidRequest, ModelNotFound, StartupError, StorageFull
from loraplex.lora.digest import validate_digest
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.tables import adapters, versions
from loraplex.lora.version import Version
from loraplex.routing.names import validate_name

READY = "ready"
DELETED = "deleted"

_MIGRATIONS = Path(__file__).parent / "migrations"
_MAX_SOURCE_CHARS = 1024
_LOCK_SECONDS = 30
_OF_VERSION = [column for column in versions.c if column.name not in ("deleted_at", "precedence")]


def sqlite_url(path: Path) -> URL:
    """The URL of the SQLite database `path`."""
    return URL.create("sqlite", database=str(path))


class Registry:
    """The registry in the database `url`, brought to this release's tables when it opens.

    Any thread may call any method. Writes are one at a time and durable when they return (SQLite: write-ahead log,
    synchronous=FULL). Every method raises StorageFull when the database refuses. Closed by `close` or as a
    `with`. Raises StartupError when the database cannot be opened or was made by a newer release.
    """

    def __init__(self, url: str | URL):
        try:
            engine = create_engine(url)
            if engine.dialect.name == "sqlite":
                event.listen(engine, "connect", _prepare_sqlite)
                event.listen(engine, "begin", _begin_sqlite)
            self._engine = engine
            self._writer = engine.execution_options(loraplex_writes=True)
            with self._writer.begin() as connection:
                config = Config()
                config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (SQLAlchemyError, CommandError) as cause:
            raise StartupError(
                f"The registry cannot be opened: {_short(cause)}. Check --data-dir; if a newer release of "
                "loraplex wrote it, use that release or a fresh folder."
            ) from cause

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> "Registry":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def publish(
        self,
        name: str,
        digest: str,
        facts: AdapterFacts,
        *,
        base_fingerprint: str,
        source: str,
        new_version: bool = False,
        report: Mapping[str, Any] | None = None,
        proof: Mapping[str, Any] | None = None,
        parent: str | None = None,
    ) -> tuple[Version, bool]:
        """Make `digest` the newest version of `name`; the flag says whether a version was created.

        A name without ready versions gets its next number. If the newest ready version has this digest on this base,
        that version is returned and nothing is created. Any other digest is an AdapterConflict, unless
        `new_version`. Raises InvalidName.
        """
        validate_name(name)
        validate_digest(digest)
        with self._writing() as connection:
            last = connection.execute(
                select(adapters.c.last_version).where(adapters.c.name == name).with_for_update()
            ).scalar()
            row = connection.execute(_newest(name)).first()
            if row is not None:
                newest = _version(row)
                if (newest.digest, newest.base_fingerprint) == (digest, base_fingerprint):
                    return newest, False
                if not new_version:
                    raise AdapterConflict(
                        f"The name {name!r} is taken: {newest.model_id} holds other files. Choose another "
                        "name, ask for a new version, or delete the adapter first.",
                        param="name",
                    )
            version = Version(
                name=name,
                version=(last or 0) + 1,
                digest=digest,
                base_fingerprint=base_fingerprint,
                state=READY,
                created_at=datetime.now(UTC),
                # a path may hold bytes that are no text
                source=source[:_MAX_SOURCE_CHARS].encode(errors="replace").decode(),
                facts=facts,
                report=report,
                proof=proof,
                parent=parent,
            )
            if last is None:
                connection.execute(insert(adapters).values(name=name, last_version=version.version))
            else:
                connection.execute(update(adapters).where(adapters.c.name == name).values(last_version=version.version))
            connection.execute(insert(versions).values(_row(version)))
            return version, True

    def get(self, name: str, version: int | None = None) -> Version:
        """The newest ready version of `name`, or exactly `version`. Raises ModelNotFound."""
        query = _newest(name)
        if version is not None:
            query = query.where(versions.c.version == version)
        with self._reading() as connection:
            row = connection.execute(query).first()
            if row is None:
                raise ModelNotFound(_why_not_found(connection, name, version), param="model")
        return _version(row)

    def list(self, offset: int = 0, limit: int | None = None) -> Sequence[Version]:
        """The newest ready version of every name, by name."""
        if offset < 0 or (limit is not None and limit < 0):
            raise InvalidRequest("offset and limit count adapters, so they are not negative. Leave them out for all.")
        newest = (
            select(versions.c.name, func.max(versions.c.version).label("version"))
            .where(versions.c.state == READY)
            .group_by(versions.c.name)
            .order_by(versions.c.name)
            .offset(offset)
            .limit(limit)
            .subquery()
        )
        query = (
            select(*_OF_VERSION)
            .join(newest, (versions.c.name == newest.c.name) & (versions.c.version == newest.c.version))
            .order_by(versions.c.name)
        )
        return self._versions(query)

    def versions(self, name: str) -> Sequence[Version]:
        """The ready versions of `name`, newest first; empty if there are none."""
        return self._versions(_newest(name, limit=None))

    def count(self) -> int:
        """How many names have a ready version."""
        query = select(func.count(versions.c.name.distinct())).where(versions.c.state == READY)
        with self._reading() as connection:
            return connection.execute(query).scalar_one()

    def delete(self, name: str, version: int | None = None) -> Sequence[Version]:
        """Delete `version` of `name`, or all its versions; returns them as they were. Raises ModelNotFound.

        Only the registry forgets them: running requests hold the files, and the store's sweep removes them
        later.
        """
        which = (versions.c.name == name) & (versions.c.state == READY)
        if version is not None:
            which &= versions.c.version == version
        with self._writing() as connection:
            rows = connection.execute(select(*_OF_VERSION).where(which)).all()
            if not rows:
                raise ModelNotFound(_why_not_found(connection, name, version), param="model")
            connection.execute(update(versions).where(which).values(state=DELETED, deleted_at=datetime.now(UTC)))
            return tuple(map(_version, rows))

    def live_digests(self) -> frozenset[str]:
        """The digests that a ready version names; the store's sweep keeps them."""
        with self._reading() as connection:
            query = select(versions.c.digest).where(versions.c.state == READY).distinct()
            return frozenset(connection.execute(query).scalars())

    def check_integrity(self) -> None:
        """Raise AssertionError if a version is newer than its name's last number."""
        query = (
            select(versions.c.name, versions.c.version)
            .join(adapters, adapters.c.name == versions.c.name)
            .where(versions.c.version > adapters.c.last_version)
        )
        with self._reading() as connection:
            assert (row := connection.execute(query).first()) is None, f"{row} is beyond its name's last version"

    def _versions(self, query: Select[Any]) -> Sequence[Version]:
        with self._reading() as connection:
            return tuple(map(_version, connection.execute(query)))

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as cause:
            raise StorageFull(f"The registry cannot be read: {_short(cause)}. Check the data directory.") from cause

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        try:
            with self._writer.begin() as connection:
                yield connection
        except IntegrityError as cause:
            # two servers on one database (not SQLite, whose writers wait for each other) gave out the same number
            raise AdapterConflict("The same name was published at the same time. Try again.", param="name") from cause
        except SQLAlchemyError as cause:
            raise StorageFull(
                f"The registry refuses a change: {_short(cause)}. Check the disk of the data directory, then try again."
            ) from cause


def _newest(name: str, limit: int | None = 1) -> Select[Any]:
    return (
        select(*_OF_VERSION)
        .where(versions.c.name == name, versions.c.state == READY)
        .order_by(versions.c.version.desc())
        .limit(limit)
    )


def _row(version: Version) -> dict[str, Any]:
    facts = version.facts
    return {
        "name": version.name,
        "version": version.version,
        "state": version.state,
        "digest": version.digest,
        "base_fingerprint": version.base_fingerprint,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "use_rslora": facts.use_rslora,
        "num_modules": facts.num_modules,
        "target_modules": list(facts.target_modules),
        "dtype": facts.dtype,
        "nbytes": facts.nbytes,
        "num_values": facts.num_values,
        "text_files": dict(facts.text_files),
        "profile": None if facts.profile is None else dict(facts.profile),
        "source": version.source,
        "created_at": version.created_at,
        "precedence": version.version,
        "report": None if version.report is None else dict(version.report),
        "proof": None if version.proof is None else dict(version.proof),
        "parent": version.parent,
    }


def _version(row: Row[Any]) -> Version:
    created_at: datetime = row.created_at
    facts = AdapterFacts(
        rank=row.rank,
        alpha=row.alpha,
        use_rslora=row.use_rslora,
        num_modules=row.num_modules,
        target_modules=tuple(row.target_modules),
        dtype=row.dtype,
        nbytes=row.nbytes,
        num_values=row.num_values,
        text_files=row.text_files,
        profile=row.profile,
    )
    return Version(
        name=row.name,
        version=row.version,
        digest=row.digest,
        base_fingerprint=row.base_fingerprint,
        state=row.state,
        # SQLite drops the zone; what is stored is UTC
        created_at=created_at if created_at.tzinfo else created_at.replace(tzinfo=UTC),
        source=row.source,
        facts=facts,
        report=row.report,
        proof=row.proof,
        parent=row.parent,
    )


def _why_not_found(connection: Connection, name: str, version: int | None) -> str:
    ready = connection.execute(
        select(versions.c.version)
        .where(versions.c.name == name, versions.c.state == READY)
        .order_by(versions.c.version)
    )
    numbers = [str(number) for number in ready.scalars()]
    if numbers and version is not None:
        return f"The adapter {name!r} has no version {version}. Its versions are {', '.join(numbers[-10:])}."
    known = connection.execute(select(adapters.c.name).where(adapters.c.name == name)).first()
    if known:
        return f"The adapter {name!r} was deleted. Push it again, or choose another; GET /v1/models lists them."
    return f"There is no adapter {name[:64]!r}. GET /v1/models lists those there are."


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # transactions are begun by _begin_sqlite, not by the driver, which begins them late and never for reads
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout={_LOCK_SECONDS * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # a writer that begins as a reader cannot wait for another writer: SQLite would refuse it at once
    writes = connection.get_execution_options().get("loraplex_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _short(cause: Exception) -> str:
    text = str(cause.orig if isinstance(cause, DBAPIError) else cause)
    return text.split("\n")[0][:200]

"""Database: the registry's connections, brought to this release's tables, and what its errors become.

SQLite (write-ahead log, synchronous=FULL) on a local file system, or PostgreSQL. Both make writes durable before they
return, and order writers of different processes.
"""

import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError, StatementError, TimeoutError

from loraplex.errors import AdapterConflict, StartupError, StorageFull

T = TypeVar("T")

_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK_SECONDS = 30
_MIGRATION_LOCK = 0x6C6F7261  # any number, the same in all processes
_MAX_TRIES = 8
_REFUSALS = (StatementError, TimeoutError)


def sqlite_url(path: Path) -> URL:
    """The URL of the SQLite database `path`."""
    return URL.create("sqlite", database=str(path))


class Database:
    """The database `url`. Any thread may call any method. Closed by `close`. Raises StartupError when it cannot be
    opened, is of another kind, or was made by a newer release."""

    def __init__(self, url: str | URL):
        try:
            self._engine = create_engine(_checked(url), pool_pre_ping=True)
        except ModuleNotFoundError as cause:
            raise StartupError(
                f"The registry's database needs {cause.name}, which is not installed. Install loraplex[postgres]."
            ) from cause
        except SQLAlchemyError as cause:
            raise _unusable(cause) from cause
        if self.is_sqlite:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        self._writer = self._engine.execution_options(loraplex_writes=True)
        self._watching = threading.Lock()
        try:
            self._migrate()
            self._watcher = self._engine.raw_connection() if self.is_sqlite else None
        except (SQLAlchemyError, CommandError) as cause:
            self._engine.dispose()
            raise _unusable(cause) from cause

    def _migrate(self) -> None:
        with self._writer.begin() as connection:
            if not self.is_sqlite:  # SQLite's writers wait for each other anyway
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
            config = Config()
            config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    @property
    def is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Close all connections."""
        with self._watching:
            if self._watcher is not None:
                self._watcher.close()
                self._watcher = None
        self._engine.dispose()

    def revision(self) -> Hashable:
        """Something that is equal to what it was only if nothing was committed since, by whatever process: what was
        read after the first question is then still so. Cheaper than any query. Raises StorageFull."""
        with self._watching:
            if self._watcher is not None:
                try:  # it counts the commits of all other connections; this one has none
                    return self._watcher.cursor().execute("PRAGMA data_version").fetchone()[0]
                except sqlite3.Error as cause:
                    raise StorageFull(f"The registry cannot be read: {cause}. Check the data directory.") from cause
        with self.reading() as connection:  # which transactions one sees; numbers alone would commit out of order
            return connection.execute(text("SELECT CAST(pg_current_snapshot() AS text)")).scalar_one()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection to read with. Raises StorageFull when the database refuses."""
        try:
            with self._engine.connect() as connection:
                yield connection
        except _REFUSALS as cause:
            raise StorageFull(f"The registry cannot be read: {_short(cause)}. Check the data directory.") from cause

    def write(self, change: Callable[[Connection], T]) -> T:
        """`change` in one transaction; it is durable when this returns. Runs it again when another process was first
        with a row of the same key. Raises StorageFull when the database refuses."""
        for _ in range(_MAX_TRIES):
            try:
                with self._writer.begin() as connection:
                    if not self.is_sqlite:  # whatever the server's default is
                        connection.execute(text("SET LOCAL synchronous_commit TO on"))
                    return change(connection)
            except IntegrityError:
                continue
            except _REFUSALS as cause:
                raise StorageFull(
                    f"The registry refuses a change: {_short(cause)}. Check the disk of the data directory, then try "
                    "again."
                ) from cause
        raise AdapterConflict("Others change the same name all the time. Try again.", param="name")


def _unusable(cause: Exception) -> StartupError:
    return StartupError(
        f"The registry cannot be opened: {_short(cause)}. Check --data-dir and --registry-url; if a newer "
        "release of loraplex wrote it, use that release or a fresh folder."
    )


def _checked(url: str | URL) -> URL:
    parsed = make_url(url)
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise StartupError(
            f"The registry cannot live in {parsed.get_backend_name()[:40]!r}. Give --registry-url "
            "postgresql+psycopg://user@host/database, or leave it out for a SQLite file in the data directory."
        )
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _prepare_sqlite(connection: Any, _: Any) -> None:
    # transactions are begun by _begin_sqlite, not by the driver, which begins them late and never for reads
    connection.isolation_level = None
    connection.execute(f"PRAGMA busy_timeout={_LOCK_SECONDS * 1000}").close()
    _enter_wal(connection)
    for pragma in ("synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _enter_wal(connection: sqlite3.Connection) -> None:
    """Several that open a new file at once all make this change, and SQLite does not have them wait for each other."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL").close()
            return
        except sqlite3.OperationalError as error:
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # a writer that begins as a reader cannot wait for another writer: SQLite would refuse it at once
    writes = connection.get_execution_options().get("loraplex_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _short(cause: Exception) -> str:
    text = str(cause.orig if isinstance(cause, DBAPIError) else cause)
    return text.split("\n")[0][:200]

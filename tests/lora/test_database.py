"""The registry's database where the two kinds differ, what it refuses, and what it does when it is refused."""

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import inspect, text

from loraplex.errors import AdapterConflict, StartupError, StorageFull
from loraplex.lora import registry as registry_module
from loraplex.lora import tables
from loraplex.lora.database import Database, _prepare_sqlite, sqlite_url
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.registry import Registry
from loraplex.lora.version import Version
from postgres import Postgres

FACTS = AdapterFacts(8, 16.0, True, 14, ("q_proj", "v_proj"), "BF16", 12345, 678)
A, B, C = (letter * 64 for letter in "abc")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    with Registry(sqlite_url(path), "base") as registry:
        yield registry
        registry.check_integrity()


def push(registry: Registry, name: str, digest: str) -> Version:
    return registry.publish(name, digest, FACTS, source="upload", who="me").version


def test_sqlite_is_set_to_be_durable(registry: Registry):
    with registry._database.reading() as connection:
        pragmas = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_postgresql_is_asked_to_be_durable(postgres: Postgres):
    url = postgres.fresh()
    postgres.run(f"ALTER DATABASE {url.partition('@/')[2].partition('?')[0]} SET synchronous_commit TO off")
    with Registry(url, "base") as registry:
        show = text("SHOW synchronous_commit")
        with registry._database.reading() as connection:
            assert connection.execute(show).scalar() == "off"
        assert registry._database.write(lambda connection: connection.execute(show).scalar()) == "on"


def test_what_cannot_be_opened_is_refused(tmp_path: Path, postgres: Postgres):
    (tmp_path / "garbage.db").write_bytes(b"not a database" * 100)
    nowhere = f"postgresql+psycopg://loraplex@/nowhere?host={postgres.folder}"
    for url in (sqlite_url(tmp_path / "garbage.db"), sqlite_url(tmp_path / "no" / "folder.db"), "nonsense", nowhere):
        with pytest.raises(StartupError, match="--data-dir and --registry-url"):
            Registry(url, "base")
    with pytest.raises(StartupError, match="cannot live in 'mysql'"):
        Registry("mysql://host/database", "base")


def test_a_driver_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)
    with pytest.raises(StartupError, match=r"psycopg.*Install loraplex\[postgres\]"):
        Registry("postgresql://host/database", "base")


def test_the_password_is_not_told():
    with pytest.raises(StartupError) as refused:
        Registry("postgresql://me:sesame-open@127.0.0.1:1/database", "base")
    assert "sesame" not in refused.value.message


def test_a_server_that_went_and_came_back(postgres: Postgres):
    """Connections that broke while they were idle are replaced."""
    with Registry(postgres.fresh(), "base") as registry:
        version = push(registry, "sql", A)
        postgres.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert registry.get("sql") == version


def test_a_connection_that_breaks_in_a_change(postgres: Postgres):
    url = postgres.fresh()

    def cut(step: str) -> None:
        if step == "publish: event written":
            postgres.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
                "AND state = 'idle in transaction'"
            )

    with Registry(url, "base") as registry, Registry(url, "base", cut) as broken:
        push(registry, "sql", A)
        with pytest.raises(StorageFull, match="refuses a change"):
            push(broken, "sql", B)
        assert registry.get("sql").version == 1
        assert push(registry, "sql", B).model_id == "sql@2"


def test_others_who_are_always_first():
    def taken(connection) -> None:
        connection.execute(text("INSERT INTO adapters VALUES ('a', 1)"))

    database = Database("sqlite://")
    database.write(taken)
    with pytest.raises(AdapterConflict, match="Try again"):
        database.write(taken)
    database.close()


# -- disks and clocks -------------------------------------------------------------------------------------------


def test_a_full_disk(registry: Registry):
    """SQLite's own error for a database that cannot grow: the change is refused, the rest is there, it works again."""
    push(registry, "sql", A)
    with registry._database._engine.connect() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
        connection.execute(text(f"PRAGMA max_page_count={pages}"))  # this pooled connection is the next one used
        before = (registry.list(), registry.events())

        def fill() -> None:
            for number in range(200):
                push(registry, f"other-{number}", f"{number:064x}")

    with pytest.raises(StorageFull, match="database or disk is full"):
        fill()
    assert registry.get("sql") == before[0][0]
    told, total = registry.events()
    assert total == len(registry.list()) == len(told), "what was not accepted was not told"
    registry._database.close()  # the next connection has no limit
    assert push(registry, "sql", B).model_id == "sql@2"


def test_a_database_that_refuses_writes(registry: Registry):
    push(registry, "sql", A)
    with registry._database._engine.connect() as connection:
        connection.execute(text("PRAGMA query_only=1"))
    for act in (lambda: push(registry, "other", B), lambda: registry.delete("sql", who="me")):
        with pytest.raises(StorageFull, match="refuses"):
            act()
    assert registry.get("sql").digest == A


def test_another_program_that_keeps_the_file_locked(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("loraplex.lora.database._LOCK_SECONDS", 0)
    with Registry(sqlite_url(path), "base") as registry:
        push(registry, "sql", A)
        with sqlite3.connect(path, isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StorageFull, match="locked"):
                push(registry, "sql", B)
            assert registry.get("sql").version == 1, "readers do not wait"
            other.execute("ROLLBACK")
        other.close()
        assert push(registry, "sql", B).version == 2


@pytest.mark.parametrize("year", [1971, 9998])
def test_a_clock_that_jumps(registry_url: str, monkeypatch: pytest.MonkeyPatch, year: int):
    """The order of versions, of what a name meant and of events is that of the changes, whatever the clock says."""

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(year, 1, 1, tzinfo=UTC)

    with Registry(registry_url, "base") as registry:
        push(registry, "sql", A)
        monkeypatch.setattr(registry_module, "datetime", Jumping)
        second = push(registry, "sql", B)
        assert second.created_at.year == year
        registry.rollback("sql", who="me")
        monkeypatch.undo()
        third = push(registry, "sql", C)
        assert registry.get("sql") == third
        assert [version.version for version in registry.versions("sql")] == [3, 2, 1]
        assert [event.version for event in registry.events()[0]] == [3, 1, 2, 1]
        assert registry.rollback("sql", who="me").version.model_id == "sql@1"
        assert registry.get("sql", 2) == second
        registry.check_integrity()


# -- older releases ---------------------------------------------------------------------------------------------


def test_the_first_releases_registry_is_carried_over(registry_url: str):
    with Registry(registry_url, "base") as registry:
        first, second = push(registry, "sql", A), push(registry, "sql", B)

        def downgrade(connection) -> None:
            config = Config()
            config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")

        registry._database.write(downgrade)
        with registry._database.reading() as connection:
            columns = {column["name"] for column in inspect(connection).get_columns("versions")}
            assert not columns & {"profile", "text_files", "precedence", "report"}
            assert "events" not in inspect(connection).get_table_names()
    with Registry(registry_url, "base") as opened:
        assert (opened.get("sql"), opened.get("sql", 1)) == (second, first)
        assert push(opened, "sql", B) == second
        assert opened.events() == ((), 0), "what was done before is not known"
        assert opened.rollback("sql", who="me").version == first


def test_a_new_file_is_opened_by_many_at_once(tmp_path: Path):
    """SQLite answers "locked" at once to some of those who would turn on its write-ahead log together."""
    count = 8

    def connect(path: Path, barrier: threading.Barrier) -> str:
        connection = sqlite3.connect(path)
        try:
            barrier.wait()
            _prepare_sqlite(connection, None)
            return connection.execute("PRAGMA journal_mode").fetchone()[0]
        finally:
            connection.close()

    with ThreadPoolExecutor(count) as threads:
        for number in range(60):
            barrier = threading.Barrier(count)
            path = tmp_path / f"{number}.db"
            opened = [threads.submit(connect, path, barrier) for _ in range(count)]
            assert {one.result() for one in opened} == {"wal"}

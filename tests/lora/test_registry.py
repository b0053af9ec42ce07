"""The registry: versions that only grow, one answer for the same files, everything there after a restart."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text

from loraplex.errors import AdapterConflict, InvalidName, InvalidRequest, ModelNotFound, StartupError, StorageFull
from loraplex.lora import tables
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.registry import Registry, sqlite_url
from loraplex.lora.tables import adapters, metadata, versions
from loraplex.lora.version import Version

FACTS = AdapterFacts(8, 16.0, True, 14, ("q_proj", "v_proj"), "BF16", 12345, 678)
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.db"


@pytest.fixture
def registry(path: Path):
    with Registry(sqlite_url(path)) as registry:
        yield registry
        registry.check_integrity()


def publish(registry: Registry, name: str, digest: str, base: str = "base", **options: Any) -> tuple[Version, bool]:
    return registry.publish(name, digest, FACTS, base_fingerprint=base, source="upload", **options)


def test_a_first_version(registry: Registry):
    version, created = publish(registry, "sql", A)
    assert created
    assert version.model_id == "sql@1"
    assert version.state == "ready"
    assert (version.rank, version.alpha, version.num_modules, version.nbytes) == (8, 16.0, 14, 12345)
    assert abs(datetime.now(UTC) - version.created_at) < timedelta(minutes=1)
    assert registry.get("sql") == registry.get("sql", 1) == version
    assert registry.get("sql").created_at.tzinfo is UTC


def test_the_same_files_again_are_the_same_version(registry: Registry):
    first, _ = publish(registry, "sql", A)
    assert publish(registry, "sql", A) == (first, False)
    assert publish(registry, "sql", A, new_version=True) == (first, False)


def test_other_files_need_a_new_version(registry: Registry):
    publish(registry, "sql", A)
    with pytest.raises(AdapterConflict, match="sql@1"):
        publish(registry, "sql", B)
    second, created = publish(registry, "sql", B, new_version=True)
    assert (second.model_id, created) == ("sql@2", True)
    assert registry.get("sql") == second
    assert registry.get("sql", 1).digest == A
    back, created = publish(registry, "sql", A, new_version=True)
    assert (back.model_id, created) == ("sql@3", True)
    assert [version.version for version in registry.versions("sql")] == [3, 2, 1]


def test_the_same_files_on_another_base_are_another_version(registry: Registry):
    publish(registry, "sql", A)
    with pytest.raises(AdapterConflict):
        publish(registry, "sql", A, base="other")
    assert publish(registry, "sql", A, base="other", new_version=True)[0].model_id == "sql@2"


def test_deleted_numbers_are_never_used_again(registry: Registry):
    publish(registry, "sql", A)
    publish(registry, "sql", B, new_version=True)
    assert [version.model_id for version in registry.delete("sql", 2)] == ["sql@2"]
    assert registry.get("sql").model_id == "sql@1"
    assert publish(registry, "sql", C, new_version=True)[0].model_id == "sql@3"
    assert [version.version for version in registry.delete("sql")] == [1, 3]
    assert registry.live_digests() == frozenset()
    assert (publish(registry, "sql", A)[0].model_id, registry.count()) == ("sql@4", 1)


def test_what_is_not_found_says_why(registry: Registry):
    with pytest.raises(ModelNotFound, match="no adapter 'sql'"):
        registry.get("sql")
    publish(registry, "sql", A)
    with pytest.raises(ModelNotFound, match="no version 7. Its versions are 1"):
        registry.get("sql", 7)
    with pytest.raises(ModelNotFound, match="no version 7"):
        registry.delete("sql", 7)
    registry.delete("sql")
    for act in (registry.get, registry.delete):
        with pytest.raises(ModelNotFound, match="was deleted"):
            act("sql")


@pytest.mark.parametrize("name", ["", "a@1", "../x", "a" * 65, "-a", "a b", "a\n"])
def test_names_have_a_grammar(registry: Registry, name: str):
    with pytest.raises(InvalidName):
        publish(registry, name, A)


def test_digests_have_a_grammar(registry: Registry):
    with pytest.raises(InvalidRequest):
        publish(registry, "sql", "../../etc/passwd")


def test_list_is_the_newest_of_each_by_name(registry: Registry):
    for name in ("b", "a", "c"):
        publish(registry, name, A)
    publish(registry, "a", B, new_version=True)
    registry.delete("c")
    assert [version.model_id for version in registry.list()] == ["a@2", "b@1"]
    assert [version.model_id for version in registry.list(offset=1)] == ["b@1"]
    assert [version.model_id for version in registry.list(limit=1)] == ["a@2"]
    assert not registry.list(limit=0)
    assert registry.live_digests() == {A, B}
    assert registry.count() == 2
    with pytest.raises(InvalidRequest):
        registry.list(offset=-1)


def test_everything_is_there_after_a_restart(path: Path):
    with Registry(sqlite_url(path)) as registry:
        version, _ = publish(registry, "sql", A)
        publish(registry, "gone", B)
        registry.delete("gone")
    with Registry(f"sqlite:///{path}") as registry:
        assert registry.list() == (version,)
        assert publish(registry, "gone", B)[0].model_id == "gone@2"


def test_sqlite_is_set_to_be_durable(registry: Registry):
    with registry._engine.connect() as connection:
        pragmas = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert pragmas == ["wal", 2]
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_the_migrations_make_the_tables(registry: Registry):
    with registry._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_newer_releases_database_is_refused(registry: Registry, path: Path):
    with registry._writer.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StartupError, match="newer release"):
        Registry(sqlite_url(path))


def test_what_cannot_be_opened_is_refused(tmp_path: Path):
    (tmp_path / "garbage.db").write_bytes(b"not a database" * 100)
    for url in (sqlite_url(tmp_path / "garbage.db"), sqlite_url(tmp_path / "no" / "folder.db"), "nonsense"):
        with pytest.raises(StartupError, match="--data-dir"):
            Registry(url)


def test_a_database_that_refuses_writes(registry: Registry):
    publish(registry, "sql", A)
    with registry._engine.connect() as connection:
        connection.execute(text("PRAGMA query_only=1"))  # this pooled connection is the next one used
    with pytest.raises(StorageFull, match="refuses"):
        publish(registry, "other", B)


def test_threads_publish_one_name(registry: Registry):
    """Every thread gets its own number, none is lost, and equal files give one version."""
    results: list[tuple[Version, bool]] = []
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            start.wait()
            for step in range(10):
                results.append(publish(registry, "sql", f"{number:032x}{step:032x}", new_version=True))
                results.append(publish(registry, f"own-{number}", A))
                assert registry.get(f"own-{number}").version == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(version.version for version, _ in results if version.name == "sql") == list(range(1, 81))
    assert sum(created for version, created in results if version.name != "sql") == 8


def test_two_registries_on_one_file(registry: Registry, path: Path):
    with Registry(sqlite_url(path)) as other:
        publish(registry, "sql", A)
        assert other.get("sql").digest == A
        assert publish(other, "sql", B, new_version=True)[0].version == 2
        assert registry.get("sql").version == 2


def test_reads_are_cheap(registry: Registry):
    publish(registry, "one", A)
    with registry._writer.begin() as connection:
        row = dict(connection.execute(select(versions)).mappings().one())
        names = [f"adapter-{number:04}" for number in range(2000)]
        connection.execute(insert(adapters), [{"name": name, "last_version": 3} for name in names])
        for version in (1, 2, 3):
            rows = [row | {"name": n, "version": version, "digest": f"{at:064x}"} for at, n in enumerate(names)]
            connection.execute(insert(versions), rows)
        plan = " ".join(
            str(row)
            for row in connection.execute(
                text(
                    "EXPLAIN QUERY PLAN SELECT * FROM versions WHERE name = 'x' AND state = 'ready' "
                    "ORDER BY version DESC LIMIT 1"
                )
            )
        )
        assert "USING INDEX" in plan
        assert "SCAN" not in plan
        assert "TEMP B-TREE" not in plan
    started = time.monotonic()
    assert len(registry.list()) == 2001
    assert len(registry.live_digests()) == 2001
    assert time.monotonic() - started < 1.0
    started = time.monotonic()
    for number in range(200):
        registry.get(f"adapter-{number:04}")
    assert time.monotonic() - started < 1.0


def test_the_text_side_is_remembered(registry: Registry):
    facts = replace(FACTS, text_files={"chat_template.jinja": "0" * 64}, profile={"stop": ["é"], "temperature": 0})
    registry.publish("sql", A, facts, base_fingerprint="base", source="upload")
    assert registry.get("sql").facts == facts
    publish(registry, "other", B)
    assert (registry.get("other").facts.text_files, registry.get("other").facts.profile) == ({}, None)


def test_what_checks_found_is_remembered(registry: Registry):
    found: dict[str, Any] = {
        "report": {"fits": True, "notes": ["é"]},
        "proof": {"max_delta": 0.5},
        "parent": "demo-base",
    }
    version, _ = publish(registry, "sql", A, **found)
    assert registry.get("sql") == version
    assert (version.report, version.proof, version.parent) == tuple(found.values())
    assert (publish(registry, "other", B)[0].report, registry.get("other").proof) == (None, None)


def downgrade(registry: Registry, revision: str) -> None:
    with registry._writer.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(Path(tables.__file__).parent / "migrations"))
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_the_first_releases_registry_is_carried_over(registry: Registry, path: Path):
    first, _ = publish(registry, "sql", A)
    second, _ = publish(registry, "sql", B, new_version=True)
    downgrade(registry, "0001")
    with registry._engine.connect() as connection:
        columns = {column["name"] for column in inspect(connection).get_columns("versions")}
        assert not columns & {"profile", "text_files", "precedence", "report"}
        assert "events" not in inspect(connection).get_table_names()
    registry.close()
    with Registry(sqlite_url(path)) as opened:
        assert (opened.get("sql"), opened.get("sql", 1)) == (second, first)
        assert publish(opened, "sql", B) == (second, False)

"""The registry, on SQLite and PostgreSQL: versions that only grow, what a name means, and who changed it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.schema import CreateIndex

from loraplex.errors import AdapterConflict, InvalidName, InvalidRequest, ModelNotFound, StartupError
from loraplex.lora.event import Event
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.registry import Change, Registry
from loraplex.lora.steps import STEPS
from loraplex.lora.tables import adapters, metadata, versions
from loraplex.lora.version import Version

FACTS = AdapterFacts(8, 16.0, True, 14, ("q_proj", "v_proj"), "BF16", 12345, 678)
A, B, C, D = (letter * 64 for letter in "abcd")

Open = Callable[..., Registry]


@pytest.fixture
def open_registry(registry_url: str) -> Iterator[Open]:
    """Opens the test's registry once more, as another process would."""
    with ExitStack() as stack:

        def open_one(base: str = "base") -> Registry:
            return stack.enter_context(Registry(registry_url, base))

        yield open_one
        open_one().check_integrity()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


def publish(registry: Registry, name: str, digest: str, **options: Any) -> Change:
    return registry.publish(name, digest, FACTS, **{"source": "upload", "who": "me", **options})


def push(registry: Registry, name: str, *digests: str) -> Version:
    """What `name` means after pushes of these."""
    return [publish(registry, name, digest).version for digest in digests][-1]


def said(registry: Registry, name: str | None = None) -> list[str]:
    """The changes in short, oldest first."""

    def short(event: Event) -> str:
        return (
            f"{event.who}: {event.action} {event.name}@{event.version}, {event.detail['was']} to {event.detail['now']}"
        )

    return [short(event) for event in reversed(registry.events(name)[0])]


# -- versions ---------------------------------------------------------------------------------------------------


def test_a_first_version(registry: Registry):
    change = publish(registry, "sql", A)
    version = change.version
    assert (change.is_new, change.previous) == (True, None)
    assert version.model_id == "sql@1"
    assert version.state == "ready"
    assert (version.rank, version.alpha, version.num_modules, version.nbytes) == (8, 16.0, 14, 12345)
    assert abs(datetime.now(UTC) - version.created_at) < timedelta(minutes=1)
    assert registry.get("sql") == registry.get("sql", 1) == registry.look("sql") == version
    assert registry.get("sql").created_at.tzinfo is UTC


def test_the_same_files_again_are_the_same_version(registry: Registry):
    first = publish(registry, "sql", A).version
    assert publish(registry, "sql", A) == Change(first, first)
    assert registry.events("sql")[1] == 1, "nothing changed, so nothing is told"


def test_other_files_are_the_next_version(registry: Registry):
    first = push(registry, "sql", A)
    second = publish(registry, "sql", B)
    assert (second.version.model_id, second.is_new, second.previous) == ("sql@2", True, first)
    assert registry.get("sql") == second.version
    assert registry.get("sql", 1) == first
    assert [version.version for version in registry.versions("sql")] == [2, 1]


def test_files_of_an_earlier_version_are_that_version(registry: Registry):
    """A push makes the name mean what was pushed, whether or not it was here before."""
    first = push(registry, "sql", A)
    second = push(registry, "sql", B)
    assert publish(registry, "sql", A) == Change(first, second)
    assert registry.get("sql") == first
    assert push(registry, "sql", C).model_id == "sql@3"
    assert registry.get("sql").model_id == "sql@3"


def test_deleted_numbers_are_never_used_again(registry: Registry):
    push(registry, "sql", A, B)
    assert [version.model_id for version in registry.delete("sql", 2, who="me")] == ["sql@2"]
    assert registry.get("sql").model_id == "sql@1"
    assert push(registry, "sql", C).model_id == "sql@3"
    assert [version.version for version in registry.delete("sql", who="me")] == [1, 3]
    assert registry.live_digests() == frozenset()
    assert (push(registry, "sql", A).model_id, registry.count()) == ("sql@4", 1)


def test_what_is_not_found_says_why(registry: Registry):
    with pytest.raises(ModelNotFound, match="no adapter 'sql'"):
        registry.get("sql")
    push(registry, "sql", A)
    with pytest.raises(ModelNotFound, match="no version 7. Its versions are 1"):
        registry.get("sql", 7)
    with pytest.raises(ModelNotFound, match="no version 7"):
        registry.delete("sql", 7, who="me")
    with pytest.raises(ModelNotFound, match="no version 7"):
        registry.rollback("sql", 7, who="me")
    registry.delete("sql", who="me")
    for act in (registry.get, registry.look, lambda name: registry.delete(name, who="me")):
        with pytest.raises(ModelNotFound, match="was deleted"):
            act("sql")
    with pytest.raises(ModelNotFound, match="was deleted"):
        registry.rollback("sql", who="me")


@pytest.mark.parametrize("name", ["", "a@1", "../x", "a" * 65, "-a", "a b", "a\n"])
def test_names_have_a_grammar(registry: Registry, name: str):
    with pytest.raises(InvalidName):
        push(registry, name, A)


def test_digests_have_a_grammar(registry: Registry):
    with pytest.raises(InvalidRequest):
        push(registry, "sql", "../../etc/passwd")


def test_list_is_what_each_name_means(registry: Registry):
    for name in ("b", "a", "c"):
        push(registry, name, A)
    push(registry, "a", B, C)
    registry.rollback("a", who="me")
    registry.delete("c", who="me")
    assert [version.model_id for version in registry.list()] == ["a@2", "b@1"]
    assert [version.model_id for version in registry.list(offset=1)] == ["b@1"]
    assert [version.model_id for version in registry.list(limit=1)] == ["a@2"]
    assert not registry.list(limit=0)
    assert registry.live_digests() == {A, B, C}
    assert registry.count() == 2
    with pytest.raises(InvalidRequest):
        registry.list(offset=-1)


def test_everything_is_there_after_a_restart(open_registry: Open, registry_url: str):
    with Registry(registry_url, "base") as registry:
        version = push(registry, "sql", A)
        push(registry, "gone", B)
        registry.delete("gone", who="me")
        told, identity = registry.events(), registry.identity
    registry = open_registry()
    assert registry.list() == (version,)
    assert (registry.events(), registry.identity) == (told, identity)
    assert push(registry, "gone", B).model_id == "gone@2"


def test_the_text_side_is_remembered(registry: Registry):
    facts = replace(FACTS, text_files={"chat_template.jinja": "0" * 64}, profile={"stop": ["é\0"], "temperature": 0})
    registry.publish("sql", A, facts, source="upload", who="me")
    assert registry.get("sql").facts == facts
    push(registry, "other", B)
    assert (registry.get("other").facts.text_files, registry.get("other").facts.profile) == ({}, None)


def test_what_checks_found_is_remembered(registry: Registry):
    found: dict[str, Any] = {"report": {"fits": True, "notes": ["é"]}, "proof": {"error": 0.5}}
    version = publish(registry, "sql", A, **found).version
    assert registry.get("sql") == version
    assert (version.report, version.proof) == tuple(found.values())
    other = publish(registry, "other", B).version
    assert (other.report, other.proof) == (None, None)


# -- rollback ---------------------------------------------------------------------------------------------------


def test_a_rollback_undoes_the_last_push(registry: Registry):
    push(registry, "sql", A, B, C)
    change = registry.rollback("sql", who="me")
    assert (change.version.model_id, change.previous and change.previous.model_id) == ("sql@2", "sql@3")
    assert registry.get("sql").model_id == "sql@2"
    assert registry.get("sql", 3).digest == C, "it can still be asked for"
    assert registry.rollback("sql", who="me").version.model_id == "sql@1"
    with pytest.raises(AdapterConflict, match="nothing to roll back to: no version of 'sql'.*before sql@1"):
        registry.rollback("sql", who="me")
    assert registry.get("sql").model_id == "sql@1"


def test_a_push_after_a_rollback_goes_live(registry: Registry):
    push(registry, "sql", A, B)
    registry.rollback("sql", who="me")
    assert push(registry, "sql", C).model_id == registry.get("sql").model_id == "sql@3"
    assert registry.rollback("sql", who="me").version.model_id == "sql@1", "not the one that was rolled back before"


def test_a_rollback_to_a_version(registry: Registry):
    push(registry, "sql", A, B, C, D)
    assert registry.rollback("sql", 2, who="me").version.model_id == "sql@2"
    again = registry.rollback("sql", 2, who="me")
    assert again.version == again.previous, "said twice it is done once"
    assert registry.events("sql")[1] == 5
    assert registry.rollback("sql", 4, who="me").version.model_id == "sql@4", "forward, to one that was withdrawn"
    assert registry.rollback("sql", who="me").version.model_id == "sql@2"
    assert registry.rollback("sql", who="me").version.model_id == "sql@1"


def test_the_files_of_a_withdrawn_version_pushed_again(registry: Registry):
    push(registry, "sql", A, B)
    registry.rollback("sql", who="me")
    change = publish(registry, "sql", B)
    assert (change.version.model_id, change.is_new) == ("sql@2", False)
    assert registry.get("sql").model_id == "sql@2"
    assert registry.rollback("sql", who="me").version.model_id == "sql@1"


def test_deletion_goes_back_to_what_the_name_meant(registry: Registry):
    push(registry, "sql", A, B)
    registry.rollback("sql", who="me")
    push(registry, "sql", C)
    registry.delete("sql", 3, who="me")
    assert registry.get("sql").model_id == "sql@1"
    registry.delete("sql", 1, who="me")
    assert registry.get("sql").model_id == "sql@2", "the newest, where there is no other"
    with pytest.raises(ModelNotFound, match="no version 1"):
        registry.rollback("sql", 1, who="me")


# -- other bases ------------------------------------------------------------------------------------------------


def test_versions_of_another_base(registry: Registry, open_registry: Open):
    push(registry, "sql", A)
    push(registry, "own", B, C)
    other = open_registry("other")
    assert [(version.model_id, version.state) for version in other.list()] == [
        ("own@2", "incompatible"),
        ("sql@1", "incompatible"),
    ]
    for act in (other.get, lambda name: other.rollback(name, who="me"), lambda name: other.delete(name, who="me")):
        with pytest.raises(ModelNotFound, match="'own@1', 'own@2' were checked on another base model") as refused:
            act("own")
        assert refused.value.code == "adapter_incompatible"
    with pytest.raises(ModelNotFound, match="'sql@1' was checked on another base"):
        other.get("sql", 1)
    assert other.look("sql").state == other.look("sql", 1).state == "incompatible"
    assert other.live_digests() == {A, B, C}, "the sweep keeps them"


def test_a_name_means_another_version_on_each_base(registry: Registry, open_registry: Open):
    other = open_registry("other")
    push(registry, "sql", A, B)
    assert publish(other, "sql", B).is_new, "the same files, checked on another base"
    push(other, "sql", C)
    assert (registry.get("sql").model_id, other.get("sql").model_id) == ("sql@2", "sql@4")
    assert other.look("sql").model_id == "sql@4"
    assert [(v.version, v.state) for v in other.versions("sql")] == [
        (4, "ready"),
        (3, "ready"),
        (2, "incompatible"),
        (1, "incompatible"),
    ]
    registry.rollback("sql", who="me")
    assert (registry.get("sql").model_id, other.get("sql").model_id) == ("sql@1", "sql@4")
    with pytest.raises(ModelNotFound, match="'sql@2' was checked on another base"):
        other.rollback("sql", 2, who="me")
    assert other.rollback("sql", who="me").version.model_id == "sql@3"
    assert [version.model_id for version in registry.list()] == ["sql@1"]


def test_incompatible_versions_are_deleted_only_by_number(registry: Registry, open_registry: Open):
    other = open_registry("other")
    push(registry, "sql", A)
    push(other, "sql", B)
    assert [version.model_id for version in other.delete("sql", who="me")] == ["sql@2"]
    assert registry.get("sql").model_id == "sql@1"
    (deleted,) = other.delete("sql", 1, who="me")
    assert (deleted.model_id, deleted.state) == ("sql@1", "incompatible")
    with pytest.raises(ModelNotFound, match="deleted"):
        registry.get("sql")


# -- who changed what -------------------------------------------------------------------------------------------


def test_every_change_is_told(registry: Registry):
    publish(registry, "sql", A, who="ann")
    publish(registry, "sql", B, who="bob", source="folder:sql")
    publish(registry, "other", B, who="ann")
    registry.rollback("sql", who="eve")
    publish(registry, "sql", B, who="ann")
    registry.delete("sql", 1, who="bob")
    registry.delete("sql", who="bob")
    of_sql = [
        "ann: push sql@1, None to sql@1",
        "bob: push sql@2, sql@1 to sql@2",
        "eve: rollback sql@1, sql@2 to sql@1",
        "ann: push sql@2, sql@1 to sql@2",
        "bob: delete sql@1, sql@2 to sql@2",
        "bob: delete sql@2, sql@2 to None",
    ]
    assert said(registry, "sql") == of_sql
    assert said(registry) == [*of_sql[:2], "ann: push other@1, None to other@1", *of_sql[2:]]
    latest, total = registry.events()
    assert total == 7
    assert [event.id for event in latest] == sorted((event.id for event in latest), reverse=True)
    assert {event.at.tzinfo for event in latest} == {UTC}
    first = registry.events("sql")[0][-1]
    assert first.detail == {"digest": A, "was": None, "now": "sql@1", "is_new": True, "source": "upload"}
    assert (registry.events(offset=2, limit=3)[0], registry.events(offset=9)) == (latest[2:5], ((), 7))
    assert registry.events("other")[1] == 1
    with pytest.raises(ModelNotFound, match="no adapter 'never'"):
        registry.events("never")
    with pytest.raises(InvalidRequest):
        registry.events(limit=-1)


def test_what_is_refused_is_not_told(registry: Registry):
    push(registry, "sql", A)
    for act in (lambda: registry.rollback("sql", who="me"), lambda: registry.rollback("sql", 4, who="me")):
        with pytest.raises((AdapterConflict, ModelNotFound)):
            act()
    with pytest.raises(ModelNotFound):
        registry.delete("sql", 4, who="me")
    assert registry.events()[1] == 1


@pytest.mark.parametrize("step", [step for step in STEPS if step.startswith(("publish:", "rollback:", "delete:"))])
def test_a_change_that_breaks_off_leaves_nothing(registry_url: str, registry: Registry, step: str):
    """Neither a number nor a version nor an event, wherever it breaks off before the commit."""
    push(registry, "sql", A, B)
    before = (registry.list(), registry.events(), registry.versions("sql"))

    def stop(name: str) -> None:
        if name == step:
            raise InterruptedError(name)

    with Registry(registry_url, "base", stop) as broken:
        act = {
            "publish": lambda: publish(broken, "sql", C),
            "rollback": lambda: broken.rollback("sql", who="me"),
            "delete": lambda: broken.delete("sql", who="me"),
        }[step.partition(":")[0]]
        with pytest.raises(InterruptedError, match=step):
            act()
    after = (registry.list(), registry.events(), registry.versions("sql"))
    assert (after == before) == ("committed" not in step)


# -- the tables -------------------------------------------------------------------------------------------------


def test_the_migrations_make_the_tables(registry: Registry):
    with registry._database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_newer_releases_database_is_refused(registry: Registry, registry_url: str):
    change = "UPDATE alembic_version SET version_num = "
    registry._database.write(lambda c: c.execute(text(change + "'9' || version_num")))
    with pytest.raises(StartupError, match="newer release"):
        Registry(registry_url, "base")
    registry._database.write(lambda c: c.execute(text(change + "substr(version_num, 2)")))


# -- several at once --------------------------------------------------------------------------------------------


def at_once(*work: Callable[[], None]) -> None:
    """Run all at once; the first error is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            start.wait()
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_many_publish_one_name(open_registry: Open):
    """Every process and thread gets its own number, none is lost, and equal files give one version."""
    registries = [open_registry() for _ in range(4)] * 2
    changes: list[Change] = []

    def work(number: int) -> None:
        registry = registries[number]
        for step in range(6):
            changes.append(publish(registry, "sql", f"{number:032x}{step:032x}"))
            changes.append(publish(registry, f"shared-{step}", A))
            assert registry.get(f"shared-{step}").version == 1

    at_once(*(lambda number=number: work(number) for number in range(8)))
    assert sorted(change.version.version for change in changes if change.version.name == "sql") == list(range(1, 49))
    assert sum(change.is_new for change in changes if change.version.name != "sql") == 6
    assert registries[0].events()[1] == 48 + 6


def test_two_make_a_name(open_registry: Open, registry_url: str):
    """The second comes while the first is between its number and its commit: it waits, and is the same version."""
    other = open_registry()
    changes: list[Change] = []
    second = threading.Thread(target=lambda: changes.append(publish(other, "sql", A)))

    def begin_second(step: str) -> None:
        if step == "publish: numbered":
            second.start()

    with Registry(registry_url, "base", begin_second) as first:
        version = publish(first, "sql", A).version
    second.join()
    assert changes == [Change(version, version)]
    assert other.events()[1] == 1


def test_pushes_rollbacks_and_deletions_at_once(open_registry: Open):
    """Every change says what the name meant before, and this is what the one before it made it mean."""
    registries = [open_registry() for _ in range(3)]
    push(registries[0], "sql", A, B)

    def work(number: int) -> None:
        registry = registries[number]
        for step in range(8):
            try:
                if (number + step) % 4 == 0:
                    registry.rollback("sql", who="me")
                elif (number + step) % 4 == 2:
                    registry.delete("sql", registry.get("sql").version, who="me")
                else:
                    publish(registry, "sql", f"{number:032x}{step:032x}")
            except (AdapterConflict, ModelNotFound):
                pass

    at_once(*(lambda number=number: work(number) for number in range(3)))
    events = registries[0].events("sql")[0][::-1]
    meant = None
    for event in events:
        assert event.detail["was"] == meant
        meant = event.detail["now"]
    assert meant == registries[0].get("sql").model_id


def test_many_open_a_new_registry(registry_url: str):
    opened: list[str] = []

    def work() -> None:
        with Registry(registry_url, "base") as registry:
            opened.append(registry.identity)

    at_once(*[work] * 4)
    assert len(opened) == 4
    assert len(set(opened)) == 1


def test_one_index_answers_what_a_name_means(registry: Registry):
    """However many versions a name has had, the newest of them is found without sorting them."""
    push(registry, "one", A)
    (index,) = [index for index in versions.indexes if "precedence" in index.columns]
    assert "(state, name, base_fingerprint, precedence, version)" in str(CreateIndex(index))
    with registry._database.reading() as connection:
        found = {index["name"] for index in inspect(connection).get_indexes("versions")}
        row = dict(connection.execute(select(versions)).mappings().one())
    assert found == {index.name}
    names = [f"adapter-{number:04}" for number in range(500)]

    def fill(connection) -> None:
        connection.execute(insert(adapters), [{"name": name, "last_version": 3} for name in names])
        for version in (1, 2, 3):
            rows = [row | {"name": name, "version": version, "precedence": version} for name in names]
            connection.execute(insert(versions), rows)
        connection.execute(update(versions).where(versions.c.name == "adapter-0007").values(precedence=0))

    registry._database.write(fill)
    assert len(registry.list()) == 501
    assert registry.get("adapter-0007").version == 3

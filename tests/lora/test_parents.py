"""Versions that stand on others, on SQLite and PostgreSQL."""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from loraplex.errors import AdapterConflict, AdapterQuarantined, InvalidRequest, ModelNotFound
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.registry import Registry
from loraplex.lora.version import Version
from loraplex.routing.names import ModelRef

FACTS = AdapterFacts(8, 16.0, True, 14, ("q_proj",), "BF16", 12345, 678)
A, B, C, D = (letter * 64 for letter in "abcd")

Open = Callable[..., Registry]


@pytest.fixture
def open_registry(registry_url: str) -> Iterator[Open]:
    with ExitStack() as stack:

        def open_one(base: str = "base", **options) -> Registry:
            return stack.enter_context(Registry(registry_url, base, **options))

        yield open_one
        open_one().check_integrity()


@pytest.fixture
def registry(open_registry: Open) -> Registry:
    return open_registry()


def push(registry: Registry, name: str, digest: str, parent: str | None = None) -> Version:
    """`parent`: as "name@n"."""
    ref = None
    if parent is not None:
        ref = ModelRef(parent.partition("@")[0], int(parent.partition("@")[2]))
    return registry.publish(name, digest, FACTS, source="upload", who="me", parent=ref).version


def path(registry: Registry, name: str) -> list[str]:
    return [one.model_id for one in registry.parents.path(registry.get(name))]


def chain(registry: Registry) -> None:
    push(registry, "root", A)
    push(registry, "mid", B, "root@1")
    push(registry, "leaf", C, "mid@1")


def test_a_path_leads_from_the_root(registry: Registry, open_registry: Open):
    chain(registry)
    assert path(registry, "leaf") == ["root@1", "mid@1", "leaf@1"]
    assert path(registry, "root") == ["root@1"]
    assert open_registry().get("leaf").parent == ModelRef("mid", 1)
    assert registry.events("leaf")[0][0].detail["parent"] == "mid@1"
    assert "parent" not in registry.events("root")[0][0].detail
    assert registry.parents.children(registry.get("root")) == ["mid@1"]


def test_a_parent_is_one_version_for_ever(registry: Registry):
    chain(registry)
    push(registry, "root", D)
    push(registry, "mid", D)
    assert path(registry, "leaf") == ["root@1", "mid@1", "leaf@1"]
    registry.rollback("root", who="me")
    push(registry, "root", D)
    assert path(registry, "leaf") == ["root@1", "mid@1", "leaf@1"], "also one that was rolled back from"


def test_the_same_files_on_another_parent_are_another_version(registry: Registry):
    push(registry, "root", A)
    push(registry, "other", B)
    numbers = [push(registry, "leaf", C, parent).version for parent in (None, "root@1", "other@1", "root@1", None)]
    assert numbers == [1, 2, 3, 2, 1]
    assert registry.get("leaf").version == 1, "the one that was pushed last"
    assert registry.rollback("leaf", 3, who="me").version.parent == ModelRef("other", 1)


def test_a_version_with_children_stays(registry: Registry):
    chain(registry)
    push(registry, "twig", D, "root@1")
    push(registry, "root", D)
    before = registry.events()[1]
    for version in (1, None):
        with pytest.raises(AdapterConflict, match=r"stand on .*root@1.*: mid@1, twig@1\..*Delete them first") as caught:
            registry.delete("root", version, who="me")
        assert caught.value.code == "adapter_has_children"
    assert registry.events()[1] == before, "nothing was deleted, so nothing is told"
    assert [one.model_id for one in registry.delete("root", 2, who="me")] == ["root@2"], "nobody stands on that one"
    for name in ("leaf", "mid", "twig", "root"):
        registry.delete(name, who="me")
    assert registry.count() == 0


def test_many_children_are_not_all_named(registry: Registry):
    push(registry, "root", A)
    for number in range(12):
        push(registry, f"leaf-{number:02}", B, "root@1")
    with pytest.raises(AdapterConflict, match=r"leaf-09@1 and 2 more\."):
        registry.delete("root", who="me")


@pytest.mark.parametrize(("name", "parent"), [("root", "leaf@1"), ("root", "root@1"), ("mid", "leaf@1")])
def test_no_name_stands_twice_on_a_path(registry: Registry, name: str, parent: str):
    chain(registry)
    with pytest.raises(InvalidRequest, match="no name can be on a path twice") as caught:
        push(registry, name, D, parent)
    assert (caught.value.code, caught.value.param) == ("invalid_parent", "parent")
    assert registry.get(name).version == 1


@pytest.mark.parametrize("parent", ["nobody@1", "root@2", "gone@1", "foreign@1"])
def test_a_parent_is_there(registry: Registry, open_registry: Open, parent: str):
    push(registry, "root", A)
    push(registry, "gone", A)
    registry.delete("gone", who="me")
    push(open_registry("another base"), "foreign", A)
    with pytest.raises(InvalidRequest, match="was deleted meanwhile") as caught:
        push(registry, "leaf", C, parent)
    assert (caught.value.code, caught.value.param) == ("unknown_parent", "parent")
    with pytest.raises(ModelNotFound):
        registry.get("leaf")


def test_nothing_is_put_on_a_version_in_quarantine(registry: Registry):
    chain(registry)
    registry.quarantine(A, "it gave NaN.", who="server")
    with pytest.raises(AdapterQuarantined, match="root@1.*it gave NaN"):
        push(registry, "twig", D, "root@1")
    assert [one.state for one in registry.parents.path(registry.get("leaf"))] == ["quarantined", "ready", "ready"]


def test_trees_of_another_base(registry: Registry, open_registry: Open):
    """They are there, and whoever deletes their versions by number minds them, too."""
    chain(registry)
    other = open_registry("another base")
    leaf = other.look("leaf")
    assert [one.state for one in other.parents.path(leaf)] == ["incompatible"] * 3
    with pytest.raises(AdapterConflict, match="leaf@1"):
        other.delete("mid", 1, who="me")
    push(other, "mid", D)
    assert [one.model_id for one in other.delete("mid", who="me")] == ["mid@2"]


# -- several at once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["publish: begun", "publish: numbered", "publish: event written"])
def test_a_parent_is_deleted_while_a_child_is_pushed(open_registry: Open, step: str):
    """The deletion begins somewhere within the push's transaction. One of the two happens, and the other is refused."""
    other = open_registry()
    push(other, "root", A)
    outcome: list[str] = []

    def delete() -> None:
        try:
            other.delete("root", who="me")
            outcome.append("deleted")
        except AdapterConflict:
            outcome.append("kept")

    deleting = threading.Thread(target=delete)
    publishing = open_registry(step=lambda name: deleting.start() if name == step else None)
    try:
        push(publishing, "leaf", C, "root@1")
        outcome.append("pushed")
    except InvalidRequest:
        outcome.append("refused")
    deleting.join()
    assert sorted(outcome) in (["kept", "pushed"], ["deleted", "refused"])


@pytest.mark.parametrize("step", ["delete: begun", "delete: version marked", "delete: event written"])
def test_a_child_is_pushed_while_its_parent_is_deleted(open_registry: Open, step: str):
    other = open_registry()
    push(other, "root", A)
    outcome: list[str] = []

    def publish() -> None:
        try:
            push(other, "leaf", C, "root@1")
            outcome.append("pushed")
        except InvalidRequest:
            outcome.append("refused")

    publishing = threading.Thread(target=publish)
    deleting = open_registry(step=lambda name: publishing.start() if name == step else None)
    try:
        deleting.delete("root", who="me")
        outcome.append("deleted")
    except AdapterConflict:
        outcome.append("kept")
    publishing.join()
    assert sorted(outcome) in (["kept", "pushed"], ["deleted", "refused"])


def test_trees_grow_and_go_at_once(open_registry: Open):
    """Four processes push on whatever is there and delete whatever they may: nobody waits for ever, and no version
    ever loses its parent."""
    registries = [open_registry() for _ in range(4)]
    names = ["a", "b", "c", "d"]
    for name in names:
        push(registries[0], name, A)
    done = [0] * 4
    errors: list[BaseException] = []

    def work(number: int) -> None:
        rng, registry = random.Random(number), registries[number]
        try:
            for step in range(30):
                name, parent = rng.sample(names, 2)
                try:
                    if step % 3:
                        found = registry.get(parent)
                        push(registry, name, f"{number:032x}{step:032x}", rng.choice([None, found.model_id]))
                    else:
                        registry.delete(name, registry.get(name).version, who="me")
                    done[number] += 1
                except (AdapterConflict, InvalidRequest, ModelNotFound):
                    continue
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert min(done) >= 5
    registries[0].check_integrity()

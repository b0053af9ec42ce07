"""Pins, on both databases."""

import hashlib
from collections.abc import Iterator

import pytest

from loraplex.lora.facts import AdapterFacts
from loraplex.lora.pins import Pin
from loraplex.lora.registry import Registry


@pytest.fixture
def registry(registry_url: str) -> Iterator[Registry]:
    with Registry(registry_url, "base") as registry:
        yield registry


def push(registry: Registry, name: str, num_values: int = 10) -> str:
    digest = hashlib.sha256(f"{name}{num_values}".encode()).hexdigest()
    facts = AdapterFacts(
        rank=1,
        alpha=1.0,
        use_rslora=False,
        num_modules=1,
        target_modules=("q_proj",),
        dtype="F32",
        nbytes=100,
        num_values=num_values,
    )
    registry.publish(name, digest, facts, source="upload", who="local")
    return digest


def test_pins_are_remembered_and_told_of(registry: Registry, registry_url: str):
    push(registry, "sql")
    assert registry.pins.add(Pin("sql", None), who="key:1")
    assert not registry.pins.add(Pin("sql", None), who="key:1")
    assert registry.pins.add(Pin("sql", 1), who="key:2")
    with Registry(registry_url, "base") as again:
        assert again.pins.list() == (Pin("sql", None), Pin("sql", 1))
        assert again.pins.list("other") == ()
    with Registry(registry_url, "another base") as other:
        assert other.pins.list() == ()
    registry.pins.remove([Pin("sql", 1), Pin("sql", 7)], who="key:3")
    assert registry.pins.list() == (Pin("sql", None),)
    told = [(event.action, event.version, event.who) for event in registry.events("sql")[0]]
    assert told == [("unpin", 1, "key:3"), ("pin", 1, "key:2"), ("pin", None, "key:1"), ("push", 1, "local")]


def test_what_was_deleted_is_not_pinned(registry: Registry):
    for size in (10, 20):
        push(registry, "sql", size)
    push(registry, "gone")
    for pin in (Pin("sql", None), Pin("sql", 1), Pin("sql", 2), Pin("gone", None)):
        registry.pins.add(pin, who="local")
    registry.pins.drop_deleted()
    assert len(registry.pins.list()) == 4
    registry.delete("sql", 1, who="local")
    registry.delete("gone", who="local")
    registry.pins.drop_deleted()
    assert registry.pins.list() == (Pin("sql", None), Pin("sql", 2))


def test_the_versions_by_name_and_the_largest(registry: Registry):
    small, large = push(registry, "a", 10), push(registry, "b", 30)
    middle = push(registry, "b", 20)
    rows, total = registry.pins.named(1, 1)
    assert ([row.model_id for row in rows], total) == (["b@1"], 3)
    rows, total = registry.pins.named(0, 10, [small, middle])
    assert ([row.model_id for row in rows], total) == (["a@1", "b@2"], 2)
    assert registry.pins.named(0, 10, []) == ((), 0)
    largest = registry.pins.largest_other([large])
    assert largest is not None
    assert largest.digest == middle
    assert registry.pins.largest_other([small, middle, large]) is None

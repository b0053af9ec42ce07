"""The list of all names is read again only when something was committed, by whatever process."""

from disk_tier import FACTS

from loraplex.lora.registry import Registry

DIGESTS = [f"{number:064x}" for number in range(4)]


def push(registry: Registry, name: str, number: int) -> None:
    registry.publish(name, DIGESTS[number], FACTS, source="upload", who="me")


def named(registry: Registry) -> dict[str, str]:
    return {version.name: version.digest for version in registry.list()}


def test_every_change_is_seen_at_once(registry_url: str):
    """Its own and another's, and none is seen twice or too early."""
    with Registry(registry_url, "base") as one, Registry(registry_url, "base") as other:
        assert named(one) == named(other) == {}
        expected: dict[str, str] = {}
        for number, (by, name) in enumerate([(one, "a"), (other, "b"), (one, "b"), (other, "a")]):
            push(by, name, number)
            expected[name] = DIGESTS[number]
            assert named(one) == named(other) == expected
        other.rollback("a", who="me")
        assert named(one)["a"] == named(other)["a"] == DIGESTS[0]
        one.delete("b", who="me")
        assert named(one) == named(other) == {"a": DIGESTS[0]}
        other.quarantine(DIGESTS[0], "why", who="me")
        assert [version.state for version in one.list()] == ["quarantined"]


def test_nothing_is_read_while_nothing_changed(registry_url: str):
    with Registry(registry_url, "base") as registry:
        push(registry, "a", 0)
        first = registry.list()
        assert registry.list() is first
        assert registry.list(0, 1) == tuple(first)
        push(registry, "a", 0)  # the same files again
        push(registry, "a", 1)
        assert registry.list() is not first

"""What the registry and the store should hold after a list of operations: a slow, obviously right implementation."""

import copy
from dataclasses import dataclass, field
from typing import Any

CONTENTS = tuple(b"weights %d" % number for number in range(5))
"""The weights files that operations push, by number."""


Made = tuple[int, int | None]
"""What a version is made of: the number of its content, and the version of its parent (None: it has none)."""


@dataclass
class Name:
    """`live` holds the versions in the order in which they went live, without those that were rolled back from."""

    last: int = 0
    ready: dict[int, Made] = field(default_factory=dict)
    live: list[int] = field(default_factory=list)

    @property
    def current(self) -> int | None:
        return self.live[-1] if self.live else max(self.ready, default=None)


@dataclass
class RegistryModel:
    """An operation is (verb, name, number): push a content, rollback (to a version, or None), delete (a version, or
    None for all), route (the name's own alias to a number, or None to delete it), child (push a content under the
    name's own child, on top of what the name means), prune (delete a version of that child, or None for all). One that
    the registry refuses changes nothing here."""

    names: dict[str, Name] = field(default_factory=dict)
    routes: dict[str, list[int | None]] = field(default_factory=dict)  # what every revision says; None: deleted
    events: list[tuple[str, str, int, int | None, int | None]] = field(default_factory=list)

    def after(self, operation: tuple[str, str, int | None]) -> "RegistryModel":
        """A copy of this after `operation`."""
        changed = copy.deepcopy(self)
        verb, name, number = operation
        getattr(changed, verb)(name, number)
        return changed

    def push(self, name: str, content: int) -> None:
        self._push(name, (content, None))

    def child(self, name: str, content: int) -> None:
        parent = self.names.get(name, Name()).current
        if parent is not None:
            self._push(child_of(name), (content, parent))

    def prune(self, name: str, version: int | None) -> None:
        self.delete(child_of(name), version)

    def _push(self, name: str, made: Made) -> None:
        one = self.names.setdefault(name, Name())
        was = one.current
        if was is not None and one.ready[was] == made:
            return
        # of several the one that went live last, else the newest: what is the same is one version, so there is one
        same = [version for version, of in one.ready.items() if of == made]
        version = same[0] if same else one.last + 1
        one.last = max(one.last, version)
        one.ready[version] = made
        one.live = [other for other in one.live if other != version] + [version]
        self.events.append(("push", name, version, was, version))

    def rollback(self, name: str, to: int | None) -> None:
        one = self.names.get(name, Name())
        was = one.current
        if was is None:
            return
        if to is None:
            to = one.live[-2] if len(one.live) > 1 else was
        if to == was or to not in one.ready:
            return
        one.live = one.live[: one.live.index(to) + 1] if to in one.live else [*one.live, to]
        self.events.append(("rollback", name, to, was, to))

    def delete(self, name: str, version: int | None) -> None:
        one = self.names.get(name, Name())
        was = one.current
        chosen = sorted(one.ready) if version is None else [version] if version in one.ready else []
        children = self.names.get(child_of(name), Name()).ready.values()
        if any(parent in chosen for _, parent in children):
            return
        for number in chosen:
            del one.ready[number]
            one.live = [other for other in one.live if other != number]
        for number in chosen:  # the first event tells of the change
            self.events.append(("delete", name, number, was, one.current))
            was = one.current

    def route(self, name: str, number: int | None) -> None:
        revisions = self.routes.setdefault(alias_of(name), [])
        was = revisions[-1] if revisions else None
        if was != number:
            revisions.append(number)
            action = "route_delete" if number is None else "route_set"
            self.events.append((action, alias_of(name), len(revisions), was, number))

    def damage(self, name: str, content: int) -> None:
        """Not the registry's matter."""

    def sweep(self, name: str, number: int | None) -> None:
        """Changes nothing that is named."""

    def seen(self) -> dict[str, Any]:
        """As `observed` sees the real one."""
        names = {
            name: {"versions": dict(sorted(one.ready.items())), "current": one.current}
            for name, one in sorted(self.names.items())
            if one.ready
        }
        routes = {
            alias: (len(one), one[-1]) for alias, one in sorted(self.routes.items()) if one and one[-1] is not None
        }
        return {"names": names, "routes": routes, "events": self.events}

    @property
    def contents(self) -> set[int]:
        return {content for one in self.names.values() for content, _ in one.ready.values()}


def alias_of(name: str) -> str:
    return f"to-{name}"


def child_of(name: str) -> str:
    return f"on-{name}"

"""What the three tiers must hold: plain dicts. The registry's part is `registry_model`'s, with quarantine and pins."""

from dataclasses import dataclass, field

from registry_model import Name, RegistryModel

from loraplex.errors import AdapterQuarantined, ModelNotFound

Ref = tuple[str, int | None]
"""A name and a version of it; None: whatever it means."""


def number_of(made: int | tuple[int, int | None]) -> int:
    """The content of a version, of which the parent may be noted, too."""
    return made if isinstance(made, int) else made[0]


@dataclass
class TiersModel(RegistryModel):
    pins: set[Ref] = field(default_factory=set)
    quarantined: set[tuple[str, int]] = field(default_factory=set)

    def push(self, name: str, content: int) -> None:
        one = self.names.setdefault(name, Name())
        same = [version for version, of in one.ready.items() if number_of(of) == content]
        was = one.current
        if was in same and (name, was) in self.quarantined:
            self.events.append(("push", name, was, was, was))
        super().push(name, content)
        self.quarantined.discard((name, one.current or 0))

    def rollback(self, name: str, to: int | None) -> None:
        one = self.names.get(name, Name())
        if to is None:
            good = [version for version in one.live[:-1] if (name, version) not in self.quarantined]
            to = good[-1] if good else one.current
        if (name, to) not in self.quarantined:
            super().rollback(name, to)

    def quarantine(self, content: int) -> None:
        for name, one in sorted(self.names.items()):
            for version in sorted(one.ready):
                if number_of(one.ready[version]) == content and (name, version) not in self.quarantined:
                    self.quarantined.add((name, version))
                    self.events.append(("quarantine", name, version, one.current, one.current))

    def resolve(self, ref: Ref) -> tuple[int, int] | type[Exception]:
        """Version and content, or what is raised."""
        name, version = ref
        one = self.names.get(name, Name())
        version = one.current if version is None else version
        if version is None or version not in one.ready:
            return ModelNotFound
        return AdapterQuarantined if (name, version) in self.quarantined else (version, number_of(one.ready[version]))

    def pin(self, ref: Ref) -> None:
        self.pins.add(ref)

    def unpin(self, pins: set[Ref]) -> None:
        self.pins -= pins

    def drop_pins(self) -> None:
        """Of what is not there any more."""
        self.pins = {pin for pin in self.pins if self.resolve(pin) is not ModelNotFound}

    @property
    def wanted(self) -> set[int]:
        """The contents that the pins mean now."""
        meant = (self.resolve(pin) for pin in self.pins)
        return {one[1] for one in meant if isinstance(one, tuple)}

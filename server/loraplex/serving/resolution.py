"""Names: what a `model` field means at this moment: the base, a version, or a sum of versions. Not routes.

A version that stands on others means the sum along its path to the root, so it is a sum even by itself.
"""

from collections.abc import Hashable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from loraplex.engine.messages import AdapterUse, Composition
from loraplex.errors import AdapterLoadFailed, ModelNotFound
from loraplex.lora.version import Version
from loraplex.routing.composition import Part, parse_composition, scaled
from loraplex.routing.names import nearest_names
from loraplex.routing.router import Routed
from loraplex.serving.catalog import AdapterCatalog


@dataclass(frozen=True, slots=True)
class Use:
    """A version in a sum."""

    version: Version
    scale: float = 1.0

    def __str__(self) -> str:
        return scaled(self.version.model_id, self.scale)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a `model` field means now. `uses` (): the base; each digest once. `adapter` is the one whose text side
    (template, profile) holds, of a sum the first that was named; None: the base's."""

    model: str  # the concrete name: "sql@3", "sql@3:0.7+style@1:0.3", or the base's; without what these stand on
    uses: tuple[Use, ...] = ()
    adapter: Version | None = None

    @property
    def sole(self) -> Version | None:
        """The version, if it is one by itself."""
        return self.uses[0].version if len(self.uses) == 1 and self.uses[0].scale == 1.0 else None


@dataclass(frozen=True, slots=True)
class Held:
    """What a request runs on; its files stay. `folder`: of `resolved.adapter`. `routed`: None without a route."""

    resolved: Resolved
    folder: Path | None = None
    composition: Composition = ()
    routed: Routed | None = None


class Names:
    """`bytes_per_value`: of the dtype that is computed in. Its methods block."""

    def __init__(self, catalog: AdapterCatalog, base_name: str, bytes_per_value: int):
        self._catalog = catalog
        self._base_name = base_name
        self._bytes_per_value = bytes_per_value

    def resolve(self, model: str) -> Resolved:
        """Raises ModelNotFound with the nearest names, AdapterQuarantined, InvalidName for what is no name."""
        parts = parse_composition(model)
        named = _summed(
            ((version.digest, version.parent), Use(version, part.scale))
            for part in parts
            if (version := self._version(model, part))
        )
        uses = _summed(
            (version.digest, Use(version, use.scale)) for use in named for version in self._catalog.path(use.version)
        )
        if not uses:
            return Resolved(self._base_name)
        first = named[0].version
        # The engine adds in this order, and blocks of keys and values are shared by it: one sum, one order.
        uses = tuple(sorted(uses, key=lambda use: use.version.digest))
        named = sorted(named, key=lambda use: (use.version.digest, str(use.version.parent)))
        return Resolved("+".join(map(str, named)), uses, first)

    def _version(self, model: str, part: Part) -> Version | None:
        """None: the base, which adds nothing."""
        ref = part.ref
        if ref.name == self._base_name:
            if ref.version is not None:
                raise ModelNotFound(f"The base model {self._base_name!r} has no versions.", param="model")
            return None
        try:
            return self._catalog.get(ref.name, ref.version)
        except ModelNotFound as error:
            if error.code != ModelNotFound.code:  # it exists, and cannot be served
                raise
            near = nearest_names(ref.name, [self._base_name, *self._catalog.names()])
            hint = f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
            raise ModelNotFound(f"The model {model!r} does not exist: {error.message}{hint}", param="model") from error

    def hold(self, model: str, lifetime: AsyncExitStack) -> Held:
        """What `model` means; its files stay for the length of `lifetime`. Raises as `resolve`, and AdapterLoadFailed
        when the disk has lost them."""
        resolved = self.resolve(model)
        folders: dict[str, Path] = {}
        try:
            for use in resolved.uses:
                digest = use.version.digest
                folders[digest] = lifetime.enter_context(self._catalog.hold(digest))
        except AdapterLoadFailed:
            if self.resolve(model) == resolved:  # else it was deleted or replaced between the two lines above
                raise
            return self.hold(model, lifetime)
        composition = tuple(
            AdapterUse(use.version.digest, use.version.facts.num_values * self._bytes_per_value, use.scale)
            for use in resolved.uses
        )
        folder = None if resolved.adapter is None else folders[resolved.adapter.digest]
        return Held(resolved, folder, composition)


def _summed(uses: Iterable[tuple[Hashable, Use]]) -> tuple[Use, ...]:
    """Each key once, with the sum of its scales, which does not depend on the order; without those of scale 0."""
    versions: dict[Hashable, Version] = {}
    scales: dict[Hashable, list[float]] = {}
    for key, use in uses:
        versions.setdefault(key, use.version)
        scales.setdefault(key, []).append(use.scale)
    summed = {key: round(fsum(of), 9) for key, of in scales.items()}  # to the digits that a scale can have
    return tuple(Use(versions[key], scale) for key, scale in summed.items() if scale)

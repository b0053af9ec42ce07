"""Lineage: what a push may name as its parent, decided before its files are proven.

A version means the sum of the deltas on its path to the root, so all of them are deltas alone, and stand in RAM and on
the device together whenever one request needs them.
"""

from collections.abc import Sequence

from loraplex.engine.build import EngineInfo
from loraplex.errors import AdapterInvalid, AdapterTooLarge, InvalidName, InvalidRequest, ModelNotFound
from loraplex.lora.parents import UNKNOWN_PARENT, is_additive
from loraplex.lora.registry import Registry
from loraplex.lora.version import Version, refuse_quarantined
from loraplex.lora.weights import LoRAWeights
from loraplex.routing.names import ModelRef, parse_model

NOT_ADDITIVE = "is more than deltas (DoRA, biases, saved modules, token rows, a router), and only deltas can be summed"


class Lineage:
    """`max_depth`: versions on a path, the root included. Its methods block."""

    def __init__(self, registry: Registry, info: EngineInfo, base_name: str, max_depth: int):
        self._registry = registry
        self._info = info
        self._base_name = base_name
        self._max_depth = max_depth

    def read(self, parent: str) -> ModelRef:
        """The grammar alone. Raises InvalidRequest."""
        try:
            return parse_model(parent)
        except (InvalidName, InvalidRequest) as error:
            raise InvalidRequest(f"The parent: {error.message}", param="parent", code="invalid_parent") from None

    def choose(self, name: str, parent: str) -> tuple[Version, ...]:
        """The path to what `parent` means now, the root first; () for the base. Raises InvalidRequest for what cannot
        be the parent of a version of `name`, AdapterQuarantined."""
        ref = self.read(parent)
        if ref == ModelRef(self._base_name):
            return ()
        if self._registry.routes.revision(ref.name) is not None:
            raise _invalid(
                f"{ref.name!r} is a route, and a parent is one adapter for ever. Name an adapter or a version"
            )
        try:
            found = self._registry.get(ref.name, ref.version)
        except ModelNotFound as error:
            raise InvalidRequest(
                f"The parent is not there. {error.message}", param="parent", code=UNKNOWN_PARENT
            ) from error
        path = self._registry.parents.path(found)
        for one in path:
            refuse_quarantined(one)
        self._registry.parents.check(found.ref, name)
        self._check_depth(path)
        for one in path:
            if one.report is not None and not is_additive(one.report):
                raise _invalid(f"{one.model_id} {NOT_ADDITIVE}. Push this adapter without a parent, or name another")
        return path

    def _check_depth(self, path: Sequence[Version]) -> None:
        depth, ids = len(path) + 1, " <- ".join(one.model_id for one in path)
        if depth > self._max_depth:
            raise _invalid(
                f"On {ids} the adapter would be number {depth} of its path, and this server takes at most "
                f"{self._max_depth}. Name a parent nearer to the root, sum some of them into one adapter (loraplex "
                f"merge), or start the server with --max-adapter-depth {depth}"
            )

    def check_sum(self, path: Sequence[Version], weights: LoRAWeights) -> None:
        """Whether an adapter with these weights can stand on `path`. Raises AdapterInvalid, AdapterTooLarge."""
        if not path:
            return
        ids = " + ".join(one.model_id for one in path)
        if not weights.is_additive:
            raise AdapterInvalid(f"The adapter {NOT_ADDITIVE}. Push it without a parent.", param="config")
        values = {one.digest: one.facts.num_values for one in path} | {weights.digest: weights.slab.numel()}
        places, config = len(values), self._info.config
        if places > config.max_loras:
            raise _invalid(
                f"With {ids} a request for the adapter needs {places} places in a step, and this server has "
                f"{config.max_loras}. Start it with --max-loras {places} or more, or name a parent nearer to the root"
            )
        nbytes = sum(values.values()) * self._info.bytes_per_value
        if nbytes > config.adapter_cache_bytes:
            raise AdapterTooLarge(
                f"The adapter needs {nbytes} bytes in RAM together with {ids}, and the whole adapter cache has "
                f"{config.adapter_cache_bytes}; it could never be served. Start the server with --adapter-cache-bytes "
                f"{nbytes} or more."
            )


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(f"{message}.", param="parent", code="invalid_parent")

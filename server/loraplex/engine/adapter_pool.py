"""AdapterPool: the device tier. Which adapter's slab stands in which place, as the kernels read it.

On a CPU a place holds the RAM tier's own slab: no copy. On another device it holds a copy. The tables are [modules,
places]; every LoRA layer sees its row as a `ModulePool`. A stack of E experts has a table of its own, of places · E
(see `ExpertTable`). Written only by the runner, between forward passes.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from loraplex.engine.durations import Durations
from loraplex.lora.weights import Extra, LoRAWeights, ModuleDelta, ModuleShape
from loraplex.ops import ModulePool


class AdapterPool:
    def __init__(self, targets: Mapping[str, ModuleShape], num_places: int, device: torch.device):
        self.num_places = num_places
        self._device = device
        self._targets = targets
        linears = {name: shape for name, shape in targets.items() if shape.kind in ("linear", "head", "embedding")}
        self._row_of = {name: row for row, name in enumerate(linears)}
        self._heads = [name for name, shape in linears.items() if shape.kind == "head"]
        size = (len(linears), num_places)
        self._slabs: list[torch.Tensor | None] = [None] * num_places
        self._digests: list[str | None] = [None] * num_places
        self.copies = Durations()  # of `load`; a copy that the device does by itself counts as far as the host waits
        self._is_additive = [True] * num_places
        self.extras: dict[str, list[Extra | None]] = {name: [None] * num_places for name in targets}
        # Written on the host, so that nothing here waits for the device.
        self._address = torch.zeros(num_places, dtype=torch.int64)
        self._rank = torch.zeros(size, dtype=torch.int32)
        self._offset_a = torch.zeros(size, dtype=torch.int64)
        self._offset_b = torch.zeros(size, dtype=torch.int64)
        self._scaling = torch.zeros(size, dtype=torch.float32)
        self.modules = {
            name: ModulePool(
                shape.in_features,
                shape.out_features,
                self._slabs,
                self._address,
                self._rank[row],
                self._offset_a[row],
                self._offset_b[row],
                self._scaling[row],
            )
            for row, (name, shape) in enumerate(linears.items())
        }
        self._experts = {
            name: ExpertTable(shape, num_places) for name, shape in targets.items() if shape.kind == "experts"
        }
        self.modules |= {name: table.pool for name, table in self._experts.items()}

    def load(self, place: int, weights: LoRAWeights) -> None:
        """Put an adapter into `place`, over whatever stood there."""
        started = time.perf_counter()
        self.clear(place)
        slab = weights.slab.to(self._device, non_blocking=True)
        weights = replace(weights, slab=slab)
        self._slabs[place] = slab
        self._digests[place] = weights.digest
        self._address[place] = slab.data_ptr()
        entries = []
        for name, delta in weights.modules.items():
            if name in self._experts:
                self._experts[name].load(place, slab, delta)
            else:
                entries.append((self._row_of[name], delta.rank, delta.offset_a, delta.offset_b, delta.scaling))
        if entries:  # a column at once: one by one, the engine would wait a millisecond for every adapter
            rows, *columns = zip(*entries, strict=True)
            at = torch.tensor(rows)
            for table, column in zip((self._rank, self._offset_a, self._offset_b, self._scaling), columns, strict=True):
                table[at, place] = torch.tensor(column, dtype=table.dtype)
        if not weights.is_additive:
            self._is_additive[place] = False
            for name in weights.modules.keys() | weights.replaced.keys():
                extra = weights.extra(self._targets[name])
                if extra is not None and extra.rows is not None:
                    extra = replace(extra, rows=extra.rows.to(self._device))
                self.extras[name][place] = extra
        self.copies.observe(time.perf_counter() - started)

    def clear(self, place: int) -> None:
        self._slabs[place] = None
        self._digests[place] = None
        self._address[place] = 0
        self._rank[:, place] = 0
        for table in self._experts.values():
            table.clear(place)
        if not self._is_additive[place]:
            self._is_additive[place] = True
            for places in self.extras.values():
                places[place] = None

    def digest_in(self, place: int) -> str | None:
        return self._digests[place]

    def is_additive(self, place: int) -> bool:
        """Whether the adapter in `place` is deltas alone."""
        return self._is_additive[place]

    def changes_head(self, places: Iterable[int]) -> bool:
        """Whether any adapter in `places` does anything to the output head."""
        places = list(places)
        return any(
            bool(self._rank[self._row_of[name], place]) or self.extras[name][place] is not None
            for name in self._heads
            for place in places
        )

    def max_rank(self, places: list[int]) -> int:
        """The largest rank of any module of the adapters in `places`, experts aside."""
        return int(self._rank[:, places].max()) if places and len(self._rank) else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs that stand in places (on a CPU they are the RAM tier's)."""
        return sum(slab.nbytes for slab in self._slabs if slab is not None)


class ExpertTable:
    """The places of one stack of E experts: expert e of the adapter in `place` is at place · E + e."""

    def __init__(self, shape: ModuleShape, num_places: int):
        self._shape = shape
        size = num_places * shape.num_experts
        long = torch.int64
        self._address = torch.zeros(size, dtype=long)
        self._rank = torch.zeros(size, dtype=torch.int32)
        self._offset_a, self._offset_b = torch.zeros(size, dtype=long), torch.zeros(size, dtype=long)
        self._scaling = torch.zeros(size, dtype=torch.float32)
        self._slabs: list[torch.Tensor | None] = [None] * size
        self.pool = ModulePool(
            shape.in_features,
            shape.out_features,
            self._slabs,
            self._address,
            self._rank,
            self._offset_a,
            self._offset_b,
            self._scaling,
        )

    def _entries(self, place: int) -> slice:
        return slice(place * self._shape.num_experts, (place + 1) * self._shape.num_experts)

    def load(self, place: int, slab: torch.Tensor, delta: ModuleDelta) -> None:
        entries, experts = self._entries(place), torch.arange(self._shape.num_experts)
        self._slabs[entries] = [slab] * self._shape.num_experts
        self._address[entries] = slab.data_ptr()
        self._rank[entries] = delta.rank
        self._offset_a[entries] = delta.offset_a + experts * delta.rank * self._shape.in_features
        self._offset_b[entries] = delta.offset_b + experts * delta.rank * self._shape.out_features
        self._scaling[entries] = delta.scaling

    def clear(self, place: int) -> None:
        entries = self._entries(place)
        self._slabs[entries] = [None] * self._shape.num_experts
        self._address[entries] = 0
        self._rank[entries] = 0

"""AdapterPool: the device tier. Which adapter's slab stands in which place, as the kernels read it.

On a CPU a place holds the RAM tier's own slab: no copy. On another device it holds a copy, in memory of its own that is
allocated once: allocating and freeing there would make the device finish what it has begun. The tables are [modules,
places]; every LoRA layer sees its row as a `ModulePool`. A stack of E experts has a table of its own, of places · E
(see `ExpertTable`). Written by the engine's thread only, between forward passes.

Kernels on another device read the same from a table there (`ModulePool.table`), which is written in the order of the
stream: no kernel of an earlier step can see it, and nobody waits.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import torch

from loraplex.engine.durations import Durations
from loraplex.lora.weights import Extra, LoRAWeights, ModuleDelta, ModuleShape
from loraplex.ops import ModulePool, module_table


class AdapterPool:
    def __init__(
        self,
        targets: Mapping[str, ModuleShape],
        num_places: int,
        device: torch.device,
        with_tables: bool = False,
        place_bytes: int = 0,
    ):
        """`with_tables`: the kernels read places and ranks on the device (`triton_ops`). `place_bytes`: memory that
        each place has of its own, a multiple of `SLAB_ALIGNMENT`; 0: none."""
        self.num_places = num_places
        # row by row, a place's slab from its start
        self._memory = torch.empty(num_places, place_bytes, dtype=torch.uint8, device=device) if place_bytes else None
        self._device = device
        self._targets = targets
        linears = {name: shape for name, shape in targets.items() if shape.kind in ("linear", "head", "embedding")}
        self._row_of = {name: row for row, name in enumerate(linears)}
        self._heads = [name for name, shape in linears.items() if shape.kind == "head"]
        self._embeddings = [name for name, shape in linears.items() if shape.kind == "embedding"]
        size = (len(linears), num_places)
        self._slabs: list[torch.Tensor | None] = [None] * num_places
        self._digests: list[str | None] = [None] * num_places
        self.copies = Durations()  # of adapters into places, as far as anybody waits for them
        self._is_additive = [True] * num_places
        self.extras: dict[str, list[Extra | None]] = {name: [None] * num_places for name in targets}
        # Written on the host, so that nothing here waits for the device.
        self._address = torch.zeros(num_places, dtype=torch.int64)
        self._rank = torch.zeros(size, dtype=torch.int32)
        self._offset_a = torch.zeros(size, dtype=torch.int64)
        self._offset_b = torch.zeros(size, dtype=torch.int64)
        self._scaling = torch.zeros(size, dtype=torch.float32)
        is_aligned = with_tables and _are_matrices_aligned(targets)
        tables = torch.zeros(*size, 4, dtype=torch.int64, device=device) if with_tables else None
        self._tables = tables
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
                None if tables is None else tables[row],
                is_aligned,
            )
            for row, (name, shape) in enumerate(linears.items())
        }
        self._experts = {
            name: ExpertTable(shape, num_places, device if with_tables else None, is_aligned)
            for name, shape in targets.items()
            if shape.kind == "experts"
        }
        self.modules |= {name: table.pool for name, table in self._experts.items()}

    def load(self, place: int, weights: LoRAWeights) -> None:
        """Put an adapter into `place`, over whatever stood there. Waits for the copy, where there is one: on a device
        that is for proofs and benchmarks, requests' adapters are copied by `AdapterCopies`."""
        started = time.perf_counter()
        slab = self.make_room(place, weights.slab)
        if slab is not weights.slab:
            slab.copy_(weights.slab)
        self.enter(place, replace(weights, slab=slab))
        self.copies.observe(time.perf_counter() - started)

    def make_room(self, place: int, slab: torch.Tensor) -> torch.Tensor:
        """Clear `place` and return where the kernels will read `slab` [values] once it is copied there and entered:
        the place's own memory; for an adapter that is larger (one that brings whole embeddings along) new memory, from
        torch's allocator; `slab` itself where the device reads RAM."""
        self.clear(place)
        if self._memory is not None and slab.nbytes <= self._memory.shape[1]:
            return self._memory[place, : slab.nbytes].view(slab.dtype)
        if self._memory is None and slab.device == self._device:
            return slab
        return torch.empty_like(slab, device=self._device)

    def enter(self, place: int, weights: LoRAWeights) -> None:
        """Let kernels find an adapter in `place`, which is empty; its slab lies where `make_room` said."""
        slab = weights.slab
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
        if self._tables is not None:
            own = (self._address[place].expand(len(self._rank)), self._rank[:, place], self._offset_a[:, place])
            rows = module_table(*own, self._offset_b[:, place], self._scaling[:, place], slab.element_size())
            _write(self._tables[:, place], rows)
        if not weights.is_additive:
            self._is_additive[place] = False
            for name in weights.modules.keys() | weights.replaced.keys():
                extra = weights.extra(self._targets[name])
                if extra is not None and extra.rows is not None:
                    extra = replace(extra, rows=extra.rows.to(self._device))
                self.extras[name][place] = extra

    def clear(self, place: int) -> None:
        self._slabs[place] = None
        self._digests[place] = None
        self._address[place] = 0
        self._rank[:, place] = 0
        if self._tables is not None:
            self._tables[:, place] = 0
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
        return self._changes(self._heads, places)

    def changes_embedding(self, places: Iterable[int]) -> bool:
        """Whether any adapter in `places` does anything to the input embedding."""
        return self._changes(self._embeddings, places)

    def _changes(self, names: list[str], places: Iterable[int]) -> bool:
        places = list(places)
        return any(
            bool(self._rank[self._row_of[name], place]) or self.extras[name][place] is not None
            for name in names
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

    def __init__(self, shape: ModuleShape, num_places: int, device: torch.device | None, is_aligned: bool):
        """`device`: where kernels read the table, if they do."""
        self._shape = shape
        size = num_places * shape.num_experts
        long = torch.int64
        self._address = torch.zeros(size, dtype=long)
        self._rank = torch.zeros(size, dtype=torch.int32)
        self._offset_a, self._offset_b = torch.zeros(size, dtype=long), torch.zeros(size, dtype=long)
        self._scaling = torch.zeros(size, dtype=torch.float32)
        self._slabs: list[torch.Tensor | None] = [None] * size
        self._table = None if device is None else torch.zeros(size, 4, dtype=long, device=device)
        self.pool = ModulePool(
            shape.in_features,
            shape.out_features,
            self._slabs,
            self._address,
            self._rank,
            self._offset_a,
            self._offset_b,
            self._scaling,
            self._table,
            is_aligned,
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
        if self._table is not None:
            own = (self._address[entries], self._rank[entries], self._offset_a[entries], self._offset_b[entries])
            _write(self._table[entries], module_table(*own, self._scaling[entries], slab.element_size()))

    def clear(self, place: int) -> None:
        entries = self._entries(place)
        self._slabs[entries] = [None] * self._shape.num_experts
        self._address[entries] = 0
        self._rank[entries] = 0
        if self._table is not None:
            self._table[entries] = 0


def _write(table: torch.Tensor, rows: torch.Tensor) -> None:
    """Host rows into a table on a device, without waiting: pinned memory is kept by torch until they are there."""
    table.copy_(rows.pin_memory() if table.is_cuda else rows, non_blocking=True)


def _are_matrices_aligned(targets: Mapping[str, ModuleShape]) -> bool:
    """Whether every matrix in every adapter's slab starts at a multiple of 8 numbers, whatever the ranks are: what
    stands in a slab is so many rows of one of these lengths."""
    for shape in targets.values():
        lengths = [] if shape.kind == "leaf" else [shape.in_features, shape.out_features]
        lengths += [prod(sizes[1:] or sizes) for sizes in shape.parameters.values()]
        if any(length % 8 for length in lengths):
            return False
    return True

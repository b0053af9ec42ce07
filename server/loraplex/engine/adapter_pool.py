"""AdapterPool: the device tier. Which adapter's slab stands in which place, as the kernels read it.

On a CPU a place holds the RAM tier's own slab: no copy. On another device it holds a copy. The tables are [modules,
places]; every LoRA layer sees its row as a `ModulePool`. Written only by the runner, between forward passes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from loraplex.lora.weights import LoRAWeights, ModuleShape
from loraplex.model.lora_layers import Vectors
from loraplex.ops import ModulePool


class AdapterPool:
    def __init__(self, targets: Mapping[str, ModuleShape], num_places: int, device: torch.device):
        self.num_places = num_places
        self._device = device
        self._row_of = {name: row for row, name in enumerate(targets)}
        self._head_rows = [row for row, shape in enumerate(targets.values()) if shape.kind == "head"]
        size = (len(targets), num_places)
        self._slabs: list[torch.Tensor | None] = [None] * num_places
        self._digests: list[str | None] = [None] * num_places
        # Written on the host, so that nothing here waits for the device.
        self.vectors: dict[str, list[Vectors | None]] = {name: [None] * num_places for name in targets}
        self._targets = targets
        self._has_vectors = [False] * num_places
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
            for row, (name, shape) in enumerate(targets.items())
        }

    def load(self, place: int, weights: LoRAWeights) -> None:
        """Put an adapter into `place`, over whatever stood there."""
        self.clear(place)
        slab = weights.slab.to(self._device, non_blocking=True)
        weights = replace(weights, slab=slab)
        self._slabs[place] = slab
        self._digests[place] = weights.digest
        self._address[place] = slab.data_ptr()
        for name, delta in weights.modules.items():
            row = self._row_of[name]
            self._rank[row, place] = delta.rank
            self._offset_a[row, place] = delta.offset_a
            self._offset_b[row, place] = delta.offset_b
            self._scaling[row, place] = delta.scaling
        if weights.has_vectors:
            self._has_vectors[place] = True
            for name in weights.modules:
                gain, shift = weights.vectors(self._targets[name])
                if gain is not None or shift is not None:
                    self.vectors[name][place] = (gain, shift)

    def clear(self, place: int) -> None:
        self._slabs[place] = None
        self._digests[place] = None
        self._address[place] = 0
        self._rank[:, place] = 0
        if self._has_vectors[place]:
            self._has_vectors[place] = False
            for places in self.vectors.values():
                places[place] = None

    def digest_in(self, place: int) -> str | None:
        return self._digests[place]

    def has_vectors(self, place: int) -> bool:
        """Whether the adapter in `place` has gains or shifts beside its deltas."""
        return self._has_vectors[place]

    def has_head(self, places: Iterable[int]) -> bool:
        """Whether any adapter in `places` is on the output head."""
        return any(bool(self._rank[row, place]) for row in self._head_rows for place in places)

    def max_rank(self, places: list[int]) -> int:
        """The largest rank of any module of the adapters in `places`."""
        return int(self._rank[:, places].max()) if places else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the slabs that stand in places (on a CPU they are the RAM tier's)."""
        return sum(slab.nbytes for slab in self._slabs if slab is not None)

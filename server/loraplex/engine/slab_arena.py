"""SlabArena: the RAM tier's memory where its slabs are copied to a device: one block, pinned once.

A copy from pinned memory goes on beside the engine's thread; one from other memory holds it. But pinning a block may
make the device finish what it has begun (CUDA C++ Programming Guide, "Implicit Synchronization"), so it is done before
the first request and never again. torch's own pinned allocator will not do: it pins whenever it has no block of the
size, rounds sizes up to powers of two, and keeps every block it ever had, so --adapter-cache-bytes would not bound it.

    block  | slab | free | slab | slab | free ... |      ranges of bytes, multiples of SLAB_ALIGNMENT

A slab is a tensor over its range. The range is free again when the last tensor over it is gone, whoever holds it.
"""

import threading
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from loraplex.engine.memory import available_memory
from loraplex.errors import StartupError
from loraplex.lora.weights import SLAB_ALIGNMENT, AllocateSlab, aligned, allocate_slab

Pin = Callable[[torch.Tensor], Callable[[], object]]
"""Pins the memory of a tensor; returns what unpins it."""


class SlabArena:
    """Any number of threads may share it. `pin` is called once; what it returned, when arena and slabs are all gone."""

    def __init__(self, nbytes: int, pin: Pin):
        self.nbytes = nbytes
        block = torch.empty(nbytes, dtype=torch.uint8)
        self._bytes: np.ndarray = block.numpy()
        weakref.finalize(self._bytes, pin(block)).atexit = False  # then the process's memory goes as a whole
        self._lock = threading.Lock()  # guards _free
        self._free: list[tuple[int, int]] = [(0, nbytes // SLAB_ALIGNMENT * SLAB_ALIGNMENT)]  # by start, never adjacent
        # A deque, since a slab may die in any thread at any time, also in one that holds the lock.
        self._returned: deque[tuple[int, int]] = deque()

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised slab of `numel` elements: of the smallest free range that holds it, so that a slab of the
        same size finds the range of the one it replaces. Where slabs of different sizes have left no range that is
        large enough, it is ordinary memory: right, and slower to copy."""
        nbytes = numel * dtype.itemsize
        size = aligned(max(1, nbytes))
        with self._lock:
            self._take_back()
            start, end = min(
                (one for one in self._free if one[1] - one[0] >= size), key=lambda one: one[1] - one[0], default=(0, 0)
            )
            if end == 0:
                return allocate_slab(numel, dtype)
            self._free.remove((start, end))
            if start + size < end:
                insort(self._free, (start + size, end))
        own = self._bytes[start : start + nbytes]
        weakref.finalize(own, self._returned.append, (start, start + size)).atexit = False
        return torch.from_numpy(own).view(dtype)  # its storage holds `own`

    @property
    def free_bytes(self) -> int:
        with self._lock:
            self._take_back()
            return sum(end - start for start, end in self._free)

    def _take_back(self) -> None:
        while self._returned:
            insort(self._free, self._returned.popleft())
        merged: list[tuple[int, int]] = []
        for start, end in self._free:
            if merged and merged[-1][1] == start:
                merged[-1] = merged[-1][0], end
            else:
                merged.append((start, end))
        self._free = merged

    def check_integrity(self) -> None:
        with self._lock:
            self._take_back()
            for (_, end), (start, _) in zip(self._free, self._free[1:], strict=False):
                assert end < start, "free ranges of the arena overlap or touch"
            assert all(0 <= start < end <= self.nbytes for start, end in self._free), "a free range is outside"


def pin_for_cuda(block: torch.Tensor) -> Callable[[], object]:
    """Raises StartupError when the driver refuses."""
    runtime = torch.cuda.cudart()
    assert runtime is not None, "torch was built without CUDA"
    address = block.data_ptr()
    code = int(runtime.cudaHostRegister(address, block.nbytes, 0))
    if code:
        raise StartupError(
            f"CUDA could not pin {block.nbytes} bytes of RAM for adapters (error {code}). Lower --adapter-cache-bytes, "
            "or raise the limit of locked memory (ulimit -l)."
        )
    return lambda: runtime.cudaHostUnregister(address)


def slab_allocator(nbytes: int, device: torch.device, pin: Pin = pin_for_cuda) -> AllocateSlab:
    """Where the slabs of a RAM tier of `nbytes` come from. On a CPU the kernels read them where they are, and nothing
    is pinned. Raises StartupError when there is not so much RAM."""
    if device.type != "cuda":
        return allocate_slab
    available = available_memory(torch.device("cpu"))
    if nbytes > available:
        raise StartupError(
            f"--adapter-cache-bytes {nbytes} is pinned at start, and {available} bytes of RAM are available. Lower it."
        )
    return SlabArena(nbytes, pin).allocate

"""CopyStream: a device's queue of copies from RAM, beside the one in which it computes."""

from typing import Protocol

import torch
from torch import Tensor


class CopyEvent(Protocol):
    """The end of one copy, as `torch.cuda.Event` has it."""

    def query(self) -> bool:
        """Whether the copy is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class CopyStream(Protocol):
    def copy(self, slab: Tensor, room: Tensor) -> CopyEvent:
        """Begin to copy `slab` [values], in RAM, into `room` [values], on the device, once the device has done what
        was launched before: kernels may be reading what stood there. Until the event neither may be touched."""
        ...


class CudaCopyStream:
    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, slab: Tensor, room: Tensor) -> CopyEvent:
        # also if `room` is new: the allocator may have given out memory that kernels under way read before it was freed
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            room.copy_(slab, non_blocking=True)
        return self._stream.record_event()

"""StepBuffer: all of a step's metadata in one piece of memory, so that one copy brings it to the device."""

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes; whatever is read by vectors starts at a multiple

Field = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape."""


class StepBuffer:
    """Arrays at fixed places of one flat buffer: `arrays` are written on the host, `tensors` read on the device.

    A tensor's address never changes, so what a captured graph has read once it reads again. On a CPU the two are the
    same memory and nothing is copied. Elsewhere there are two host buffers in turn, in pinned memory: `begin` gives the
    one whose copy is the older, and waits for that copy if it is not done (it is, unless the host is two steps ahead).
    """

    def __init__(self, fields: Mapping[str, Field], device: torch.device, is_apart: bool | None = None):
        """The last field is the one that `send` may cut. `is_apart`: whether host and device have memory of their own;
        None: unless the device is a CPU."""
        is_apart = device.type != "cpu" if is_apart is None else is_apart
        self._places: dict[str, tuple[int, Field]] = {}
        size = 0
        for name, (dtype, shape) in fields.items():
            self._places[name] = (size, (dtype, shape))
            size += -(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._hosts = [self._device]
        if is_apart:
            self._hosts = [torch.zeros(size, dtype=torch.uint8, pin_memory=self._device.is_cuda) for _ in range(2)]
        self._copies = [torch.cuda.Event() if self._device.is_cuda else None for _ in self._hosts]
        self._is_apart = is_apart
        self._turn = 0
        self._views = [{name: view.numpy() for name, view in self._cut(host).items()} for host in self._hosts]
        self.tensors: Mapping[str, Tensor] = self._cut(self._device)

    def _cut(self, flat: Tensor) -> dict[str, Tensor]:
        return {
            name: flat[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, (dtype, shape)) in self._places.items()
        }

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """To be written between `begin` and `send`; what stands there is an earlier step's."""
        return self._views[self._turn]

    def begin(self) -> None:
        """Turn to the other host buffer."""
        self._turn = (self._turn + 1) % len(self._hosts)
        copied = self._copies[self._turn]
        if copied is not None:
            copied.synchronize()  # does nothing for one that was never recorded

    def send(self, num_last: int) -> None:
        """One copy, in the order of the stream, of all fields, of the last one the first `num_last` entries."""
        if not self._is_apart:
            return
        start, (dtype, shape) = next(reversed(self._places.values()))
        end = start + num_last * prod(shape[1:]) * dtype.itemsize
        self._device[:end].copy_(self._hosts[self._turn][:end], non_blocking=True)
        copied = self._copies[self._turn]
        if copied is not None:
            copied.record()

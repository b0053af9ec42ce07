"""A stand-in for CUDA graphs: a replay runs the recorded call again, and fails where a graph would have gone wrong.

A graph repeats its launches as they were: grids, numbers and addresses are frozen, only what stands at the addresses
may be new. So every operation of torch and every launch of a kernel is written down as the host made it, and a replay
must make the very same ones: an address that is not of a tensor made within the call is one a graph would have kept.
Nothing may ask a tensor for its numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2"}


class HostLog(TorchDispatchMode):
    """What the host says to the device, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple] = []
        self._made: dict[int, int] = {}  # address of the memory -> when it was made
        self._kept: list[Tensor] = []  # so that no address is made twice

    def seen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.is_mkldnn:  # a packed weight has no address to show
                return ("packed", id(value))
            memory = value.untyped_storage().data_ptr()
            where = ("made", self._made[memory]) if memory in self._made else ("at", memory)
            return (*where, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)
        return value if isinstance(value, int | float | str | bool | None) else str(value)

    def note(self, name: str, *values: Any) -> None:
        self.entries.append((name, *(self.seen(leaf) for leaf in tree_leaves(values))))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name()
        assert name.split("::")[1].split(".")[0] not in WAITS, f"{name} waits for the device"
        if "lift_fresh" not in name:  # of a number that the call itself has made a tensor
            self.note(name, args, kwargs)
        result = func(*args, **(kwargs or {}))
        given = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_mkldnn)
        known = {leaf.untyped_storage().data_ptr() for leaf in given}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and ("lift_fresh" in name or leaf.untyped_storage().data_ptr() not in known):
                self._made.setdefault(leaf.untyped_storage().data_ptr(), len(self._made))
                self._kept.append(leaf)
        return result

    @contextmanager
    def writing(self) -> Iterator[None]:
        run = InterpretedFunction.run

        def noted(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            self.note(function.fn.__name__, grid, args, sorted(kwargs.items()))
            with torch._C._DisableTorchDispatch():
                return run(function, *args, grid=grid, warmup=warmup, **kwargs)

        InterpretedFunction.run = noted
        try:
            with self:
                yield
        finally:
            InterpretedFunction.run = run


class Reruns:
    """A `Capture`."""

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        first = HostLog()
        with first.writing():
            call()
        self.num_captures += 1

        def replay() -> None:
            again = HostLog()
            with again.writing():
                call()
            for before, now in zip(first.entries, again.entries, strict=False):
                assert before == now, f"a graph would have kept {before}, and this step has {now}"
            assert len(first.entries) == len(again.entries)
            self.num_replays += 1

        return replay

"""CountedOps: the ops of a runner, with every call into LoRA's arithmetic counted."""

from typing import Any

from loraplex.ops import Ops

LORA_OPS = ("shrink", "expand", "lora")
"""An op whose name holds one of these is LoRA's, those that are added later included."""


class CountedOps:
    """Stands in front of `ops`. `calls` grows by one with every call of a LoRA op."""

    def __init__(self, ops: Ops):
        self._ops = ops
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ops, name)
        if callable(value) and any(part in name for part in LORA_OPS):
            value = self._counted(value)
        setattr(self, name, value)  # found without this function the next time
        return value

    def _counted(self, op: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return op(*args, **kwargs)

        return call

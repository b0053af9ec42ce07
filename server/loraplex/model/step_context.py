"""StepContext: what the layers must know of the running step.

One per runner, handed to the LoRA layers when they are made. The runner alone fills it before a forward pass and
empties it after.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from loraplex.ops import LoRASegments


class StepContext:
    def __init__(self) -> None:
        self.lora: LoRASegments | None = None  # None: every row is the base's, no LoRA op runs

    @contextmanager
    def running(self, lora: LoRASegments | None) -> Iterator[None]:
        self.lora = lora
        try:
            yield
        finally:
            self.lora = None

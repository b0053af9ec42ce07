"""StepContext: what the layers must know of the running step.

One per runner, handed to the LoRA layers when they are made. The runner alone fills it before a forward pass and
empties it after.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loraplex.ops import LoRASegments

VectorSegment = tuple[int, int, int]
"""(start, end, place) of a segment whose adapter has gains or shifts beside its deltas."""


class StepContext:
    def __init__(self) -> None:
        self.lora: LoRASegments | None = None  # None: every row is the base's, no LoRA op runs
        self.vector_segments: Sequence[VectorSegment] = ()

    @contextmanager
    def running(self, lora: LoRASegments | None, vector_segments: Sequence[VectorSegment] = ()) -> Iterator[None]:
        self.lora = lora
        self.vector_segments = vector_segments
        try:
            yield
        finally:
            self.lora = None
            self.vector_segments = ()

"""StepContext: what the layers must know of the running step.

One per runner, handed to the LoRA layers when they are made. The runner alone fills it before a forward pass and
empties it after.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraplex.ops import LoRASegments


@dataclass(frozen=True, slots=True)
class Span:
    """One segment on the host: rows start:end are of the adapter in `place`; `offset` and `scale` as in
    LoRASegments."""

    start: int
    end: int
    place: int
    offset: int
    scale: float


@dataclass(frozen=True, slots=True)
class StepLoRA:
    """The segments of a step, for the kernels and on the host. `extra_spans`: those whose adapter has something beside
    its deltas somewhere."""

    segments: LoRASegments
    spans: tuple[Span, ...]
    extra_spans: tuple[Span, ...] = ()


class StepContext:
    def __init__(self) -> None:
        self.body: StepLoRA | None = None  # over all tokens; None: every row is the base's, no LoRA op runs
        self.head: StepLoRA | None = None  # over the rows whose logits are wanted; None: no adapter is on the head
        self.merged: str | None = None  # the adapter whose merged weights stand for the base's in this step

    @contextmanager
    def running(self, body: StepLoRA | None, head: StepLoRA | None = None, merged: str | None = None) -> Iterator[None]:
        assert merged is None or body is None, "a merged step runs no LoRA op"
        self.body, self.head, self.merged = body, head, merged
        try:
            yield
        finally:
            self.body = self.head = self.merged = None

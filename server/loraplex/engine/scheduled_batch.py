"""ScheduledBatch: what the scheduler decided for one step, and what the runner answers. Plain data, no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraplex.engine.messages import Failure, TokenLogprobs
from loraplex.engine.sequence import Sequence

if TYPE_CHECKING:
    from loraplex.lora.weights import LoRAWeights


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """`num_new_tokens` of `seq` from its `num_computed_tokens` on; `places` of its composition's adapters."""

    seq: Sequence
    num_new_tokens: int
    places: tuple[int, ...]

    @property
    def is_last_chunk(self) -> bool:
        """Whether the step reaches the end of the sequence, so that a token can be sampled."""
        return self.seq.num_computed_tokens + self.num_new_tokens == self.seq.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Entries are ordered by composition, so one adapter's tokens are neighbours. `adapter_loads`: what must
    stand in which place before the forward pass."""

    step: int
    entries: tuple[ScheduledSequence, ...]
    adapter_loads: tuple[tuple[int, "LoRAWeights"], ...]

    @property
    def places(self) -> set[int]:
        """The places that this step's adapters stand in."""
        return {place for entry in self.entries for place in entry.places}

    @property
    def sole_adapter(self) -> str | None:
        """The adapter whose own every row of the step is, at scale 1 and with no other; None: there is none such."""
        compositions = {entry.seq.request.composition for entry in self.entries}
        if len(compositions) != 1:
            return None
        (composition,) = compositions
        return composition[0].digest if len(composition) == 1 and composition[0].scale == 1.0 else None

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_new_tokens for entry in self.entries)


@dataclass(frozen=True, slots=True)
class RowResult:
    """What the runner gives back for one entry."""

    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    failure: Failure | None = None

"""Draft: a batch in the making."""

from typing import TYPE_CHECKING

from loraplex.engine.adapter_places import AdapterPlaces
from loraplex.engine.scheduled_batch import ScheduledBatch, ScheduledSequence
from loraplex.engine.sequence import Sequence

if TYPE_CHECKING:
    from loraplex.lora.weights import LoRAWeights


class Draft:
    """The tokens given out so far and what is left of the budget.

    `keeps_adapters`: an overdue line lacks places or RAM, so no adapter that is not in use is taken into use.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.tokens: dict[Sequence, int] = {}
        self.adapter_loads: dict[int, LoRAWeights] = {}
        self.keeps_adapters = False

    def take(self, seq: Sequence, num_tokens: int) -> None:
        self.tokens[seq] = num_tokens
        self.budget -= num_tokens

    def give_back(self, seq: Sequence) -> int:
        num_tokens = self.tokens.pop(seq, 0)
        self.budget += num_tokens
        return num_tokens

    def batch(self, step: int, places: AdapterPlaces) -> ScheduledBatch:
        entries = [
            ScheduledSequence(seq, n, tuple(places.place_of(digest) for digest in seq.digests))
            for seq, n in self.tokens.items()
        ]
        entries.sort(key=_segment_order)
        return ScheduledBatch(step, tuple(entries), tuple(self.adapter_loads.items()))


def _segment_order(entry: ScheduledSequence) -> tuple:
    """One composition's tokens are neighbours, and so are one adapter's, whatever its scale."""
    return entry.places, [use.scale for use in entry.seq.request.composition], entry.seq.arrival

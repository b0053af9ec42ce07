"""KeptLogits: distributions of one sequence's prompt positions, kept so that another sequence can be held against them.

    a sequence with `keeps`     every reported position's distribution stays here under that name, as float32 [V]
    a sequence with `against`   every reported position's divergence from the position of the same index under that name

The divergence is that of Kullback and Leibler ("On Information and Sufficiency", 1951), over the whole vocabulary, in
nats: KL(p || q) = sum over tokens of p (log p - log q), p the sequence's own distribution, q the one that is kept. The
index counts from the first position that is reported (`prompt_logprobs_from`), so the two prompts may differ.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from loraplex.engine.messages import TokenLogprobs
from loraplex.engine.sequence import Sequence

MAX_BYTES = 256 << 20


class KeptLogits:
    """At most `max_bytes`; of more the name that was kept first goes, and what asks for it gets no divergence."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._kept: dict[str, list[Tensor]] = {}  # a row [V] for each index, in order
        self.nbytes = 0

    def see(
        self, seq: Sequence, index: int, logits: Tensor, found: tuple[TokenLogprobs, ...]
    ) -> tuple[TokenLogprobs, ...]:
        """Take in the reported positions from `index` on, `logits` [n, V] of them. `found` of the same positions, with
        divergences if they were asked for."""
        keeps, against = seq.request.keeps, seq.request.against
        if keeps is None and against is None:
            return found
        logprobs = logits.log_softmax(-1)
        if keeps is not None:
            self._keep(keeps, index, logprobs)
        rows = self._kept.get(against, [])[index : index + len(found)] if against is not None else []
        if not rows:
            return found
        divergences = divergence(logprobs[: len(rows)], torch.stack(rows)).tolist()
        compared = (replace(one, divergence=nats) for one, nats in zip(found, divergences, strict=False))
        return (*compared, *found[len(rows) :])

    def forget(self, names: Iterable[str]) -> None:
        """What is kept under these names is not needed any more. Unknown ones are fine."""
        for name in names:
            self.nbytes -= sum(row.nbytes for row in self._kept.pop(name, ()))

    def _keep(self, name: str, index: int, logprobs: Tensor) -> None:
        rows = self._kept.setdefault(name, [])
        if index != len(rows):  # its beginning was given up, or it is another sequence's
            return
        rows += logprobs.unbind()
        self.nbytes += logprobs.nbytes
        while self.nbytes > self._max_bytes:
            first = next(iter(self._kept))
            self.nbytes -= sum(row.nbytes for row in self._kept[first])
            if first == name:  # what follows of it is not kept either
                self._kept[first] = []
                return
            del self._kept[first]

    def check_integrity(self) -> None:
        assert self.nbytes == sum(row.nbytes for rows in self._kept.values() for row in rows) <= self._max_bytes


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of each row, from log-probabilities [n, V]. Rounding makes no distribution nearer than
    itself: it is never below 0."""
    terms = p.exp() * (p - q)
    return torch.where(p.isneginf(), 0.0, terms).sum(-1).clamp_min(0.0)

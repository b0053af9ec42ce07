"""Popularity: which adapter a request asks for. A stated distribution over ranks, and draws from it by seed.

    distinct       each in turn, as the peers were measured: request i asks for adapter i mod N
    identical      one adapter for all
    uniform        every adapter alike
    zipf:A         p(k) ~ 1 / k^A for k = 1..N
    hot:SHARE      the first adapter has SHARE of the requests, the others divide the rest evenly

Papers mean different things by "Zipf" and "alpha" (S-LoRA draws from a power function, Punica's ranks fall
geometrically), so the probabilities are printed with every result.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from loraplex.errors import InvalidRequest

KINDS = ("distinct", "identical", "uniform", "zipf", "hot")


@dataclass(frozen=True, slots=True)
class Popularity:
    kind: str
    value: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """ "uniform", "zipf:1.0", "hot:0.5", ... Raises InvalidRequest."""
        kind, _, number = text.partition(":")
        defaults = {"zipf": 1.0, "hot": 0.5}
        try:
            value = float(number) if number else defaults.get(kind, 0.0)
        except ValueError:
            value = float("nan")
        is_right = 0 <= value <= 1 if kind == "hot" else 0 <= value <= 100
        if kind not in KINDS or not is_right or (number and kind not in defaults):
            raise InvalidRequest(
                f"--popularity {text!r} is not understood. Say distinct, identical, uniform, zipf:EXPONENT (as "
                "zipf:1.0) or hot:SHARE (as hot:0.5)."
            )
        return cls(kind, value)

    def pmf(self, count: int) -> np.ndarray:
        """float64 [count], sums to 1: the probability of each adapter; of "distinct", how often each comes."""
        if self.kind == "identical":
            weights = np.eye(1, count)[0]
        elif self.kind == "zipf":
            weights = np.arange(1, count + 1, dtype=np.float64) ** -self.value
        elif self.kind == "hot" and count > 1:
            weights = np.full(count, (1 - self.value) / (count - 1))
            weights[0] = self.value
        else:
            weights = np.ones(count)
        return weights / weights.sum()

    def draws(self, count: int, seed: int) -> Iterator[int]:
        """An endless stream of indices below `count`."""
        if self.kind == "distinct":
            index = 0
            while True:
                yield index
                index = (index + 1) % count
        generator = np.random.default_rng(seed)
        pmf = self.pmf(count)
        while True:
            yield from generator.choice(count, 256, p=pmf).tolist()

    def expected_distinct(self, count: int, batch: float) -> float:
        """How many different adapters, of `count`, a batch of `batch` requests holds on average."""
        if self.kind == "distinct":
            return min(float(count), batch)
        return float((1 - (1 - self.pmf(count)) ** batch).sum())

    def __str__(self) -> str:
        return f"{self.kind}:{self.value:g}" if self.kind in ("zipf", "hot") else self.kind

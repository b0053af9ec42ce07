"""Documents packed into rows of one fixed shape.

One shape for every step, because oneDNN prepares its kernels per shape: with varying lengths steps slow down
several times over. Documents of a row do not see each other (`segments`), and each starts at position 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from loraplex.demo.chat import Piece

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """[rows, row_tokens] int64 each.

    `labels` holds the next token, or IGNORED. `segments` numbers a row's documents from 1; 0 is padding.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor

    def attention_bias(self) -> torch.Tensor:
        """[rows, 1, row_tokens, row_tokens] float32: 0 where one sees the other, else -1e9."""
        same = self.segments[:, :, None] == self.segments[:, None, :]
        seen = same & torch.ones(same.shape[-2:], dtype=torch.bool).tril()
        return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None]


class Packer:
    """Draws documents and packs them. A batch depends on seed and step only, so a run resumes exactly."""

    # draw: a document from a random generator; seed: names the stream of batches
    def __init__(
        self,
        tokenizer: Tokenizer,
        draw: Callable[[Random], list[Piece]],
        rows: int,
        row_tokens: int,
        seed: str,
    ):
        self.tokenizer, self.draw, self.rows, self.row_tokens, self.seed = (
            tokenizer,
            draw,
            rows,
            row_tokens,
            seed,
        )

    def batch(self, step: int) -> Batch:
        """First fit: a document goes to the first row with room; one longer than a row is left out."""
        rng = Random(f"{self.seed}/{step}")
        rows: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(self.rows)]
        free = [self.row_tokens] * self.rows
        misfits = 0  # documents in succession, or nearly, that no row had room for: the rows are full enough
        while misfits < 4:
            ids, labels = self._encode(self.draw(rng))
            fitting = [row for row in range(self.rows) if free[row] >= len(ids)]
            if not fitting:
                misfits += len(ids) <= self.row_tokens
                continue
            rows[fitting[0]].append((ids, labels))
            free[fitting[0]] -= len(ids)
        return self._collate(rows)

    def _encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
        """Token ids (the last one only predicted, never fed) and the label after each."""
        ids: list[int] = []
        targets: list[int] = []
        for piece in pieces:
            tokens = self.tokenizer.encode(piece.text, add_special_tokens=False).ids
            ids += tokens
            targets += tokens if piece.learned else [IGNORED] * len(tokens)
        return ids[:-1], targets[1:]

    def _collate(self, rows: list[list[tuple[list[int], list[int]]]]) -> Batch:
        shape = (self.rows, self.row_tokens)
        input_ids, positions, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        labels = torch.full(shape, IGNORED)
        for row, documents in enumerate(rows):
            start = 0
            for number, (ids, targets) in enumerate(documents, start=1):
                end = start + len(ids)
                input_ids[row, start:end] = torch.tensor(ids)
                labels[row, start:end] = torch.tensor(targets)
                positions[row, start:end] = torch.arange(len(ids))
                segments[row, start:end] = number
                start = end
        return Batch(input_ids, labels, positions, segments)

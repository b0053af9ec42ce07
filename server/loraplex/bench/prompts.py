"""Prompts: random texts of the wanted length, no two alike and new in every run: a prefix cache that still holds an
earlier run would answer for the model."""

from string import ascii_lowercase

import numpy as np

from loraplex.bench.server import ServerFacts, ServerUnderTest

_POOL_WORDS = 2000


class Prompts:
    """`pool`: token ids to draw from, when the server says what they are: lengths are exact then. None: words, whose
    number `calibrate` adapts to the server's own count of their tokens."""

    def __init__(self, num_tokens: int, pool: list[int] | None = None):
        self._num_tokens = num_tokens
        self._generator = np.random.default_rng()
        self._pool = None if pool is None else np.unique(pool)
        self._num_words = num_tokens

    @classmethod
    async def of(
        cls, server: ServerUnderTest, facts: ServerFacts, num_tokens: int, *, is_chat: bool = False
    ) -> "Prompts":
        pool = None
        if not is_chat:
            text = cls(_POOL_WORDS).next()
            assert isinstance(text, str)
            pool = await server.token_ids(text, facts.base)
        return cls(num_tokens, pool)

    @property
    def is_exact(self) -> bool:
        return self._pool is not None

    def calibrate(self, num_tokens: int) -> None:
        """The last prompt was `num_tokens` tokens long to the server."""
        if not self.is_exact:
            self._num_words = max(1, round(self._num_words * self._num_tokens / num_tokens))

    def next(self) -> str | list[int]:
        if self._pool is not None:
            return self._generator.choice(self._pool, self._num_tokens).tolist()
        letters = self._generator.choice(list(ascii_lowercase), (self._num_words, 4))
        return " ".join("".join(word) for word in letters)

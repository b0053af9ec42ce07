"""Detokenizer: one token in, the text it completes out. Never half a character, never text that later changes."""

from collections.abc import Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import DecodeStream

_CONTEXT = 6
"""Prompt tokens the decoder sees first, so that a first token keeps the space in front of it."""


class Detokenizer:
    def __init__(self, tokenizer: RustTokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        context = list(prompt_ids[-_CONTEXT:])
        # A context that ends inside a character would let the decoder wait for the rest of the prompt's.
        if tokenizer.decode(context, skip_special_tokens=skip_special_tokens).endswith("�"):
            context = []
        self._stream = DecodeStream(ids=context, skip_special_tokens=skip_special_tokens)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is incomplete."""
        try:
            return self._stream.step(self._tokenizer, token_id) or ""
        except Exception:  # the stream lost its place (an id it cannot decode): go on from this token alone
            self._stream = DecodeStream(ids=None, skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._tokenizer, token_id) or ""

"""How deltas become OpenAI's objects: one class for completions, one for chat, streamed or whole."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraplex.engine.messages import TokenLogprobs
from loraplex.serving.generation import ChoiceDelta, Generation, TokenInfo


@dataclass(slots=True)
class _Folded:
    """One choice, as far as it has come."""

    text: list[str] = field(default_factory=list)
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    offset: int = 0  # characters of the tokens streamed so far


class Reply(ABC):
    """`opening` and `chunks` make the stream, `add` and `whole` the single answer."""

    object_whole: str
    object_chunk: str
    id_prefix: str

    def __init__(self, generation: Generation):
        self._generation = generation
        self._created = int(time.time())
        self._folded = {index: _Folded() for index in range(len(generation.requests))}
        self._tokenizer = generation.tokenizer

    # -- both -------------------------------------------------------------------------------------------------

    def frame(self, object_name: str | None = None) -> dict[str, Any]:
        return {
            "id": f"{self.id_prefix}-{self._generation.request_id}",
            "object": object_name or self.object_chunk,
            "created": self._created,
            "model": self._generation.model,
            "system_fingerprint": None,
        }

    def usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }

    # -- whole ------------------------------------------------------------------------------------------------

    def add(self, delta: ChoiceDelta) -> None:
        choice = self._folded[delta.index]
        choice.text.append(delta.text)
        choice.tokens += delta.tokens
        if delta.finish_reason is not None:
            choice.finish_reason = str(delta.finish_reason)
            choice.stop_reason = delta.stop_reason

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(index, folded) for index, folded in self._folded.items()]
        return {**self.frame(self.object_whole), "choices": choices, "usage": self.usage()}

    @abstractmethod
    def _choice(self, index: int, folded: _Folded) -> dict[str, Any]: ...

    # -- stream -----------------------------------------------------------------------------------------------

    def opening(self) -> Iterable[dict[str, Any]]:
        return ()

    @abstractmethod
    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]: ...


class CompletionReply(Reply):
    object_whole = "text_completion"
    object_chunk = "text_completion"
    id_prefix = "cmpl"

    def _choice(self, index: int, folded: _Folded) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(folded.text),
            "logprobs": self._logprobs(folded.tokens, 0),
            "finish_reason": folded.finish_reason,
            "stop_reason": folded.stop_reason,
        }

    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]:
        folded = self._folded[delta.index]
        offset = folded.offset
        folded.offset += sum(len(token.text) for token in delta.tokens)
        if not (delta.text or delta.tokens or delta.finish_reason):
            return
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(list(delta.tokens), offset),
            "finish_reason": None if delta.finish_reason is None else str(delta.finish_reason),
            "stop_reason": delta.stop_reason,
        }
        yield {**self.frame(), "choices": [choice]}

    def _logprobs(self, tokens: list[TokenInfo], offset: int) -> dict[str, Any] | None:
        """The legacy shape. Every token's own entry is among `top_logprobs`, with the very same number."""
        if not tokens:
            return None
        offsets, texts, logprobs, tops = [], [], [], []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
            texts.append(token.text)
            logprobs.append(None if token.logprobs is None else _finite(token.logprobs.logprob))
            tops.append(None if token.logprobs is None else self._top(token.text, token.logprobs))
        return {"text_offset": offsets, "tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops}

    def _top(self, text: str, logprobs: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, value in logprobs.top:  # two ids can read the same: the likelier one stays
            top.setdefault(self._tokenizer.token_text(token_id), _finite(value))
        top.setdefault(text, _finite(logprobs.logprob))
        return top


class ChatReply(Reply):
    object_whole = "chat.completion"
    object_chunk = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def _choice(self, index: int, folded: _Folded) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(folded.text), "refusal": None},
            "logprobs": self._logprobs(folded.tokens),
            "finish_reason": folded.finish_reason,
            "stop_reason": folded.stop_reason,
        }

    def opening(self) -> Iterable[dict[str, Any]]:
        for index in self._folded:
            yield self._chunk(index, {"role": "assistant", "content": ""})

    def chunks(self, delta: ChoiceDelta) -> Iterable[dict[str, Any]]:
        if delta.text or delta.tokens:
            yield self._chunk(delta.index, {"content": delta.text}, self._logprobs(list(delta.tokens)))
        if delta.finish_reason is not None:
            chunk = self._chunk(delta.index, {})
            chunk["choices"][0] |= {"finish_reason": str(delta.finish_reason), "stop_reason": delta.stop_reason}
            yield chunk

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return {**self.frame(), "choices": [choice]}

    def _logprobs(self, tokens: list[TokenInfo]) -> dict[str, Any] | None:
        content = [
            {
                **self._entry(token.token_id, token.logprobs.logprob),
                "top_logprobs": [self._entry(token_id, value) for token_id, value in token.logprobs.top],
            }
            for token in tokens
            if token.logprobs is not None
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        tokenizer = self._tokenizer
        return {
            "token": tokenizer.token_text(token_id),
            "logprob": _finite(logprob),
            "bytes": list(tokenizer.token_bytes(token_id)),
        }


def _finite(logprob: float) -> float:
    """JSON knows no infinity; a token that cannot come has -9999, as in vLLM."""
    return max(logprob, -9999.0)

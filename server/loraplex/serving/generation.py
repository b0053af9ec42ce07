"""Generation: the output side of one request. Tokens come in from the engine, text goes out.

It detokenizes, finds stop strings, trims, collects logprobs and usage, and aborts what is no longer wanted. A request
has P prompts and n choices for each; choice index = prompt index * n + j. The non-streaming answer folds the stream.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import EngineRequest, Failure, FinishReason, SequenceOutput, TokenLogprobs
from loraplex.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    ContextLengthExceeded,
    InsufficientMemory,
    InvalidRequest,
    LoraplexError,
    NotMergeable,
    NotReady,
    Overloaded,
    ProofTimedOut,
    RequestFailed,
)
from loraplex.model.detokenizer import Detokenizer
from loraplex.model.tokenizer import Tokenizer
from loraplex.routing.router import Routed
from loraplex.text.stopping import StopMatcher

PROOF_RETRY_SECONDS = 30
NON_FINITE = "non_finite_logits"

OnNonFinite = Callable[[EngineRequest, Sequence[int]], Awaitable[str]]
"""Told of a request with an adapter that ended with NaN, and the tokens it had put out; returns what came of it."""


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What the output side does with the tokens; the engine knows nothing of it."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenInfo:
    """One token of the answer as clients see it. `logprobs` None: the first prompt token, which nothing predicts."""

    token_id: int
    text: str
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one step added to one choice. `text` may be empty; `tokens` are there when logprobs were asked for."""

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    merged_tokens: int = 0  # of completion_tokens: computed on merged weights


@dataclass(slots=True)
class _Choice:
    index: int
    request: EngineRequest
    detokenizer: Detokenizer
    matcher: StopMatcher
    token_ids: list[int] = field(default_factory=list)  # of the output
    is_done: bool = False
    has_started: bool = False


@dataclass(slots=True)
class Generation:
    """A running request. `deltas` starts it; whoever made it must `close` it, started or not.

    model, adapter  the concrete name that answers, and the same for adapters only ("" for the base)
    end_token_ids   of the requests' stop tokens those that end an answer as EOS does, without being named in it
    on_non_finite   told when a choice ends with NaN; None: nobody is to blame for it
    routed          how a route led here; None: no route was asked
    lifetime        holds of the adapter's files, closed with the generation
    """

    request_id: str
    model: str
    adapter: str
    requests: Sequence[EngineRequest]
    options: OutputOptions
    num_choices: int  # n: choices a prompt
    engine: EngineClient
    tokenizer: Tokenizer
    lifetime: AsyncExitStack
    end_token_ids: frozenset[int] = frozenset()
    on_non_finite: OnNonFinite | None = None
    routed: Routed | None = None
    usage: Usage = field(default_factory=Usage)
    _choices: dict[str, _Choice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, request in enumerate(self.requests):
            detokenizer = self.tokenizer.detokenizer(
                request.token_ids, skip_special_tokens=self.options.skip_special_tokens
            )
            matcher = StopMatcher(self.options.stop, include_stop=self.options.include_stop)
            self._choices[request.seq_id] = _Choice(index, request, detokenizer, matcher)
            if index % self.num_choices == 0:
                self.usage.prompt_tokens += len(request.token_ids)

    async def close(self) -> None:
        """Let go of the adapter's files and of the place in the queue. May be called more than once."""
        await self.lifetime.aclose()

    async def deltas(self) -> AsyncGenerator[ChoiceDelta]:
        """Run, once. Raises RequestFailed and kin when a choice fails. Closing the iterator early aborts what still
        runs; use `aclosing`, so that it does not wait for the garbage collector."""
        num_open = len(self._choices)
        try:
            async with aclosing(self.engine.submit(tuple(self.requests))) as outputs:
                async for output in outputs:
                    choice = self._choices[output.seq_id]
                    if choice.is_done:
                        continue
                    if output.failure is not None:
                        raise await self._error(choice, output.failure)
                    delta = self._take(choice, output)
                    if delta.finish_reason is not None:
                        choice.is_done = True
                        num_open -= 1
                        if output.finish_reason is None:
                            self.engine.abort((output.seq_id,))
                    yield delta
                    if not num_open:
                        break
        finally:
            await self.close()

    async def _error(self, choice: _Choice, failure: Failure) -> LoraplexError:
        error = as_error(failure)
        if failure.code == NON_FINITE and choice.request.composition and self.on_non_finite is not None:
            found = await self.on_non_finite(choice.request, tuple(choice.token_ids))
            error = RequestFailed(f"{failure.message} {found}", code=failure.code)
        return error

    def _take(self, choice: _Choice, output: SequenceOutput) -> ChoiceDelta:
        params = choice.request.params
        text = ""
        tokens: list[TokenInfo] = []
        if not choice.has_started:
            choice.has_started = True
            if choice.index % self.num_choices == 0:
                self.usage.cached_tokens += output.num_cached_tokens
            if self.options.echo:
                text = self._prompt_text(choice.request)
                if params.prompt_logprobs is not None:
                    first = choice.request.token_ids[0]
                    tokens.append(TokenInfo(first, self.tokenizer.token_text(first), None))
        tokens += (self._info(logprobs) for logprobs in output.prompt_logprobs)
        reason, stop_reason = output.finish_reason, output.stop_reason
        if stop_reason in self.end_token_ids:
            stop_reason = None
        if output.token_id is not None:
            self.usage.completion_tokens += 1
            self.usage.merged_tokens += output.is_merged
            choice.token_ids.append(output.token_id)
            if output.logprobs is not None:
                tokens.append(self._info(output.logprobs))
            if reason is not FinishReason.STOP:  # the token that ends the text is not part of it
                piece = choice.detokenizer.push(output.token_id)
                text += choice.matcher.push(piece, is_armed=len(choice.token_ids) > self.options.min_tokens)
            if choice.matcher.matched is not None:
                return ChoiceDelta(choice.index, text, tuple(tokens), FinishReason.STOP, choice.matcher.matched)
        if reason is not None:
            text += choice.matcher.flush()
        return ChoiceDelta(choice.index, text, tuple(tokens), reason, stop_reason)

    def _prompt_text(self, request: EngineRequest) -> str:
        return self.tokenizer.decode(request.token_ids, skip_special_tokens=self.options.skip_special_tokens)

    def _info(self, logprobs: TokenLogprobs) -> TokenInfo:
        return TokenInfo(logprobs.token_id, self.tokenizer.token_text(logprobs.token_id), logprobs)


def as_error(failure: Failure) -> LoraplexError:
    """The exception that stands for a failure that came out of the engine."""
    match failure.code:
        case "context_length_exceeded":
            return ContextLengthExceeded(failure.message, param="messages")
        case "invalid_request" | "duplicate_request":
            return InvalidRequest(failure.message)
        case "not_mergeable" | "merge_cancelled" | "merge_too_coarse":
            return NotMergeable(failure.message, code=failure.code)
        case "insufficient_memory":
            return InsufficientMemory(failure.message)
        case "overloaded":
            return Overloaded(failure.message)
        case "adapter_load_failed" | "adapter_too_large":
            return AdapterLoadFailed(failure.message, code=failure.code)
        case "proof_failed":
            return AdapterInvalid(failure.message, param="weights", code=failure.code)
        case "proof_timeout":
            return ProofTimedOut(failure.message, retry_after=PROOF_RETRY_SECONDS)
        case "engine_stopped":
            return NotReady(failure.message)
        case _:
            return RequestFailed(failure.message, code=failure.code)

"""Comparisons: one prompt put to several models in one batch, and every text held against every one of them.

    prompt ──> target 1 … n        side by side, each as if it were asked alone                     n texts
    text i ──> target 1 … n, base  teacher-forced: the text's token ids behind the scorer's prompt  n · (n + 1) scores

A score is the natural log of the probability that the scorer gives the text's tokens, one after the other, behind its
own prompt: its own template, tokenizer and system prompt. The token that ended a text is not part of it; of a text that
a stop string ended all tokens count, those of the stop string, too.

The divergence of a target is the mean over the positions of its own text of KL(target || base) in nats, over the whole
vocabulary (`engine.kept_logits` has the formula): what it would say next, beside what the base would. Text by text the
base comes first and the engine keeps its distributions until the target was compared with them; the base on the next
text runs beside the others on this one.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field, replace
from math import fsum

from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import EngineRequest, Failure, FinishReason
from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import AdapterError, InvalidRequest, LoraplexError, NotReady, Overloaded
from loraplex.serving.generation import Generation, as_error
from loraplex.serving.generation_request import GenerationRequest
from loraplex.serving.resolution import Names
from loraplex.serving.routes import Routes

MIN_TARGETS, MAX_TARGETS = 2, 16


@dataclass(frozen=True, slots=True)
class Answer:
    """What a target said. `model`: its concrete name, None when it could not be held. `token_ids`: of the text."""

    target: str
    model: str | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: LoraplexError | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """Of one text under one scorer. `divergences`: nats, one a token; only where the scorer wrote the text itself."""

    logprob: float | None = None
    divergences: tuple[float, ...] = ()
    error: LoraplexError | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """`scorers`: the targets in the order in which they were asked, then the base if it is none of them.
    `scores[i][j]`: of text i under scorer j; None where there is no text."""

    comparison_id: str
    base: str
    answers: Sequence[Answer]
    scorers: Sequence[str]
    scores: Sequence[Sequence[Score | None]]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_scored_tokens: int  # of all that was scored, prompts included, wherever they came from


@dataclass(slots=True)
class _Scorer:
    """A model that is held for the length of the comparison."""

    model: str
    request: EngineRequest | None = None  # its prompt, as the engine takes it
    error: LoraplexError | None = None

    def scoring(self, seq_id: str, token_ids: Sequence[int], keeps: str | None, against: str | None) -> EngineRequest:
        assert self.request is not None
        prompt = self.request.token_ids
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_from=len(prompt) - 1)
        ids = (*prompt, *token_ids)
        return replace(self.request, seq_id=seq_id, token_ids=ids, params=params, keeps=keeps, against=against)


@dataclass(slots=True)
class _Tally:
    logprobs: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    failure: Failure | None = None


class Comparisons:
    """`generate` makes a request ready to run."""

    def __init__(
        self,
        names: Names,
        routes: Routes,
        engine: EngineClient,
        generate: Callable[[GenerationRequest], Awaitable[Generation]],
        base_name: str,
    ):
        self._names = names
        self._routes = routes
        self._engine = engine
        self._generate = generate
        self._base_name = base_name
        self.num_ended = 0
        self.num_scored_tokens = 0

    async def compare(self, request: GenerationRequest, targets: Sequence[str]) -> Comparison:
        """`request`, whatever model it names, put to all `targets`; of a route to its main target. Raises
        InvalidRequest, ModelNotFound, Overloaded, NotReady; what one target cannot do is its answer's `error`, unless
        none can: then the first one's is raised."""
        _check(targets)
        models = await asyncio.to_thread(self._resolve, targets)
        async with AsyncExitStack() as lifetime:
            generations: list[Generation] = []
            answers: list[Answer] = []
            scorers: list[_Scorer] = []
            for target, model in zip(targets, models, strict=True):
                try:
                    if isinstance(model, LoraplexError):
                        raise model
                    generation = await self._held(replace(request, model=model), lifetime)
                except (Overloaded, NotReady):  # of the server, not of the target
                    raise
                except LoraplexError as error:
                    answers.append(Answer(target, None if isinstance(model, LoraplexError) else model, error=error))
                    scorers.append(_Scorer(target, error=error))
                    continue
                answers.append(Answer(target, generation.model))
                scorers.append(_Scorer(generation.model, generation.requests[0]))
                generations.append(generation)
            if not generations:
                raise next(answer.error for answer in answers if answer.error is not None)
            scorers = await self._with_base(request, scorers, lifetime)
            answers = await _asked(answers, generations)
            if all(answer.error is not None for answer in answers):
                raise next(answer.error for answer in answers if answer.error is not None)
            comparison_id = secrets.token_hex(12)
            scores, num_scored = await self._scored(comparison_id, answers, scorers)
            self.num_ended += 1
            self.num_scored_tokens += num_scored
            return Comparison(
                comparison_id,
                self._base_name,
                answers,
                [scorer.model for scorer in scorers],
                scores,
                sum(one.usage.prompt_tokens for one in generations),
                sum(one.usage.completion_tokens for one in generations),
                num_scored,
            )

    def _resolve(self, targets: Sequence[str]) -> list[str | LoraplexError]:
        """The concrete names. Raises for what names nothing, and for two that name the same."""
        models: list[str | LoraplexError] = []
        seen: dict[str, str] = {}
        for target in targets:
            try:
                model = self._names.resolve(self._routes.main_target(target)).model
            except AdapterError as error:  # it exists, and cannot be served now
                models.append(error)
                continue
            if model in seen:
                raise InvalidRequest(
                    f"The targets {seen[model]!r} and {target!r} are the same model, {model!r}. Name each one once.",
                    param="targets",
                )
            seen[model] = target
            models.append(model)
        return models

    async def _held(self, request: GenerationRequest, lifetime: AsyncExitStack) -> Generation:
        """Ready to run, and held until `lifetime` ends, also when it has run."""
        generation = await self._generate(request)
        lifetime.push_async_callback(generation.lifetime.pop_all().aclose)
        return generation

    async def _with_base(
        self, request: GenerationRequest, scorers: list[_Scorer], lifetime: AsyncExitStack
    ) -> list[_Scorer]:
        if any(scorer.model == self._base_name for scorer in scorers):
            return scorers
        try:
            generation = await self._held(replace(request, model=self._base_name), lifetime)
        except (Overloaded, NotReady):
            raise
        except LoraplexError as error:  # it may have no chat template
            return [*scorers, _Scorer(self._base_name, error=error)]
        return [*scorers, _Scorer(self._base_name, generation.requests[0])]

    # -- scores -----------------------------------------------------------------------------------------------

    async def _scored(
        self, comparison_id: str, answers: Sequence[Answer], scorers: Sequence[_Scorer]
    ) -> tuple[list[list[Score | None]], int]:
        """The matrix, and how many tokens were computed for it."""
        base = next(j for j, scorer in enumerate(scorers) if scorer.model == self._base_name)
        scores: list[list[Score | None]] = [[None] * len(scorers) for _ in answers]
        num_tokens = 0
        keeps = {i: f"{comparison_id}-{i}" for i in range(len(answers))}
        try:
            for i in range(len(answers) + 1):
                cells = [(i, base)] if i < len(answers) else []
                cells += [(i - 1, j) for j in range(len(scorers)) if j != base] if i else []
                batch = {}
                for text, j in cells:
                    answer, scorer = answers[text], scorers[j]
                    if answer.error is not None:
                        continue
                    if scorer.request is None or not answer.token_ids:
                        scores[text][j] = Score(0.0) if scorer.request is not None else Score(error=scorer.error)
                        continue
                    own = keeps[text] if j == text else None
                    seq_id = f"{comparison_id}-{text}-{j}"
                    names = (keeps[text], None) if j == base else (None, own)
                    batch[text, j] = scorer.scoring(seq_id, answer.token_ids, *names)
                tallies = await self._run(list(batch.values()))
                for (text, j), request in batch.items():
                    scores[text][j] = _score(tallies[request.seq_id], is_base_itself=text == j == base)
                    num_tokens += len(request.token_ids)
                if i:
                    await self._engine.command("forget_logits", names=[keeps.pop(i - 1)])
        finally:
            if keeps:
                with suppress(NotReady):
                    await self._engine.command("forget_logits", names=list(keeps.values()))
        return scores, num_tokens

    async def _run(self, requests: Sequence[EngineRequest]) -> Mapping[str, _Tally]:
        tallies = {request.seq_id: _Tally() for request in requests}
        if not requests:
            return tallies
        async with aclosing(self._engine.submit(tuple(requests))) as outputs:
            async for output in outputs:
                tally = tallies[output.seq_id]
                tally.failure = output.failure or tally.failure
                for one in output.prompt_logprobs:
                    tally.logprobs.append(one.logprob)
                    if one.divergence is not None:
                        tally.divergences.append(one.divergence)
        return tallies


def _check(targets: Sequence[str]) -> None:
    if not MIN_TARGETS <= len(targets) <= MAX_TARGETS:
        raise InvalidRequest(
            f"A comparison has {MIN_TARGETS} to {MAX_TARGETS} targets, not {len(targets)}. Name models as in 'model'.",
            param="targets",
        )
    for index, target in enumerate(targets):
        if target in targets[:index]:
            raise InvalidRequest(f"targets names {target[:80]!r} twice. Name each one once.", param="targets")


async def _asked(answers: Sequence[Answer], generations: Sequence[Generation]) -> list[Answer]:
    """The answers with their texts. All run side by side; when this is cancelled, all end."""
    left = iter(generations)
    async with asyncio.TaskGroup() as group:
        tasks = [
            None if answer.error is not None else group.create_task(_answered(answer, next(left))) for answer in answers
        ]
    return [answer if task is None else task.result() for answer, task in zip(answers, tasks, strict=True)]


async def _answered(answer: Answer, generation: Generation) -> Answer:
    text: list[str] = []
    token_ids: list[int] = []
    reason, stopped_by = None, None
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                text.append(delta.text)
                token_ids += (token.token_id for token in delta.tokens)
                reason, stopped_by = delta.finish_reason, delta.stop_reason
    except LoraplexError as error:
        return replace(answer, error=error)
    if reason is FinishReason.STOP and not isinstance(stopped_by, str):
        del token_ids[-1:]
    return replace(answer, text="".join(text), token_ids=tuple(token_ids), finish_reason=reason)


def _score(tally: _Tally, *, is_base_itself: bool) -> Score:
    if tally.failure is not None:
        return Score(error=as_error(tally.failure))
    divergences = [0.0] * len(tally.logprobs) if is_base_itself else tally.divergences
    return Score(fsum(tally.logprobs), tuple(divergences))

"""/v1/compare: one prompt over several models in one batch, and each text scored under all of them."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex.api.errors import body_of
from loraplex.api.openai import Tenant, TheService
from loraplex.api.schemas import ChatCompletionRequest, CompletionRequest
from loraplex.api.streaming import ClientGone, unless_gone
from loraplex.errors import InvalidRequest, LoraplexError
from loraplex.serving.comparison import Answer, Comparison, Score
from loraplex.serving.generation_request import GenerationRequest

router = APIRouter(prefix="/v1")

_ELSEWHERE = {
    "model": (),
    "adapters": ([],),
    "n": (1,),
    "stream": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
}
"""Fields of the other routes that a comparison has not: name -> the values that ask for nothing."""


class CompareRequest(BaseModel):
    """`prompt` or `messages`, and the other fields of /v1/completions or /v1/chat/completions for all targets."""

    model_config = ConfigDict(extra="allow")

    targets: Annotated[list[Annotated[str, Field(max_length=256)]], Field(max_length=256, fail_fast=True)]
    prompt: Any = None
    messages: Any = None

    def as_asked(self) -> CompletionRequest | ChatCompletionRequest:
        """As one target is asked. Raises InvalidRequest, RequestValidationError."""
        extra = self.model_extra or {}
        for name, harmless in _ELSEWHERE.items():
            if extra.get(name) is not None and extra[name] not in harmless:
                raise InvalidRequest(
                    f"A comparison has no {name!r}: it names its models in 'targets' and answers each with one whole "
                    "text and its scores. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Send either a prompt or messages, one of the two.", param="prompt")
        kind = CompletionRequest if self.messages is None else ChatCompletionRequest
        asked = {"prompt": self.prompt} if self.messages is None else {"messages": self.messages}
        fields = {name: value for name, value in extra.items() if name not in _ELSEWHERE}
        try:
            return kind.model_validate({**fields, **asked, "model": "any"})
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from error


@router.post("/compare")
async def compare(body: CompareRequest, request: Request, service: TheService, tenant: Tenant) -> Response:
    asked = body.as_asked()
    comparing = service.comparisons.compare(_with_tokens(asked.to_service(tenant)), body.targets)
    try:
        found = await unless_gone(request, comparing)
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    headers = {"x-ignored-params": ",".join(asked.ignored_params)} if asked.ignored_params else {}
    return JSONResponse(describe_comparison(found), headers=headers)


def _with_tokens(request: GenerationRequest) -> GenerationRequest:
    """With the ids of the answer's tokens."""
    if request.prompts is not None and len(request.prompts) != 1:
        raise InvalidRequest("A comparison has one prompt: a text, or a list of token ids.", param="prompt")
    return replace(request, params=replace(request.params, logprobs=0))


def describe_comparison(found: Comparison) -> dict[str, Any]:
    """`logprobs.sum[i][j]`: of text i under scorer j; null where there is none."""
    errors = [
        {"text": i, "scorer": found.scorers[j], "error": _error(score.error)}
        for i, row in enumerate(found.scores)
        for j, score in enumerate(row)
        if score is not None and score.error is not None
    ]
    return {
        "id": f"cmp-{found.comparison_id}",
        "object": "comparison",
        "base": found.base,
        "answers": [_answer(found, i, answer) for i, answer in enumerate(found.answers)],
        "logprobs": {
            "scorers": list(found.scorers),
            "sum": [[_sum(score) for score in row] for row in found.scores],
            "per_token": [
                [_per_token(score, len(answer.token_ids)) for score in row]
                for answer, row in zip(found.answers, found.scores, strict=True)
            ],
            "errors": errors,
        },
        "usage": {
            "prompt_tokens": found.num_prompt_tokens,
            "completion_tokens": found.num_completion_tokens,
            "scored_tokens": found.num_scored_tokens,
        },
    }


def _answer(found: Comparison, index: int, answer: Answer) -> dict[str, Any]:
    own = found.scores[index][index]
    return {
        "target": answer.target,
        "model": answer.model,
        "text": None if answer.error is not None else answer.text,
        "tokens": len(answer.token_ids),
        "finish_reason": None if answer.finish_reason is None else str(answer.finish_reason),
        "divergence": None if own is None else _divergence(own, len(answer.token_ids)),
        "error": _error(answer.error),
    }


def _divergence(score: Score, num_tokens: int) -> dict[str, Any] | None:
    """KL(target || base) in nats over the positions of its own text; None unless every position was compared."""
    nats = score.divergences
    if not nats or len(nats) != num_tokens:
        return None
    return {"mean": sum(nats) / len(nats), "max": max(nats), "positions": len(nats)}


def _sum(score: Score | None) -> float | None:
    return None if score is None else score.logprob


def _per_token(score: Score | None, num_tokens: int) -> float | None:
    return None if score is None or score.logprob is None or not num_tokens else score.logprob / num_tokens


def _error(error: LoraplexError | None) -> dict[str, Any] | None:
    return None if error is None else body_of(error)["error"]

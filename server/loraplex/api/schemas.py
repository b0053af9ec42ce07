"""The requests of OpenAI's dialect, with vLLM's extra fields, and how they become the service's request.

Unknown fields are accepted, because clients send many, and named in the `x-ignored-params` header. Fields we know and
do not implement are refused when they ask for something.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from loraplex.engine.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, SamplingParams
from loraplex.errors import InvalidRequest
from loraplex.model.tokenizer import require_unicode
from loraplex.routing.composition import MAX_PARTS, MAX_SCALE, scaled
from loraplex.serving.generation import OutputOptions
from loraplex.serving.generation_request import GenerationRequest
from loraplex.text.stopping import MAX_STOP_CHARS, MAX_STOPS

MAX_MESSAGES = 2048
MAX_PROMPT_TOKENS = 1 << 20
MAX_CONTENT_PARTS = 1024
SEED = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TOKEN = Annotated[int, Field(ge=0, lt=2**31)]
# Lists stop at their first fault: a body of a million faults would become a million error objects.
TOKENS = Annotated[list[TOKEN], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]
IGNORED = {"request_id", "priority", "store", "service_tier", "parallel_tool_calls"}
"""Known, harmless and without meaning here."""
UNSUPPORTED = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens", "logits_processors"), ()),
    **dict.fromkeys(("bad_words", "allowed_token_ids"), ([],)),
    **dict.fromkeys(("use_beam_search", "return_tokens_as_token_ids"), (False,)),
    "response_format": ({"type": "text"},),
}
"""Known, not implemented: name -> the values that ask for nothing."""


DEFAULTED = frozenset(
    ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "stop")
)
"""Where a request is silent about these (null counts as silence), others decide: see GenerationRequest.silent."""
_FIELD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class StreamOptions(BaseModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AdapterPart(BaseModel):
    """An adapter that is added to `model`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=128)]
    scale: Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE)] = 1.0


class _Sampling(BaseModel):
    """What completions and chat have in common."""

    model_config = ConfigDict(extra="allow")

    model: Annotated[str, Field(max_length=256)]
    adapters: Annotated[list[AdapterPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: SEED | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    stop_token_ids: Annotated[list[TOKEN], Field(max_length=64, fail_fast=True)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: Any = None  # this and the next are for routes alone
    metadata: Any = None

    @field_validator("stop")
    @classmethod
    def _no_half_characters(cls, value: Any) -> Any:
        for text in [value] if isinstance(value, str) else value or ():
            require_unicode(text)
        return value

    @property
    def composed(self) -> str:
        """`model` and `adapters` as one: the base as `model` adds nothing."""
        return "+".join((self.model, *(scaled(part.name, part.scale) for part in self.adapters or ())))

    @property
    def ignored_params(self) -> list[str]:
        """Unknown fields that carry a value, by name, cut to something a header can hold ("..." for the rest)."""
        extra = self.model_extra or {}
        known = IGNORED | UNSUPPORTED.keys() | self.unsupported.keys()
        names = sorted(name for name, value in extra.items() if value is not None and name not in known)
        shown = [name for name in names if _FIELD_NAME.fullmatch(name)][:32]
        return shown if len(shown) == len(names) else [*shown, "..."]

    @property
    def unsupported(self) -> dict[str, tuple]:
        """What UNSUPPORTED is for this route alone."""
        return {}

    def refuse_unsupported(self) -> None:
        """Raise for a field with a meaning that is not implemented."""
        extra = self.model_extra or {}
        for name, harmless in {**UNSUPPORTED, **self.unsupported}.items():
            value = extra.get(name)
            if value is not None and value not in harmless:
                raise InvalidRequest(
                    f"The parameter {name!r} is not implemented by this server; leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )

    def sampling_params(self, *, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        given = {
            name: value
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "presence_penalty",
                "frequency_penalty",
                "repetition_penalty",
            )
            if (value := getattr(self, name)) is not None
        }
        return SamplingParams(
            max_tokens=self.min_tokens or 16,  # the service sets the real one
            min_tokens=self.min_tokens or 0,
            top_k=0 if self.top_k in (None, -1) else self.top_k,  # vLLM's -1 means all, too
            logit_bias=self._logit_bias(),
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **given,
        )

    @property
    def silent(self) -> frozenset[str]:
        return frozenset(name for name in DEFAULTED if getattr(self, name) is None)

    def output_options(self, *, echo: bool = False) -> OutputOptions:
        return OutputOptions(
            stop=self._stops(),
            include_stop=bool(self.include_stop_str_in_output),
            skip_special_tokens=self.skip_special_tokens is not False,
            echo=echo,
            min_tokens=self.min_tokens or 0,
        )

    def _stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise InvalidRequest(
                f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters.", param="stop"
            )
        return tuple(stops)

    def _logit_bias(self) -> tuple[tuple[int, float], ...]:
        try:
            return tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items())
        except (ValueError, TypeError, OverflowError):
            raise InvalidRequest(
                'logit_bias maps token ids to numbers from -100 to 100, as {"42": -5}.', param="logit_bias"
            ) from None


class CompletionRequest(_Sampling):
    prompt: str | TOKENS | Annotated[list[str], Field(fail_fast=True)] | Annotated[list[TOKENS], Field(fail_fast=True)]
    add_special_tokens: bool | None = None
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def unsupported(self) -> dict[str, tuple]:
        return {"suffix": ("",), "best_of": (1, self.n)}

    def to_service(self, tenant: bytes) -> GenerationRequest:
        self.refuse_unsupported()
        check_logprobs(self.logprobs, "logprobs")
        prompts = [self.prompt] if isinstance(self.prompt, str) or not self.prompt else self.prompt
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        echo = bool(self.echo)
        return GenerationRequest(
            model=self.composed,
            prompts=prompts,  # type: ignore[arg-type]
            add_special_tokens=self.add_special_tokens is not False,
            max_tokens=self.max_tokens,
            usual_max_tokens=16,
            n=1 if self.n is None else self.n,
            seed=self.seed,
            silent=self.silent,
            params=self.sampling_params(logprobs=self.logprobs, prompt_logprobs=self.logprobs if echo else None),
            options=self.output_options(echo=echo),
            salt=tenant + (self.cache_salt or "").encode(),
        )


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(max_length=64)]
    content: str | Annotated[list[TextPart], Field(fail_fast=True, max_length=MAX_CONTENT_PARTS)] | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        """Name what is not text, instead of listing every way in which it is not a TextPart."""
        if isinstance(content, list):
            for part in content[:MAX_CONTENT_PARTS]:
                kind = part.get("type") if isinstance(part, dict) else None
                if isinstance(kind, str) and kind != "text":
                    raise ValueError(f"this server takes text only, not a part of type {kind[:40]!r}")
        return content

    def to_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        return {**extra, "role": self.role, "content": "" if content is None else content}


class ChatCompletionRequest(_Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def unsupported(self) -> dict[str, tuple]:
        return {
            "tools": ([],),
            "functions": ([],),
            "tool_choice": ("none", "auto"),
            "function_call": ("none", "auto"),
            "audio": (),
            "prediction": (),
            "web_search_options": (),
            "modalities": (["text"],),
            "chat_template": (),
            "chat_template_kwargs": ({},),
            "documents": ([],),
            "echo": (False,),
        }

    def to_service(self, tenant: bytes) -> GenerationRequest:
        self.refuse_unsupported()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", param="top_logprobs")
        check_logprobs(self.top_logprobs, "top_logprobs")
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        continue_final = bool(self.continue_final_message)
        if continue_final and self.add_generation_prompt:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other.", param="continue_final_message"
            )
        return GenerationRequest(
            model=self.composed,
            messages=[message.to_template() for message in self.messages],
            add_generation_prompt=self.add_generation_prompt is not False and not continue_final,
            continue_final_message=continue_final,
            max_tokens=max_tokens,
            n=1 if self.n is None else self.n,
            seed=self.seed,
            silent=self.silent,
            params=self.sampling_params(logprobs=(self.top_logprobs or 0) if self.logprobs else None),
            options=self.output_options(),
            salt=tenant + (self.cache_salt or "").encode(),
        )


def check_logprobs(count: int | None, param: str) -> None:
    if count is not None and not 0 <= count <= MAX_LOGPROBS:
        raise InvalidRequest(f"{param} must lie between 0 and {MAX_LOGPROBS}, not {count}.", param=param)


class TokenizeRequest(BaseModel):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    model: str | None = None
    tokens: TOKENS

"""SamplingParams: how one sequence turns logits into tokens. Plain, validated, picklable; no torch."""

import math
from dataclasses import dataclass

from loraplex.errors import InvalidRequest

INT64_MAX = 2**63 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The meaning and the order of application follow OpenAI and vLLM:

    logit_bias, min_tokens (no end token before it), repetition penalty (over prompt and output; Keskar et al. 2019),
    presence and frequency penalty (over the output), temperature (0: greedy), min_p, top_k (0: all), top_p.

    `logprobs`: how many alternatives to report with each output token (0: only the chosen one; None: nothing).
    `prompt_logprobs` the same for the prompt, of the tokens after position `prompt_logprobs_from` on. `max_tokens` 0
    evaluates the prompt and stops. Raises InvalidRequest naming the parameter.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 0

    def __post_init__(self) -> None:
        _require_range("max_tokens", self.max_tokens, 0, INT64_MAX)
        _require_range("min_tokens", self.min_tokens, 0, max(0, self.max_tokens))
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_range("top_k", self.top_k, 0, INT64_MAX)
        _require_range("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be above 0; for the most likely token use temperature 0.", param="top_p")
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _require_range("seed", self.seed, -INT64_MAX - 1, INT64_MAX)
        if self.logprobs is not None:
            _require_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _require_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _require_range("prompt_logprobs_from", self.prompt_logprobs_from, 0, INT64_MAX)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias may name at most {MAX_LOGIT_BIAS} tokens.", param="logit_bias")
        for _, bias in self.logit_bias:
            _require_range("logit_bias", bias, -100.0, 100.0)

    @property
    def is_greedy(self) -> bool:
        """Below 1e-5 a division by the temperature could leave the range of float32, and no draw could differ."""
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _require_range(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{name} must lie between {low:g} and {high:g}, not {value!r}.", param=name)

"""What crosses the border between the engine and the rest: picklable values, no tensors, no closures.

In:   EngineRequest, Abort, Command.     Out: StepOutput (one item a step, not a token), CommandResult.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loraplex.engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a composition. `nbytes`: what it occupies in the RAM tier (known from its files' shapes)."""

    digest: str
    nbytes: int
    scale: float = 1.0


Composition = tuple[AdapterUse, ...]
"""The adapters of one request, applied in this order; () is the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One sequence to generate. `salt` keeps tenants' KV blocks apart; `choice` is the index among the n of a
    request and a part of the sampling key. `keeps` and `against` are names in `KeptLogits`: where the distributions of
    the reported prompt positions stay (until the command "forget_logits"), and what those are compared with."""

    seq_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    composition: Composition = ()
    salt: bytes = b""
    choice: int = 0
    keeps: str | None = None
    against: str | None = None


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logs from the raw distribution, before temperature and penalties. `top` holds the best alternatives,
    most likely first; the chosen token's float there is the very same as `logprob`. `divergence`: of the distribution
    from the one it was to be compared with, in nats; None: there was none."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    divergence: float | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence ended with an error: a stable code and a sentence for its client."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """What one step gave one sequence. `stop_reason` is the stop token's id when it was not an EOS."""

    seq_id: str
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    failure: Failure | None = None
    num_cached_tokens: int = 0
    is_merged: bool = False  # the step ran on the adapter's merged weights


@dataclass(frozen=True, slots=True)
class Abort:
    seq_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Command:
    """A named verb run between steps; `Engine.run_command` knows the names."""

    command_id: int
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CommandResult:
    command_id: int
    value: Any = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """`answers`: of commands whose work ended with this step."""

    step: int
    outputs: tuple[SequenceOutput, ...]
    answers: tuple[CommandResult, ...] = ()

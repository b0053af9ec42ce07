"""SamplingDefaults: what holds where a request is silent. An adapter's profile has them, and the base's
generation_config.json."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import InvalidRequest, StartupError

GENERATION_CONFIG = "generation_config.json"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Read elsewhere (the end tokens by the loader) or without a meaning for a server.
_OTHERWISE = ("bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config", "use_cache")


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """`sampling`: values by the names of SamplingParams. `max_tokens` None: says nothing of it."""

    sampling: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None

    @classmethod
    def of_generation_config(cls, folder: Path) -> tuple["SamplingDefaults", tuple[str, ...]]:
        """What the base's generation_config.json says, and the fields of it that are not used here.

        The fields and their meaning are those of vLLM's --generation-config auto; as there, `do_sample` is not
        among them: whoever wants greedy decoding says temperature 0. Raises StartupError.
        """
        try:
            document = json.loads((folder / GENERATION_CONFIG).read_text(encoding="utf-8"))
            if not isinstance(document, dict):
                raise ValueError("it is not an object")
        except FileNotFoundError:
            return cls(), ()
        except (OSError, ValueError, RecursionError) as error:
            raise StartupError(
                f"{folder / GENERATION_CONFIG} cannot be read: {error}. Correct it, or start with "
                "--generation-config none."
            ) from error
        said = {name: value for name, value in document.items() if value is not None}
        sampling = {name: said[name] for name in _SAMPLING if name in said}
        if sampling.get("top_k") == -1:
            sampling["top_k"] = 0
        max_tokens = said.get("max_new_tokens")
        problem = problem_of(sampling, max_tokens)
        if problem is not None:
            raise StartupError(
                f"{folder / GENERATION_CONFIG} asks for what cannot be: {problem} Correct it, or start with "
                "--generation-config none."
            )
        known = {*_SAMPLING, *_OTHERWISE, "max_new_tokens"}
        idle = dict.fromkeys(said, False) | {"do_sample": True}  # what asks for nothing that is not done anyway
        unused = [name for name, value in said.items() if name not in known and value is not idle[name]]
        return cls(sampling, max_tokens), tuple(sorted(unused))


def problem_of(sampling: Mapping[str, Any], max_tokens: Any) -> str | None:
    """Why these cannot be defaults; None if they can. The ranges are those of a request."""
    for name, value in {**sampling, "max_tokens": max_tokens}.items():
        whole = name in ("top_k", "max_tokens")
        if isinstance(value, bool) or not isinstance(value, int | (int if whole else float) | None):
            return f"{name} must be a{' whole' if whole else ''} number."
    if max_tokens is not None and max_tokens < 1:
        return f"max_tokens must be at least 1, not {max_tokens}."
    try:
        SamplingParams(**sampling)
    except InvalidRequest as error:
        return error.message
    return None


def with_defaults(
    params: SamplingParams, silent: Iterable[str], defaults: Iterable[SamplingDefaults]
) -> SamplingParams:
    """`params` with the fields named in `silent` taken from the first of `defaults` that has them."""
    chosen: dict[str, Any] = {}
    for name in silent:
        for one in defaults:
            if name in one.sampling:
                chosen[name] = one.sampling[name]
                break
    return replace(params, **chosen) if chosen else params

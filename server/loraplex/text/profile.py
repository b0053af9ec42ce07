"""ServingProfile: how an adapter wants to be served, in its own words: serving_profile.json."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraplex.errors import AdapterInvalid
from loraplex.lora.files import PROFILE
from loraplex.lora.text import shown
from loraplex.text.sampling_defaults import SamplingDefaults, problem_of
from loraplex.text.stopping import MAX_STOP_CHARS, MAX_STOPS

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ServingProfile(BaseModel):
    """A closed list of fields; each may be left out. They hold where a request is silent.

    system_prompt   the first message of a chat that has no system or developer message of its own
    stop            stop strings of a request that names none
    parent          the adapter it stands on ("sql", "sql@3"), if the push names none
    the others      as in a request, with its ranges
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    system_prompt: Annotated[str, Field(min_length=1, max_length=32 << 10)] | None = None
    stop: Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    parent: Annotated[str, Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ServingProfile":
        problem = problem_of(self.defaults.sampling, self.max_tokens)
        if problem is not None:
            raise ValueError(problem)
        for text in (self.system_prompt or "", *(self.stop or ())):
            text.encode()  # half a surrogate pair is a ValueError
        return self

    @classmethod
    def from_bytes(cls, data: bytes) -> "ServingProfile":
        """Read the bytes of serving_profile.json. Raises AdapterInvalid naming the field."""
        try:
            return cls.model_validate(json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique))
        except ValidationError as error:
            why = "; ".join(_why(problem) for problem in error.errors()[:5])
        except (ValueError, RecursionError) as error:
            why = f"it is not valid JSON: {shown(str(error), 160)}"
        raise AdapterInvalid(
            f"{PROFILE.name} cannot be used: {why} Its fields are {', '.join(cls.model_fields)}.", param=PROFILE.part
        )

    @property
    def defaults(self) -> SamplingDefaults:
        names = self.model_dump(exclude_none=True, exclude={"system_prompt", "stop", "max_tokens", "parent"})
        if names.get("top_k") == -1:  # vLLM's way to say all
            names["top_k"] = 0
        return SamplingDefaults(names, self.max_tokens)

    def shown(self) -> dict[str, Any]:
        """The fields it sets."""
        return self.model_dump(exclude_none=True)


def _why(problem: Any) -> str:
    where = ".".join(str(part)[:64] for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{shown(where)} is no field of it."
    message = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"{where}: {message}." if where else f"{message}."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found

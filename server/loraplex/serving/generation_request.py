"""GenerationRequest: one request as the service understands it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from loraplex.engine.sampling_params import SamplingParams
from loraplex.routing.router import Asked
from loraplex.serving.generation import OutputOptions
from loraplex.text.profile import ServingProfile
from loraplex.text.sampling_defaults import SamplingDefaults, with_defaults

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asks for, as plain values.

    silent          names of `params` that the request does not give: the adapter's profile, then the base's generation
                    config decide. "stop" is one of them: then the profile's stop strings hold
    asked           what decides where a route sends it
    max_tokens      None: the profile's, the generation config's, `usual_max_tokens`, or as many as fit
    """

    model: str
    prompts: Sequence[Prompt] | None = None
    messages: Sequence[dict] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = True
    max_tokens: int | None = None
    usual_max_tokens: int | None = None
    n: int = 1
    params: SamplingParams = SamplingParams()
    silent: frozenset[str] = frozenset()
    seed: int | None = None
    options: OutputOptions = OutputOptions()
    salt: bytes = b""
    asked: Asked = Asked()

    def with_defaults(
        self, profile: ServingProfile, base: SamplingDefaults, ends: frozenset[int]
    ) -> "GenerationRequest":
        """This request with what it is silent about: the adapter's profile goes before the base's generation config.
        `ends`: further end tokens."""
        defaults = (profile.defaults, base)
        params = with_defaults(self.params, self.silent, defaults)
        if not params.ignore_eos:
            params = replace(params, stop_token_ids=params.stop_token_ids | ends)
        options = self.options
        if "stop" in self.silent and profile.stop:
            options = replace(options, stop=tuple(profile.stop))
        usual = next((one.max_tokens for one in defaults if one.max_tokens is not None), self.usual_max_tokens)
        return replace(self, params=params, options=options, usual_max_tokens=usual)

"""A serving profile and the base's generation config: closed lists, named refusals, who goes before whom."""

import json
from pathlib import Path

import pytest

from loraplex.engine.sampling_params import SamplingParams
from loraplex.errors import AdapterInvalid, StartupError
from loraplex.serving.generation import OutputOptions
from loraplex.serving.generation_request import GenerationRequest
from loraplex.text.profile import ServingProfile
from loraplex.text.sampling_defaults import SamplingDefaults

FULL = {
    "system_prompt": "You answer in rhyme.",
    "stop": ["END", "\n\n"],
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "presence_penalty": 1,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "max_tokens": 99,
    "parent": "sql@3",
}


def test_every_field_is_read_and_shown():
    assert set(FULL) == set(ServingProfile.model_fields)
    profile = ServingProfile.from_bytes(json.dumps(FULL).encode())
    assert profile.shown() == FULL
    assert profile.defaults.max_tokens == 99
    assert set(profile.defaults.sampling) == set(FULL) - {"system_prompt", "stop", "max_tokens", "parent"}
    assert ServingProfile.from_bytes(b"{}").shown() == {}
    assert ServingProfile.from_bytes(b'{"top_k": -1}').defaults.sampling == {"top_k": 0}
    assert ServingProfile.from_bytes(b'\xef\xbb\xbf{"top_k": null}').shown() == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"tempreture": 1}', "'tempreture' is no field"),
        ('{"temperature": 3000}', "temperature must lie between 0 and 100"),
        ('{"temperature": true}', "temperature: Input should be a valid number"),
        ('{"temperature": "0"}', "temperature"),
        ('{"temperature": NaN}', "temperature must lie"),
        ('{"temperature": 1, "temperature": 0}', "'temperature' is there twice"),
        ('{"top_p": 0}', "top_p must be above 0"),
        ('{"top_k": 1.5}', "top_k"),
        ('{"min_p": 2}', "min_p"),
        ('{"presence_penalty": 3}', "presence_penalty"),
        ('{"repetition_penalty": 0}', "repetition_penalty"),
        ('{"max_tokens": 0}', "max_tokens must be at least 1"),
        ('{"stop": "END"}', "stop: Input should be a valid list"),
        ('{"stop": [""]}', "stop.0"),
        ('{"stop": ["a", "b", "c", "d", "e"]}', "stop"),
        ('{"system_prompt": ""}', "system_prompt"),
        ('{"system_prompt": "\\ud800"}', "system_prompt"),
        ('{"seed": 1}', "'seed' is no field"),
        ("[]", "dictionary"),
        ("{", "not valid JSON"),
        ("[" * 50_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
    ],
)
def test_what_cannot_be_used_is_named(text: str, match: str):
    with pytest.raises(AdapterInvalid, match=match) as error:
        ServingProfile.from_bytes(text.encode("latin-1"))
    assert error.value.param == "profile"
    assert "Its fields are system_prompt, stop" in error.value.message
    assert len(error.value.message) < 600


def write(folder: Path, **fields) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_a_generation_config_gives_what_vllm_takes_of_it(tmp_path: Path):
    assert SamplingDefaults.of_generation_config(tmp_path) == (SamplingDefaults(), ())
    write(
        tmp_path, do_sample=False, temperature=0.6, top_p=0.95, top_k=20, min_p=None, repetition_penalty=1.05,
        max_new_tokens=7, eos_token_id=[1, 2], pad_token_id=0, num_beams=4, transformers_version="4.0", use_cache=True,
    )  # fmt: skip
    defaults, unused = SamplingDefaults.of_generation_config(tmp_path)
    assert defaults.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    assert defaults.max_tokens == 7
    assert unused == ("do_sample", "num_beams")
    write(tmp_path, do_sample=True, top_k=-1)
    # sampling is what is done anyway
    assert SamplingDefaults.of_generation_config(tmp_path) == (SamplingDefaults({"top_k": 0}), ())


@pytest.mark.parametrize(
    "fields", [{"temperature": -1}, {"top_p": "much"}, {"top_k": 0.5}, {"max_new_tokens": 0}, {"max_new_tokens": True}]
)
def test_a_generation_config_that_cannot_be_is_refused_at_start(tmp_path: Path, fields: dict):
    with pytest.raises(StartupError, match="--generation-config none"):
        SamplingDefaults.of_generation_config(write(tmp_path, **fields))
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(StartupError, match="not an object"):
        SamplingDefaults.of_generation_config(tmp_path)


NAMES = frozenset({"temperature", "top_p", "top_k", "stop"})


@pytest.mark.parametrize(
    ("request_", "profile", "config", "expected"),
    [
        (None, None, None, 1.0),
        (None, None, 0.3, 0.3),
        (None, 0.2, None, 0.2),
        (None, 0.2, 0.3, 0.2),
        (0.1, 0.2, 0.3, 0.1),
        (1.0, 0.2, 0.3, 1.0),  # OpenAI's default, said aloud
        (0.0, 0.2, 0.3, 0.0),
        (None, 0.0, 0.3, 0.0),
    ],
)
def test_request_before_profile_before_generation_config(request_, profile, config, expected):
    asked = GenerationRequest(
        model="m",
        params=SamplingParams() if request_ is None else SamplingParams(temperature=request_),
        silent=NAMES if request_ is None else NAMES - {"temperature"},
    )
    base = SamplingDefaults({} if config is None else {"temperature": config})
    complete = asked.with_defaults(ServingProfile(temperature=profile), base, frozenset())
    assert complete.params.temperature == expected


@pytest.mark.parametrize(
    ("profile", "config", "usual", "expected"),
    [(None, None, None, None), (None, None, 16, 16), (None, 7, 16, 7), (5, 7, 16, 5), (5, None, None, 5)],
)
def test_max_tokens(profile, config, usual, expected):
    asked = GenerationRequest(model="m", usual_max_tokens=usual)
    complete = asked.with_defaults(ServingProfile(max_tokens=profile), SamplingDefaults({}, config), frozenset())
    assert (complete.max_tokens, complete.usual_max_tokens) == (None, expected)


def test_stop_strings_and_end_tokens():
    profile, base = ServingProfile(stop=["END"]), SamplingDefaults()
    silent = GenerationRequest(model="m", silent=NAMES)
    complete = silent.with_defaults(profile, base, frozenset({9}))
    assert (complete.options.stop, complete.params.stop_token_ids) == (("END",), {9})
    said = GenerationRequest(model="m", options=OutputOptions(stop=("X",)), params=SamplingParams(ignore_eos=True))
    complete = said.with_defaults(profile, base, frozenset({9}))
    assert (complete.options.stop, complete.params.stop_token_ids) == (("X",), frozenset())
    none = GenerationRequest(model="m", options=OutputOptions(stop=()), silent=NAMES - {"stop"})
    assert none.with_defaults(profile, base, frozenset()).options.stop == ()


def test_who_gives_all_parameters_gets_them():
    """Python callers that say nothing of silence are taken at their word."""
    asked = GenerationRequest(model="m", params=SamplingParams())
    assert asked.with_defaults(ServingProfile(temperature=0.1), SamplingDefaults({"top_k": 3}), frozenset()) == asked

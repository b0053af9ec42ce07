"""What a config alone tells: every refusal gives its reason and what would serve instead.

`test_architectures.py` goes through the architectures; here are the refusals that any of them can meet.
"""

import pytest
from transformers import AutoConfig

import tiny
from loraplex.errors import StartupError, UnsupportedModel
from loraplex.model.support import check_config, rope_types


def config(model_type: str = "llama", **values):
    made = AutoConfig.for_model(model_type, **tiny.CONFIGS[model_type])
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("model_type", list(tiny.CONFIGS))
def test_the_first_five_are_served(model_type: str):
    check_config(config(model_type))


@pytest.mark.parametrize(
    ("values", "reason", "instead"),
    [
        (
            {"auto_map": {"AutoModel": "mine.Model"}},
            "never runs a model's code",
            "serve a checkpoint of an architecture",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised", "Serve the unquantised one"),
        ({"is_encoder_decoder": True}, "no decoder-only model", "Serve a decoder"),
        ({"add_cross_attention": True}, "cross-attention", "Serve a decoder"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention", "Serve a decoder"),
        ({"rope_parameters": {"rope_type": "mine", "rope_theta": 1.0}}, "'mine' RoPE", "Known are default"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_refusal_names_the_reason_and_what_to_do(values: dict, reason: str, instead: str):
    with pytest.raises(UnsupportedModel) as caught:
        check_config(config(**values))
    assert reason in caught.value.message
    assert instead in caught.value.message
    assert isinstance(caught.value, StartupError)
    assert caught.value.code == "unsupported_model"


def test_code_is_refused_before_anything_else_is_looked_at():
    with pytest.raises(UnsupportedModel, match="auto_map"):
        check_config(config(auto_map={"AutoConfig": "mine.Config"}, quantization_config={}, is_encoder_decoder=True))


def test_the_kinds_of_rope_a_config_names():
    assert rope_types(config("gpt2")) == []
    assert rope_types(config()) == ["default"]
    by_layer = {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_theta": 1e4}}
    assert rope_types(config(rope_parameters=by_layer)) == ["linear", "default"]

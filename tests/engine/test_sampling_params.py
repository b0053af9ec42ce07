"""Every parameter is checked, and the error names it."""

import math
import pickle

import pytest

from loraplex.engine.sampling_params import MAX_LOGIT_BIAS, SamplingParams
from loraplex.errors import InvalidRequest

REFUSED = [
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("min_tokens", 17),  # more than max_tokens
    ("temperature", -0.1),
    ("temperature", 101.0),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", 21),
    ("logit_bias", ((1, 101.0),)),
    ("logit_bias", ((1, math.nan),)),
    ("logit_bias", tuple((i, 1.0) for i in range(MAX_LOGIT_BIAS + 1))),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_refusal_names_the_parameter(name: str, value):
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"max_tokens": 0},
        {"max_tokens": 5, "min_tokens": 5},
        {"temperature": 100.0, "top_p": 1e-9, "min_p": 1.0, "top_k": 2**62},
        {"seed": -(2**63)},
        {"logprobs": 0, "prompt_logprobs": 20},
        {"logit_bias": ((3, -100.0), (4, 100.0))},
    ],
    ids=str,
)
def test_the_edges_are_allowed_and_picklable(values: dict):
    params = SamplingParams(**values)
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(("temperature", "is_greedy"), [(0.0, True), (1e-30, True), (1e-6, True), (1e-4, False)])
def test_greedy(temperature: float, is_greedy: bool):
    assert SamplingParams(temperature=temperature).is_greedy is is_greedy


def test_has_penalties():
    assert not SamplingParams().has_penalties
    for name, value in (("repetition_penalty", 1.1), ("presence_penalty", -0.1), ("frequency_penalty", 0.1)):
        assert SamplingParams(**{name: value}).has_penalties

"""Compositions: a request that names a sum of adapters, each with a scale."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2
import pytest
import torch
from live import assert_error
from peft import PeftModel
from transformers import AutoModelForCausalLM

PROMPT = "the quick brown"


def complete(client: httpx2.Client, **body) -> dict:
    body = {"model": "base", "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **body}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(client: httpx2.Client, **body) -> str:
    return complete(client, **body)["choices"][0]["text"]


def test_a_sum_is_pefts_concatenation(client, base_folder: Path, adapter_folders: dict[str, Path], tokenizer):
    """The logprobs of every prompt token, beside `add_weighted_adapter(combination_type="cat")`."""
    ids = tokenizer.encode("pack my box with five dozen liquor jugs", add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter_folders["red"], adapter_name="red")
    model.load_adapter(adapter_folders["blue"], adapter_name="blue")
    positive = {"red": 0.7, "blue": 1.25}
    model.add_weighted_adapter(list(positive), list(positive.values()), "sum", combination_type="cat")
    model.set_adapter("sum")
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0}
    reply = complete(client, model="+".join(f"{name}:{scale}" for name, scale in positive.items()), **body)
    seen = reply["choices"][0]["logprobs"]["token_logprobs"][1:]
    wanted = [expected[at, token].item() for at, token in enumerate(ids[1:])]
    assert seen == pytest.approx(wanted, abs=1e-4)
    alone = complete(client, model="red", **body)["choices"][0]["logprobs"]["token_logprobs"][1:]
    assert alone != pytest.approx(wanted, abs=1e-3)


def test_adapters_that_cannot_be_summed_or_found(client):
    body = {"model": "base", "prompt": "a", "adapters": [{"name": "nobody"}]}
    assert_error(client.post("/v1/completions", json=body), 404, "model_not_found", "nobody")
    for part in ({"name": "red", "scale": 101}, {"name": "red", "weight": 1}, {"scale": 1}):
        assert client.post("/v1/completions", json={**body, "adapters": [part]}).status_code == 400
    many = "+".join(f"red@{number}" for number in range(1, 7))
    assert client.post("/v1/completions", json={"model": many, "prompt": "a"}).status_code == 404


@pytest.mark.parametrize(
    "model", ["red=0.5,blue=0.5", "base:red", "red:1e3", "red:101", "red:nan", "+".join(["red"] * 17)]
)
def test_what_is_no_composition_is_refused(client, model):
    reply = client.post("/v1/completions", json={"model": model, "prompt": "a"})
    assert_error(reply, 400, "invalid_composition", "sql:0.7+style@2:0.3", param="model")


@pytest.mark.parametrize("model", ["red+", "+red", ":0.5", "red::1", "red@x:1"])
def test_a_composition_without_names_is_refused(client, model):
    assert client.post("/v1/completions", json={"model": model, "prompt": "a"}).status_code == 400


def test_a_sum_has_one_order_and_one_cache(client):
    """The concrete sum is in the reply; how it was written does not matter, nor to the prefix cache."""
    prompt = [7 + number % 90 for number in range(40)]
    ways = [
        {"model": "red:0.7+blue:0.3"},
        {"model": "blue:0.3+red@1:0.7"},
        {"model": "red:0.4+blue:0.3+red:0.3"},
        {"model": "base", "adapters": [{"name": "blue", "scale": 0.3}, {"name": "red", "scale": 0.7}]},
        {"model": "red:0.7+blue:0.3+base"},
    ]
    replies = [complete(client, **way, prompt=prompt, max_tokens=6) for way in ways]
    assert {reply["model"] for reply in replies} <= {"red@1:0.7+blue@1:0.3", "blue@1:0.3+red@1:0.7"}
    assert len({reply["model"] for reply in replies}) == 1
    assert len({reply["choices"][0]["text"] for reply in replies}) == 1
    cached = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
    assert cached[0] == 0
    assert len(set(cached[1:])) == 1
    assert cached[1] >= 32
    other = complete(client, model="red:0.3+blue:0.7", prompt=prompt, max_tokens=6)
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_scale_nothing_is_the_base_and_scale_one_the_adapter(client):
    for model, same in (("red:0", "base"), ("red:0.5+red:-0.5", "base"), ("red:0+blue", "blue"), ("red:1", "red")):
        reply = complete(client, model=model, prompt=PROMPT, max_tokens=8)
        expected = complete(client, model=same, prompt=PROMPT, max_tokens=8)
        assert (reply["model"], reply["choices"][0]["text"]) == (expected["model"], expected["choices"][0]["text"])


def test_sums_and_their_parts_in_one_batch(client):
    models = ["red", "red:0.5", "red+blue", "red:0.5+blue:2", "blue", "base"]
    ask = [partial(text_of, client, model=model, max_tokens=8) for model in models]
    alone = [one() for one in ask]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda one: one(), ask * 3)) == alone * 3

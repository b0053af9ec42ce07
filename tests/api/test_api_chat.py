"""/v1/chat/completions, /v1/models, /tokenize and the small routes."""

import pytest
from folders import TEMPLATE
from live import assert_error
from prometheus_client.parser import text_string_to_metric_families
from test_api_completions import stream, text_of

MESSAGES = [{"role": "user", "content": "the quick brown"}]
PROMPT = "<|user|>the quick brown<|end|><|assistant|>"


def chat(client, **body) -> dict:
    body = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **body}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_the_whole_answer(client):
    answer = chat(client, model="red")
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "red@1"
    [choice] = answer["choices"]
    message = choice.pop("message")
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert set(message) == {"role", "content", "refusal"}
    assert message["content"] == text_of(client, model="red", prompt=PROMPT, max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 8


def test_the_stream(client):
    whole = chat(client, n=2)["choices"][0]["message"]["content"]
    options = {"include_usage": True, "continuous_usage_stats": False}
    chunks = stream(client, "/v1/chat/completions", messages=MESSAGES, n=2, max_tokens=8, stream_options=options)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 16
    for index in range(2):
        deltas = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(choice["delta"]) == {"content"} for choice in deltas[1:-1])
        assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "length")
        assert "".join(choice["delta"].get("content", "") for choice in deltas) == whole


def test_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 8
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert len(entry["top_logprobs"]) == 2
        best = entry["top_logprobs"][0]
        assert (best["token"], best["logprob"], best["bytes"]) == (entry["token"], entry["logprob"], entry["bytes"])
    text = bytes(byte for entry in content for byte in entry["bytes"]).decode(errors="replace")
    # The bytes of the tokens together are the text, also where a token is half a character.
    assert text.startswith(answer["choices"][0]["message"]["content"].rstrip("�"))
    bare = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in bare)


def test_lengths_and_parts(client):
    assert chat(client, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    unlimited = chat(client, max_tokens=None)["usage"]
    assert unlimited["total_tokens"] == 256  # as many as fit
    parts = [{"type": "text", "text": "the quick "}, {"type": "text", "text": "brown"}]
    assert chat(client, messages=[{"role": "user", "content": parts}])["choices"] == chat(client)["choices"]


def test_the_final_message_can_be_continued(client):
    messages = [*MESSAGES, {"role": "assistant", "content": "pack my"}]
    answer = chat(client, messages=messages, add_generation_prompt=False, continue_final_message=True)
    expected = text_of(client, prompt="<|user|>the quick brown<|end|><|assistant|>pack my", max_tokens=8)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages", "no tools here"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "text"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "20"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "exclude"),
        ({"messages": MESSAGES * 2049}, "messages", "2048"),
    ],
)
def test_bad_requests(client, body, param, text):
    reply = client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, **body})
    assert_error(reply, 400, "invalid_request", text, param=param)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("chat_template", "{{ x }}"),
        ("chat_template_kwargs", {"tokenize": True}),
        ("echo", True),
        ("modalities", ["text", "audio"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(client, name, value):
    reply = client.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, name: value})
    assert_error(reply, 400, "unsupported_parameter", name, param=name)


def test_what_asks_for_nothing_is_fine(client):
    harmless = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "modalities": ["text"]}
    assert chat(client, **harmless)["choices"] == chat(client)["choices"]


def test_models(client):
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    base, *adapters = models["data"]
    assert base.pop("root").endswith("/base")  # a benchmark loads the tokenizer from here
    assert base.pop("created") > 1e9
    assert base == {
        "id": "base",
        "object": "model",
        "owned_by": "loraplex",
        "parent": None,
        "max_model_len": 256,
        "permission": [],
    }
    cards = {card["id"]: card for card in adapters}
    assert {"red", "blue"} <= set(cards)
    assert (cards["red"]["root"], cards["red"]["parent"]) == ("red@1", "base")
    assert client.get("/v1/models/red").json() == cards["red"]
    assert client.get("/v1/models/red@1").json()["id"] == "red@1"
    assert client.get("/v1/models/base").json()["parent"] is None
    assert_error(client.get("/v1/models/redd"), 404, "model_not_found", "'red'", param="model")


def test_tokenize_and_back(client, tokenizer):
    text = "the quick né 😀"
    answer = client.post("/tokenize", json={"model": "red", "prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    assert client.post("/tokenize", json={"messages": MESSAGES}).json()["tokens"] == tokenizer.encode(PROMPT)
    assert_error(client.post("/tokenize", json={}), 400, "invalid_request", "prompt or messages", param="prompt")
    assert_error(client.post("/detokenize", json={"tokens": [10**6]}), 400, "invalid_request", param="tokens")
    assert_error(client.post("/tokenize", json={"model": "rot", "prompt": "a"}), 404, "model_not_found")
    info = client.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["chat_template"]) == ("<|bos|>", "<|eos|>", TEMPLATE)


def test_probes_and_version(client):
    for path in ("/health", "/ready"):
        assert client.get(path).json() == {"status": "ok"}
    version = client.get("/version").json()
    assert version["base"] == "base"
    assert version["max_model_len"] == 256
    assert version["batch_invariant"] in (True, False)
    assert client.get("/openapi.json").status_code == 200


def test_request_ids(client):
    assert client.get("/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    for odd in ("", "a b", "x" * 200):
        given = client.get("/nowhere", headers={"x-request-id": odd}).headers["x-request-id"]
        assert len(given) == 32


def metrics_of(client) -> dict:
    reply = client.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(reply.text)}


def value_of(family, **labels) -> float:
    [sample] = [
        s for s in family.samples if labels.items() <= s.labels.items() and not s.name.endswith(("_created", "_bucket"))
    ]
    return sample.value


def test_metrics(client):
    before = metrics_of(client)
    chat(client, model="red", max_tokens=5)
    after = metrics_of(client)
    tokens = "vllm:generation_tokens"
    assert value_of(after[tokens]) - value_of(before[tokens]) == 5
    finished = "vllm:request_success"
    assert value_of(after[finished], finished_reason="length") >= 1
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert value_of(after[name]) == 0
    [info] = after["vllm:lora_requests_info"].samples  # one series, whatever runs
    assert info.labels["max_lora"] == "4"
    assert "red" in info.labels["running_lora_adapters"].split(",")
    assert info.labels["waiting_lora_adapters"] == ""
    assert value_of(after["loraplex_adapter_cache_bytes"]) > 0
    loads = {
        (s.name.rpartition("_")[2], s.labels["phase"]): s.value for s in after["loraplex_adapter_load_seconds"].samples
    }
    for phase in ("disk", "convert", "copy"):
        assert loads["count", phase] >= 1
        assert loads["sum", phase] > 0
    ttft = {s.name: s.value for s in after["vllm:time_to_first_token_seconds"].samples if "bucket" not in s.name}
    assert ttft["vllm:time_to_first_token_seconds_count"] >= 1

"""/v1/completions: shapes, sampling, stops, logprobs and lm-eval's rules."""

import json
import math

import httpx2
import pytest
from folders import peft_greedy
from live import LiveServer, assert_error

PROMPT = "the quick brown"


def complete(client: httpx2.Client, **body) -> dict:
    body = {"model": "base", "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **body}
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(client: httpx2.Client, **body) -> str:
    return complete(client, **body)["choices"][0]["text"]


def stream(client: httpx2.Client, path: str = "/v1/completions", **body) -> list[dict]:
    """The chunks of a stream; checks its frame."""
    body = {"model": "base", "temperature": 0, "ignore_eos": True, "stream": True, **body}
    if path == "/v1/completions":
        body.setdefault("prompt", PROMPT)
    with client.stream("POST", path, json=body) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_whole_answer(client):
    answer = complete(client, max_tokens=5)
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1e9
    [choice] = answer.pop("choices")
    assert isinstance(choice.pop("text"), str)
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    usage = answer.pop("usage")
    assert usage.pop("prompt_tokens_details").keys() == {"cached_tokens"}
    assert usage["completion_tokens"] == 5
    assert usage["total_tokens"] == usage["prompt_tokens"] + 5
    assert answer == {"object": "text_completion", "model": "base", "system_fingerprint": None}


@pytest.mark.parametrize("name", ["base", "red", "blue"])
def test_each_model_answers_as_peft_does(client, base_folder, adapter_folders, tokenizer, name):
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    expected = peft_greedy(base_folder, adapter_folders.get(name), ids, 12)
    answer = complete(client, model=name, prompt=ids, max_tokens=12, logprobs=1)
    tokens = answer["choices"][0]["logprobs"]["tokens"]
    assert tokens == [tokenizer.decode([token]) for token in expected]
    assert answer["model"] == ("base" if name == "base" else f"{name}@1")


def test_the_reply_names_the_version(client):
    reply = client.post("/v1/completions", json={"model": "red", "prompt": "a", "max_tokens": 1})
    assert reply.json()["model"] == "red@1"
    assert reply.headers["x-loraplex-adapter"] == "red@1"
    with client.stream("POST", "/v1/completions", json={"model": "red@1", "prompt": "a", "stream": True}) as reply:
        assert reply.headers["x-loraplex-adapter"] == "red@1"
        assert reply.headers["x-request-id"]
        reply.read()


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_a_stream_is_the_whole_answer_in_pieces(client, options):
    whole = complete(client, max_tokens=20)
    chunks = stream(client, max_tokens=20, **({"stream_options": options} if options else {}))
    last = chunks[-1]
    if options == {"include_usage": True}:
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 20
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        chunks.pop()
    elif options:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 20
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) <= {None}


def test_lists_of_prompts_and_choices_are_indexed(client, tokenizer):
    prompts = ["the quick", "pack my box", "lazy dog"]
    answer = complete(client, prompt=prompts, n=2, max_tokens=6)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    alone = [text_of(client, prompt=prompt, max_tokens=6) for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == [text for text in alone for _ in range(2)]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))  # each prompt once, however many choices
    by_ids = complete(client, prompt=ids, n=2, max_tokens=6)
    assert [c["text"] for c in by_ids["choices"]] == [c["text"] for c in answer["choices"]]
    chunks = stream(client, prompt=prompts, max_tokens=6)
    for index, text in enumerate(alone):
        parts = [c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert "".join(parts) == text


def test_seeds_are_reproducible_and_choices_differ(client):
    sampled = {"temperature": 1.0, "seed": 7, "n": 4, "max_tokens": 16}
    first, second = (complete(client, **sampled)["choices"] for _ in range(2))
    assert first == second
    assert len({choice["text"] for choice in first}) == 4
    assert complete(client, **{**sampled, "seed": 8})["choices"] != first
    assert text_of(client, **{**sampled, "n": 1}) == first[0]["text"]
    unseeded = {"temperature": 1.0, "max_tokens": 16}
    assert text_of(client, **unseeded) != text_of(client, **unseeded)


def test_an_identical_prompt_is_cached(client):
    prompt = "five dozen liquor jugs " * 4
    complete(client, model="blue", prompt=prompt, max_tokens=1)
    usage = complete(client, model="blue", prompt=prompt, max_tokens=1)["usage"]
    assert 0 < usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"]
    other = complete(client, model="blue", prompt=prompt, max_tokens=1, cache_salt="mine")["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0
    # Logits of the prompt are asked for: nothing may come from the cache.
    echoed = complete(client, model="blue", prompt=prompt, max_tokens=1, echo=True, logprobs=0)["usage"]
    assert echoed["prompt_tokens_details"]["cached_tokens"] == 0


# -- stops ----------------------------------------------------------------------------------------------------


def ascii_run(client: httpx2.Client) -> tuple[dict, str]:
    """A request whose answer is plain letters, spread over many tokens, and that answer."""
    letters = {str(token): 100 for token in range(72, 98)}  # bytes of single letters
    body = {"logit_bias": letters, "max_tokens": 24, "temperature": 1.0, "seed": 3}
    text = text_of(client, **body)
    assert len(text) == 24
    assert text.isascii()
    return body, text


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("begin", "end"), [(0, 1), (5, 9), (10, 24)])
def test_stop_strings_across_token_borders(client, begin, end, is_streamed):
    body, text = ascii_run(client)
    stop = text[begin:end]
    at = text.find(stop)
    body["stop"] = ["never there", stop]
    if is_streamed:
        chunks = [chunk["choices"][0] for chunk in stream(client, **body)]
        assert "".join(chunk["text"] for chunk in chunks) == text[:at]
        last = chunks[-1]
    else:
        answer = complete(client, **body)
        [last] = answer["choices"]
        assert last["text"] == text[:at]
        assert answer["usage"]["completion_tokens"] == at + len(stop)
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


def test_a_stop_string_can_be_kept(client):
    body, text = ascii_run(client)
    stop = text[5:9]
    expected = text[: text.find(stop) + 4]
    assert text_of(client, **body, stop=stop, include_stop_str_in_output=True) == expected


def test_min_tokens_disarms_stop_strings(client):
    body, text = ascii_run(client)
    stop = text[0]
    later = text.find(stop, 6)
    expected = text[:later] if later >= 0 else text
    assert text_of(client, **body, stop=stop, min_tokens=6) == expected


def test_logprobs_of_a_trimmed_text_cover_what_was_generated(client):
    body, text = ascii_run(client)
    stop = text[5:9]
    [choice] = complete(client, **body, stop=stop, logprobs=0)["choices"]
    assert choice["text"] == text[: text.find(stop)]
    assert "".join(choice["logprobs"]["tokens"]) == text[: text.find(stop) + 4]


def test_stop_token_ids(client, tokenizer):
    body, text = ascii_run(client)
    token = tokenizer.encode(text[4], add_special_tokens=False)[0]
    [choice] = complete(client, **body, stop_token_ids=[token])["choices"]
    assert choice["text"] == text[: text.find(text[4])]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", token)


def test_the_end_token_ends_and_can_be_ignored(client):
    eos = {"2": 100}
    [choice] = complete(client, logit_bias=eos, ignore_eos=False, max_tokens=4)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", None)
    answer = complete(client, logit_bias=eos, ignore_eos=True, max_tokens=4)
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["text"] == ""
    assert text_of(client, logit_bias=eos, ignore_eos=True, max_tokens=4, skip_special_tokens=False) == "<|eos|>" * 4
    answer = complete(client, logit_bias=eos, ignore_eos=False, min_tokens=3, max_tokens=8)
    assert answer["usage"]["completion_tokens"] == 4
    assert answer["choices"][0]["finish_reason"] == "stop"


# -- logprobs -------------------------------------------------------------------------------------------------


def test_logprobs_in_the_legacy_shape(client):
    [choice] = complete(client, prompt="the quick", max_tokens=5, logprobs=3)["choices"]
    logprobs = choice["logprobs"]
    assert set(logprobs) == {"text_offset", "tokens", "token_logprobs", "top_logprobs"}
    assert logprobs["text_offset"][0] == 0
    assert len(logprobs["tokens"]) == 5
    for token, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == value == max(top.values())  # greedy
        assert 1 <= len(top) <= 3  # two ids may read the same
        assert math.fsum(map(math.exp, top.values())) <= 1.0001
    chunks = stream(client, prompt="the quick", max_tokens=5, logprobs=3)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert {key: [value for part in parts for value in part[key]] for key in logprobs} == logprobs


def test_logprobs_are_the_raw_distribution(client):
    plain = complete(client, max_tokens=1, logprobs=5)["choices"][0]["logprobs"]
    warm = complete(client, max_tokens=1, logprobs=5, temperature=2.0, logit_bias={"80": 100})["choices"][0]["logprobs"]
    assert warm["tokens"] != plain["tokens"]
    chosen = warm["tokens"][0]
    assert {t: v for t, v in warm["top_logprobs"][0].items() if t != chosen} == {
        t: v for t, v in plain["top_logprobs"][0].items() if t != chosen
    }


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("model", ["base", "red"])
@pytest.mark.parametrize("length", [20, 100])  # 100: in two chunks
def test_lm_eval_rules(client, tokenizer, model, max_tokens, length):
    """The request of lm-eval's loglikelihood, and what it expects of the answer."""
    prompts = [[(7 * i + j) % 250 + 8 for i in range(length + j)] for j in range(3)]
    answer = complete(
        client, model=model, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234, ignore_eos=False
    )
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(prompt) + max_tokens
        assert logprobs["tokens"][: len(prompt)] == [tokenizer.decode([token]) for token in prompt]  # no BOS
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        is_greedy = []
        for token, value, top in zip(
            logprobs["tokens"][1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            # The very same float; of two ids that read the same the likelier one stays.
            assert top[token] == value or ("�" in token and top[token] > value)
            is_greedy.append(value == max(top.values()))
        assert max_tokens == 0 or is_greedy[-1]
        assert choice["text"].startswith(tokenizer.decode(prompt)[:10])


def test_echoed_logprobs_are_those_of_the_text_when_generated(client, tokenizer):
    """What was generated greedily is, scored as a prompt, the best at each position and as likely."""
    prompt = tokenizer.encode("pack my box", add_special_tokens=False)
    letters = {str(token): 60 for token in range(72, 98)}
    generated = complete(client, prompt=prompt, max_tokens=8, logprobs=0, logit_bias=letters)["choices"][0]["logprobs"]
    ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in generated["tokens"]]
    scored = complete(client, prompt=prompt + ids, max_tokens=0, echo=True, logprobs=0)["choices"][0]["logprobs"]
    assert scored["tokens"][-8:] == generated["tokens"]
    assert scored["token_logprobs"][-8:] == pytest.approx(generated["token_logprobs"], abs=1e-3)


def test_echo_without_logprobs(client):
    alone = text_of(client, max_tokens=4)
    [choice] = complete(client, max_tokens=4, echo=True)["choices"]
    assert (choice["text"], choice["logprobs"]) == (PROMPT + alone, None)
    assert text_of(client, max_tokens=0, echo=True) == PROMPT
    chunks = stream(client, max_tokens=4, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == PROMPT + alone


# -- sampling -------------------------------------------------------------------------------------------------


def test_logit_bias_and_penalties(client):
    assert (
        text_of(client, logit_bias={"80": 100}, max_tokens=4)
        == text_of(client, logit_bias={"80": 100}, max_tokens=1) * 4
    )

    def tokens(**penalty) -> list[str]:
        return complete(client, max_tokens=60, logprobs=0, **penalty)["choices"][0]["logprobs"]["tokens"]

    def most(tokens: list[str]) -> int:
        return max(tokens.count(token) for token in set(tokens))

    letters = {"logit_bias": {str(token): 50 for token in range(72, 76)}}  # four letters, again and again
    plain = tokens(**letters)
    assert len(set(plain)) <= 4
    for penalty in ({"frequency_penalty": 2.0}, {"repetition_penalty": 2.0}):
        assert tokens(**letters, **penalty) != plain
    many = {"logit_bias": {str(token): 50 for token in range(72, 98)}, "temperature": 1.0, "seed": 1}
    assert len(set(tokens(**many, presence_penalty=2.0))) > len(set(tokens(**many, presence_penalty=-2.0)))
    assert most(tokens(**letters, frequency_penalty=2.0)) < most(plain)


def test_truncation_leaves_the_best(client):
    greedy = text_of(client, max_tokens=8)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert text_of(client, max_tokens=8, temperature=1.5, **narrow) == greedy
    assert text_of(client, max_tokens=8, temperature=1.0, seed=5, top_k=-1) == text_of(
        client, max_tokens=8, temperature=1.0, seed=5
    )


def test_nulls_mean_nothing(client):
    nulls = ("stop", "logprobs", "n", "seed", "top_p", "top_k", "stream", "stream_options", "logit_bias", "suffix")
    assert text_of(client, max_tokens=4, **dict.fromkeys(nulls)) == text_of(client, max_tokens=4)


def test_unknown_fields_are_accepted_and_named(client):
    body = {"model": "base", "prompt": "a", "max_tokens": 1, "zebra": 1, "aardvark": True, "nil": None, "user": "me"}
    assert client.post("/v1/completions", json=body).headers["x-ignored-params"] == "aardvark,zebra"
    body["x" * 100_000] = 1
    body["a\nb: c"] = 1
    reply = client.post("/v1/completions", json=body)
    assert reply.headers["x-ignored-params"] == "aardvark,zebra,..."
    assert "x-ignored-params" not in client.post("/v1/completions", json={"model": "base", "prompt": "a"}).headers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suffix", "end"),
        ("best_of", 5),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {}),
        ("structured_outputs", {"regex": "a"}),
        ("prompt_logprobs", 3),
        ("bad_words", ["x"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(client, name, value):
    reply = client.post("/v1/completions", json={"model": "base", "prompt": "a", name: value})
    assert_error(reply, 400, "unsupported_parameter", name, param=name)


def test_kernels_compile_before_the_first_request_only(server: LiveServer, client):
    """What is compiled during a request stalls everybody."""
    import numba.core.dispatcher

    from loraplex.ops import numba_attention, numba_lora, numba_ops

    def signatures() -> dict[str, int]:
        return {
            f"{module.__name__}.{name}": len(value.signatures)
            for module in (numba_ops, numba_lora, numba_attention)
            for name, value in vars(module).items()
            if isinstance(value, numba.core.dispatcher.Dispatcher)
        }

    before = signatures()
    assert before
    complete(client, model="red", prompt=["a", "pack my box with five dozen liquor jugs " * 3], n=2, max_tokens=4)
    complete(client, model="base", prompt="b", max_tokens=4)
    assert signatures() == before

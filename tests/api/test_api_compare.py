"""/v1/compare over a real socket: texts as if asked alone, every text scored by every model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from folders import parts_of
from live import LiveServer, assert_error
from test_api_life import connect

from loraplex.engine.sampling_params import SamplingParams
from loraplex.serving.generation_request import GenerationRequest

PROMPT = "the quick brown"
TARGETS = ["red", "blue@1", "base", "red:0.5+blue:0.5"]


def compare(client: httpx2.Client, targets: list[str], **body: Any) -> httpx2.Response:
    asked = {"targets": targets, "temperature": 0, "max_tokens": 8, **body}
    if "messages" not in asked:
        asked.setdefault("prompt", PROMPT)
    return client.post("/v1/compare", json=asked)


def compared(reply: httpx2.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.fixture
def broken(server: LiveServer, adapter_folders: dict[str, Path]) -> Iterator[str]:
    """An adapter in quarantine."""
    pushed = server.client.post("/v1/adapters", data={"name": "sick"}, files=parts_of(adapter_folders["green"])).json()
    server.service.catalog.quarantine(pushed["digest"], "it was NaN")
    yield "sick"
    assert server.client.delete("/v1/adapters/sick").is_success


def test_texts_are_those_of_the_same_requests_alone(client: httpx2.Client):
    for sampling in ({"temperature": 0}, {"temperature": 1.0, "seed": 7, "top_p": 0.9}):
        found = compared(compare(client, TARGETS, **sampling))
        assert found["object"] == "comparison"
        assert found["id"].startswith("cmp-")
        for answer in found["answers"]:
            body = {"model": answer["target"], "prompt": PROMPT, "max_tokens": 8, **sampling}
            alone = client.post("/v1/completions", json=body).json()
            choice = alone["choices"][0]
            assert (answer["text"], answer["finish_reason"]) == (choice["text"], choice["finish_reason"])
            assert answer["model"] == alone["model"]
            assert answer["error"] is None
        assert [answer["model"] for answer in found["answers"]][:3] == ["red@1", "blue@1", "base"]


def test_they_run_in_one_batch(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    seen = []
    execute = server.engine.runner.execute

    def recording(batch):
        seen.append({entry.seq.request.composition for entry in batch.entries})
        return execute(batch)

    monkeypatch.setattr(server.engine.runner, "execute", recording)
    compared(compare(server.client, TARGETS))
    assert max(map(len, seen)) == len(TARGETS)


def test_scores_are_those_of_echo(server: LiveServer):
    client = server.client
    params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0)
    request = GenerationRequest(model="", prompts=[PROMPT], params=params, max_tokens=8)
    found = server.call(server.service.comparisons.compare(request, ["red", "blue"]))
    assert found.scorers == ["red@1", "blue@1", "base"], "the base scores, too"
    prompt = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    for answer, scores in zip(found.answers, found.scores, strict=True):
        assert len(answer.token_ids) == 8
        for scorer, score in zip(found.scorers, scores, strict=True):
            body = {"model": scorer, "prompt": [*prompt, *answer.token_ids], "echo": True, "logprobs": 0}
            echo = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
            logprobs = echo["choices"][0]["logprobs"]["token_logprobs"]
            assert score is not None
            assert score.logprob == pytest.approx(sum(logprobs[len(prompt) :]), abs=1e-3)
            assert len(score.divergences) == (8 if scorer == answer.model else 0)
    assert (found.num_prompt_tokens, found.num_completion_tokens) == (2 * len(prompt), 16)
    assert found.num_scored_tokens == 6 * (len(prompt) + 8)
    shown = compared(compare(client, ["red", "blue"], ignore_eos=True))["logprobs"]
    assert shown["scorers"] == found.scorers
    assert shown["sum"] == [[pytest.approx(score and score.logprob) for score in row] for row in found.scores]
    assert shown["per_token"] == [[pytest.approx(total / 8) for total in row] for row in shown["sum"]]
    assert shown["errors"] == []


def test_divergence_from_the_base(client: httpx2.Client):
    found = compared(compare(client, ["red", "base", "red:0.01"], ignore_eos=True))
    red, base, little = (answer["divergence"] for answer in found["answers"])
    assert base == {"mean": 0.0, "max": 0.0, "positions": 8}
    assert red["positions"] == 8
    assert 0 < little["mean"] < red["mean"] <= red["max"]


def test_chats(client: httpx2.Client):
    messages = [{"role": "user", "content": "the lazy dog"}]
    found = compared(compare(client, ["red", "blue"], messages=messages, stop=["zzz"], strange=1))
    for answer in found["answers"]:
        body = {"model": answer["target"], "messages": messages, "temperature": 0, "max_tokens": 8, "stop": ["zzz"]}
        alone = client.post("/v1/chat/completions", json=body).json()
        assert answer["text"] == alone["choices"][0]["message"]["content"]
    reply = compare(client, ["red", "blue"], messages=messages, strange=1)
    assert reply.headers["x-ignored-params"] == "strange"


def test_each_scorer_has_its_own_prompt(server: LiveServer, adapter_folders: dict[str, Path]):
    """Templates, and with them the prompts, differ; the text's token ids are the same."""
    client = server.client
    template = b"{% for m in messages %}<|user|>say: {{ m.content }} now{% endfor %}<|assistant|>"
    files = {**parts_of(adapter_folders["green"]), "chat_template": ("chat_template.jinja", template)}
    assert client.post("/v1/adapters", data={"name": "own"}, files=files).is_success
    messages = [{"role": "user", "content": "the lazy dog"}]
    params = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=0)
    request = GenerationRequest(model="", messages=messages, params=params, max_tokens=5)
    found = server.call(server.service.comparisons.compare(request, ["own", "red"]))
    lengths = set()
    for answer, scores in zip(found.answers, found.scores, strict=True):
        for scorer, score in zip(found.scorers, scores, strict=True):
            prompt = client.post("/tokenize", json={"model": scorer, "messages": messages}).json()["tokens"]
            lengths.add(len(prompt))
            body = {"model": scorer, "prompt": [*prompt, *answer.token_ids], "echo": True, "logprobs": 0}
            echo = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()
            logprobs = echo["choices"][0]["logprobs"]["token_logprobs"]
            assert score is not None
            assert score.logprob == pytest.approx(sum(logprobs[len(prompt) :]), abs=1e-3)
            assert len(score.divergences) == (5 if scorer == answer.model else 0)
    assert len(lengths) > 1
    assert client.delete("/v1/adapters/own").is_success


def test_it_is_counted(client: httpx2.Client):
    def counted() -> dict[str, float]:
        lines = client.get("/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("loraplex_comparison")}

    before = counted()
    found = compared(compare(client, ["red", "blue"]))
    after = counted()
    assert after["loraplex_comparisons_total"] - before["loraplex_comparisons_total"] == 1
    name = "loraplex_comparison_scored_tokens_total"
    assert after[name] - before[name] == found["usage"]["scored_tokens"]


def test_a_text_of_no_tokens(client: httpx2.Client):
    """An end at once is a text, too: certain, and nowhere compared."""
    found = compared(compare(client, ["red", "blue"], max_tokens=0))
    assert [answer["text"] for answer in found["answers"]] == ["", ""]
    assert [answer["divergence"] for answer in found["answers"]] == [None, None]
    assert found["logprobs"]["sum"] == [[0.0] * 3] * 2
    assert found["logprobs"]["per_token"] == [[None] * 3] * 2


def test_an_end_token_and_a_stop_string(client: httpx2.Client):
    first = compared(compare(client, ["red", "blue"], ignore_eos=True))["answers"][0]
    ids = client.post("/tokenize", json={"prompt": first["text"]}).json()["tokens"]
    stopped = compared(compare(client, ["red", "base"], stop_token_ids=ids, ignore_eos=True))["answers"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["tokens"] < 8, "the token that ended it is not part of the text"
    cut = compared(compare(client, ["red", "base"], stop=[first["text"][1:3]], ignore_eos=True))["answers"][0]
    assert cut["finish_reason"] == "stop"
    assert first["text"].startswith(cut["text"])
    assert cut["tokens"] >= 1, "the tokens of the stop string count"


def test_one_that_fails_does_not_hide_the_others(client: httpx2.Client, broken: str):
    found = compared(compare(client, ["red", broken, "blue"]))
    red, sick, blue = found["answers"]
    assert (sick["text"], sick["error"]["code"], sick["divergence"]) == (None, "adapter_quarantined", None)
    assert red["error"] is blue["error"] is None
    assert found["logprobs"]["scorers"] == ["red@1", broken, "blue@1", "base"]
    assert found["logprobs"]["sum"][1] == [None] * 4
    assert found["logprobs"]["sum"][0][1] is None
    assert found["logprobs"]["sum"][0][2] < 0
    assert {(one["text"], one["scorer"], one["error"]["code"]) for one in found["logprobs"]["errors"]} == {
        (0, broken, "adapter_quarantined"),
        (2, broken, "adapter_quarantined"),
    }


def test_a_text_that_fits_no_scorer(client: httpx2.Client):
    """The own prompt and text fill the context to the last token; nobody's is longer here."""
    prompt = [5] * 240
    found = compared(compare(client, ["red", "blue"], prompt=prompt, max_tokens=16, ignore_eos=True))
    assert [answer["tokens"] for answer in found["answers"]] == [16, 16]
    assert found["logprobs"]["errors"] == []
    refused = compare(client, ["red", "blue"], prompt=prompt, max_tokens=17)
    assert_error(refused, 400, "context_length_exceeded", "256")


@pytest.mark.parametrize(
    ("targets", "body", "status", "code", "text"),
    [
        (["red"], {}, 400, "invalid_request", "2 to 16"),
        ([], {}, 400, "invalid_request", "2 to 16"),
        ([f"m{i}" for i in range(17)], {}, 400, "invalid_request", "not 17"),
        (["red", "red"], {}, 400, "invalid_request", "twice"),
        (["red", "red@1"], {}, 400, "invalid_request", "same model"),
        (["red", "nobody"], {}, 404, "model_not_found", "nobody"),
        (["red", "blue:1e9"], {}, 400, "invalid_composition", "blue"),
        (["red", "blue"], {"model": "red"}, 400, "unsupported_parameter", "targets"),
        (["red", "blue"], {"stream": True}, 400, "unsupported_parameter", "stream"),
        (["red", "blue"], {"n": 2}, 400, "unsupported_parameter", "'n'"),
        (["red", "blue"], {"logprobs": 3}, 400, "unsupported_parameter", "logprobs"),
        (["red", "blue"], {"guided_json": {}}, 400, "unsupported_parameter", "guided_json"),
        (["red", "blue"], {"messages": [], "prompt": "a"}, 400, "invalid_request", "one of the two"),
        (["red", "blue"], {"messages": None, "prompt": None}, 400, "invalid_request", "one of the two"),
        (["red", "blue"], {"messages": [{"role": 3}]}, 400, "invalid_request", "role"),
        (["red", "blue"], {"prompt": ["a", "b"]}, 400, "invalid_request", "one prompt"),
        (["red", "blue"], {"temperature": -1}, 400, "invalid_request", "temperature"),
        (["red", "blue"], {"prompt": ""}, 400, "invalid_request", "empty"),
    ],
)
def test_what_is_no_comparison(client: httpx2.Client, targets, body, status: int, code: str, text: str):
    assert_error(compare(client, targets, **body), status, code, text)


@pytest.mark.parametrize("name", ['"\\ud800"', "3", "null", '"a b"', '"' + "x" * 300 + '"', '""', '"+"'])
def test_what_is_no_name(client: httpx2.Client, name: str):
    body = f'{{"targets": ["red", {name}], "prompt": "a"}}'
    reply = client.post("/v1/compare", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


def test_an_alias_is_its_main_target(client: httpx2.Client):
    made = client.put("/v1/routes/prod", json={"targets": [{"model": "red", "weight": 9}, {"model": "blue"}]})
    assert made.is_success
    found = compared(compare(client, ["prod", "blue"]))
    assert [(answer["target"], answer["model"]) for answer in found["answers"]] == [
        ("prod", "red@1"),
        ("blue", "blue@1"),
    ]
    assert sum(one["requests"] for one in client.get("/v1/routes/prod").json()["observed"]) == 0, "no traffic of it"
    assert_error(compare(client, ["prod", "red"]), 400, "invalid_request", "same model")
    assert client.delete("/v1/routes/prod").is_success


def test_a_client_that_goes_ends_all(server: LiveServer):
    body = {"targets": ["red", "blue", "base"], "prompt": "a", "max_tokens": 250, "ignore_eos": True}
    with server.paused():
        with connect(server, body, "/v1/compare"):
            server.wait_until_computing()
            server.wait_until(lambda: server.service.num_running >= 3, "its start")
        server.wait_until(lambda: server.service.num_running == 0, "noticing")
    server.wait_until(lambda: server.is_idle, "the abort")
    assert server.engine.runner.kept_logits.nbytes == 0

"""Evaluation sets over a real socket: stored, run beside the traffic, reported, and a gate in front of promotions."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import LiveServer, assert_error

from loraplex.config import Settings
from loraplex.evaluation.evaluation_set import MAX_BYTES

URL = "/v1/routes/prod/evaluation"
PROMPTS = ["the quick brown", "pack my box", "liquor jugs", "the lazy dog"]
DOCUMENT = {"targets": [{"model": "red@1"}, {"model": "blue@1", "weight": 0}], "gate": {"min_pass": 0.75}}


def text_of(client: httpx2.Client, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0}
    return client.post("/v1/completions", json=body).json()["choices"][0]["text"]


def jsonl(*cases: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(case).encode() + b"\n" for case in cases)


@pytest.fixture
def answers(client: httpx2.Client) -> dict[str, list[str]]:
    found = {model: [text_of(client, model, prompt) for prompt in PROMPTS] for model in ("red@1", "blue@1")}
    assert all(one.strip() != other.strip() for one, other in zip(*found.values(), strict=True))
    return found


def expecting(texts: list[str]) -> bytes:
    cases = zip(PROMPTS, texts, strict=True)
    return jsonl(*({"prompt": prompt, "check": {"exact": text}, "max_tokens": 4} for prompt, text in cases))


@pytest.fixture
def routed(client: httpx2.Client) -> Iterator[httpx2.Client]:
    assert client.put("/v1/routes/prod", json=DOCUMENT).is_success
    yield client
    client.delete("/v1/routes/prod")


def put(client: httpx2.Client, data: bytes, **headers: str) -> dict[str, Any]:
    reply = client.put(URL, content=data, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def ran(server: LiveServer, **body: Any) -> dict[str, Any]:
    """A run from its beginning to its end."""
    begun = server.client.post(f"{URL}/runs", json=body)
    assert begun.status_code == 202, begun.text
    run = begun.json()
    assert (run["state"], run["report"]) == ("running", None)
    path = f"{URL}/runs/{run['id']}"
    server.wait_until(lambda: server.client.get(path).json()["state"] != "running", "the run's end")
    return server.client.get(path).json()


def test_a_set_is_stored(routed: httpx2.Client):
    data = jsonl({"prompt": "a", "check": {"contains": "b"}}, {"prompt": "é", "check": {"regex": "."}})
    assert_error(routed.get(URL), 404, "evaluation_not_found", "no evaluation set")
    assert_error(routed.post(f"{URL}/runs"), 404, "evaluation_not_found")
    stored = put(routed, data)
    assert (stored["alias"], stored["revision"], stored["cases"], stored["bytes"]) == ("prod", 1, 2, len(data))
    assert put(routed, data) == stored
    lines = routed.get(f"{URL}/lines")
    assert (lines.content, lines.headers["content-type"], lines.headers["etag"]) == (data, "application/jsonl", '"1"')
    shown = routed.get(URL).json()
    assert {name: shown[name] for name in stored} == stored
    assert shown["gate"] == {"min_pass": 0.75}
    assert shown["run"] is None
    assert [(one["model"], one["share"], one["passed"]) for one in shown["targets"]] == [
        ("red@1", 1.0, None),
        ("blue@1", 0.0, None),
    ]
    other = jsonl({"prompt": "x", "check": {"exact": "y"}})
    refused = routed.put(URL, content=other, headers={"If-Match": '"7"'})
    assert_error(refused, 412, "route_changed", "revision 1 now, not 7")
    assert put(routed, other, **{"If-Match": '"1"'})["revision"] == 2
    history = routed.get("/v1/routes/prod/history").json()["data"]
    assert [one["action"] for one in history[:3]] == ["evaluation_set", "evaluation_set", "route_set"]
    assert routed.delete(URL).json() == {"alias": "prod", "deleted": True}
    assert_error(routed.delete(URL), 404, "evaluation_not_found")
    assert_error(routed.get(f"{URL}/lines"), 404, "evaluation_not_found")


def test_what_is_no_set(routed: httpx2.Client):
    good = jsonl({"prompt": "a", "check": {"exact": "b"}})
    refused = routed.put(URL, content=good + b"\n" + b'{"prompt": "a", "check": {"regex": "("}}')
    assert_error(refused, 400, "invalid_evaluation", "line 3: check.regex", param="body")
    assert_error(routed.put(URL, content=b""), 400, "invalid_evaluation", "no case")
    assert_error(routed.put(URL, content=b"\n" * (MAX_BYTES + 1)), 400, "invalid_evaluation", str(MAX_BYTES))
    assert_error(routed.put(URL, content=b"\n" * (2 * MAX_BYTES)), 413, "request_too_large")
    assert_error(routed.put("/v1/routes/nobody/evaluation", content=good), 404, "model_not_found", "no route")
    assert_error(routed.put("/v1/routes/no@body/evaluation", content=good), 400, "invalid_name")
    put(routed, good)
    for targets, status, code in (
        (["nobody"], 404, "model_not_found"),
        ([], 400, "invalid_request"),
        (["red"] * 17, 400, "invalid_request"),
    ):
        assert_error(routed.post(f"{URL}/runs", json={"targets": targets}), status, code)
    assert_error(routed.get(f"{URL}/runs/latest"), 404, "evaluation_not_found")
    assert_error(routed.delete(f"{URL}/runs/none"), 404, "evaluation_not_found")


def test_a_run_and_its_report(server: LiveServer, routed: httpx2.Client, answers: dict[str, list[str]]):
    put(routed, expecting(answers["red@1"]))
    run = ran(server)
    assert (run["state"], run["done"], run["total"], run["targets"]) == ("done", 8, 8, ["red@1", "blue@1"])
    red, blue = run["report"]["targets"]
    assert (red["model"], red["passed"], red["pass_rate"], red["failures"]) == ("red@1", 4, 1.0, [])
    assert (blue["passed"], blue["total"], blue["pass_rate"], blue["errors"]) == (0, 4, 0.0, 0)
    assert [one["line"] for one in blue["failures"]] == [1, 2, 3, 4]
    assert blue["failures"][0] == {
        "line": 1,
        "name": None,
        "check": "exact",
        "prompt": PROMPTS[0],
        "answer": answers["blue@1"][0],
        "why": "it is another text",
    }
    shown = routed.get(URL).json()
    assert [(one["pass_rate"], one["closed"]) for one in shown["targets"]] == [
        (1.0, None),
        (0.0, "passed 0 of 4 cases (0), and 0.75 is asked for"),
    ]
    assert shown["run"]["id"] == run["id"]
    listed = routed.get(f"{URL}/runs").json()
    assert [(one["id"], one["report"]) for one in listed["data"]] == [(run["id"], None)]
    assert routed.get(f"{URL}/runs/latest").json() == run
    metrics = routed.get("/metrics").text
    assert 'loraplex_evaluation_cases_total{result="passed"}' in metrics
    alone = ran(server, targets=["blue", "base", "blue@1"])
    assert (alone["targets"], alone["total"]) == (["blue@1", "base"], 8)


def test_the_gate_in_front_of_a_promotion(server: LiveServer, routed: httpx2.Client, answers: dict[str, list[str]]):
    ramp = {"target": "blue@1", "steps": [10, 100], "every": 3600}

    def closed(text: str) -> None:
        promoted = routed.post("/v1/routes/prod/promote", json={"target": "blue@1"})
        assert_error(promoted, 409, "gate_closed", text, "loraplex route eval run prod --target blue@1", param="target")
        assert_error(routed.post("/v1/routes/prod/ramp", json=ramp), 409, "gate_closed", text)
        put_anyway = {**DOCUMENT, "targets": ["red@1", "blue@1"]}
        assert_error(routed.put("/v1/routes/prod", json=put_anyway), 409, "gate_closed", text)
        assert routed.get("/v1/routes/prod").json()["shares"] == {"red@1": 1.0, "blue@1": 0.0}

    closed("has not been run")
    put(routed, expecting(answers["red@1"]))
    ran(server)
    closed("passed 0 of 4")
    put(routed, expecting([*answers["blue@1"][:3], answers["red@1"][3]]))
    closed("has not been run")
    ran(server, targets=["blue@1"])
    assert routed.post("/v1/routes/prod/ramp", json=ramp).json()["shares"]["blue@1"] == 0.1
    again = routed.get(f"{URL}/lines").content
    put(routed, again)
    assert routed.get("/v1/routes/prod").json()["ramp"] is not None, "the same set again is no change"
    put(routed, expecting(answers["red@1"]))
    stopped = routed.get("/v1/routes/prod").json()
    assert (stopped["ramp"], stopped["shares"]["blue@1"]) == (None, 0.1)
    assert_error(routed.post("/v1/routes/prod/promote", json={"target": "blue@1"}), 409, "gate_closed", "not been run")
    put(routed, again)
    ran(server)
    assert routed.post("/v1/routes/prod/promote", json={"target": "blue@1"}).json()["shares"]["blue@1"] == 1.0
    assert_error(routed.put("/v1/routes/prod", json={**DOCUMENT, "targets": ["red"]}), 400, "invalid_route", "versions")


def test_every_kind_of_check_through_a_chat(server: LiveServer, routed: httpx2.Client):
    body = {"model": "red", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 4}
    said = routed.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    chat = {"messages": body["messages"], "max_tokens": 4}
    put(
        routed,
        jsonl(
            {**chat, "check": {"exact": said}, "name": "same"},
            {**chat, "check": {"contains": [said[:1], said[-1:]]}},
            {**chat, "check": {"regex": "^(?s:.)"}},
            {**chat, "check": {"json_schema": {"type": "object"}}, "name": "json"},
            {**chat, "check": {"regex": "(a|a?)+$b"}},
            {"prompt": "a " * 300, "check": {"exact": "x"}},
        ),
    )
    (red,) = ran(server, targets=["red"])["report"]["targets"]
    assert (red["passed"], red["total"], red["errors"]) == (3, 6, 1)
    json_one, _, long = red["failures"]
    assert json_one["name"] == "json"
    assert "not JSON" in json_one["why"]
    assert (long["answer"], "maximum context length" in long["why"]) == (None, True)
    assert len(long["prompt"]) == 300


def test_a_run_is_watched_and_cancelled(server: LiveServer, routed: httpx2.Client):
    put(routed, jsonl(*[{"prompt": "a", "check": {"contains": "b"}, "max_tokens": 200}] * 40))
    run = routed.post(f"{URL}/runs").json()
    path = f"{URL}/runs/{run['id']}"
    assert run["total"] == 80
    server.wait_until(lambda: routed.get(path).json()["done"] > 0, "progress")
    assert_error(routed.post(f"{URL}/runs"), 409, "evaluation_running", run["id"])
    cancelled = routed.delete(path).json()
    assert (cancelled["state"], cancelled["report"]) == ("cancelled", None)
    assert cancelled["done"] < 80
    server.wait_until(lambda: server.stats.num_running == 0, "its end in the engine")
    assert routed.delete(path).json() == cancelled
    assert routed.get(URL).json()["targets"][0]["passed"] is None


def test_clients_come_first(server: LiveServer, routed: httpx2.Client):
    """While a client's request runs, a run has one of its own."""
    put(routed, jsonl(*[{"prompt": "a", "check": {"contains": "b"}, "max_tokens": 30}] * 40))
    client = routed.stream(
        "POST",
        "/v1/completions",
        json={"model": "base", "prompt": "x", "max_tokens": 250, "ignore_eos": True, "stream": True},
    )
    most = []
    execute = server.engine.runner.execute

    def watching(batch):
        if any(not one.seq.request.salt for one in batch.entries):
            most.append(sum(1 for one in batch.entries if one.seq.request.salt))
        return execute(batch)

    with pytest.MonkeyPatch.context() as patch:
        with client as stream:
            lines = stream.iter_lines()
            next(lines)
            patch.setattr(server.engine.runner, "execute", watching)
            run = routed.post(f"{URL}/runs").json()
            assert list(lines)
        server.wait_until(lambda: server.stats.num_running > 1, "going on faster")
        assert routed.delete(f"{URL}/runs/{run['id']}").json()["state"] == "cancelled"
    assert max(most) == 1


def test_a_restart_keeps_set_report_and_pass(make_settings: Callable[..., Settings], tmp_path: Path):
    settings = make_settings(tmp_path / "data")
    with LiveServer(settings) as server:
        client = server.client
        assert client.put("/v1/routes/prod", json=DOCUMENT).is_success
        put(client, expecting([text_of(client, "blue@1", prompt) for prompt in PROMPTS]))
        run = ran(server)
        slow = {"prompt": "a", "check": {"contains": "b"}, "max_tokens": 200}
        assert client.put("/v1/routes/desk", json={"targets": ["red"]}).is_success
        assert client.put("/v1/routes/desk/evaluation", content=jsonl(*[slow] * 200)).is_success
        assert client.post("/v1/routes/desk/evaluation/runs").status_code == 202
    with LiveServer(settings) as server:
        client = server.client
        assert client.get(f"{URL}/runs/latest").json() == run
        assert client.get("/v1/routes/desk/evaluation/runs/latest").json()["state"] == "interrupted"
        assert client.get(URL).json()["targets"][1]["pass_rate"] == 1.0
        assert client.post("/v1/routes/prod/promote", json={"target": "blue@1"}).json()["shares"]["blue@1"] == 1.0
        server.check_at_rest()

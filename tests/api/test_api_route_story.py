"""A route's life over a real socket: a new version gets a tenth, is watched beside a shadow, ramps, fails and is taken
out by the server itself; and routes that change under load."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from folders import parts_of
from live import LiveServer
from safetensors.torch import load_file, save_file

from loraplex.config import Settings

PROMPT = "the quick brown fox"


@pytest.fixture
def unproven(make_settings: Callable[..., Settings], tmp_path: Path) -> Iterator[LiveServer]:
    """Accepts what a proof would refuse."""
    with LiveServer(make_settings(tmp_path / "data", proof="off")) as server:
        yield server
        server.check_at_rest()


@pytest.fixture
def overflowing(adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    """Finite numbers whose products are not."""
    folder = tmp_path / "overflowing"
    shutil.copytree(adapter_folders["green"], folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: torch.full_like(one, 3e38) for key, one in load_file(weights).items()}, weights)
    return folder


def push(client: httpx2.Client, folder: Path) -> str:
    return client.post("/v1/adapters", data={"name": "sql"}, files=parts_of(folder)).json()["id"]


def ask(client: httpx2.Client, user: str, **body) -> httpx2.Response:
    body = {"model": "prod", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "user": user, **body}
    return client.post("/v1/completions", json=body)


def test_a_version_that_fails_is_taken_out(unproven: LiveServer, adapter_folders: dict[str, Path], overflowing: Path):
    client = unproven.client
    pushed = [push(client, folder) for folder in (adapter_folders["green"], overflowing, adapter_folders["grey"])]
    assert pushed == ["sql@1", "sql@2", "sql@3"]
    document = {
        "targets": [{"model": "sql@1", "weight": 90}, {"model": "sql@2", "weight": 10}],
        "sticky_by": "user",
        "shadow": [{"model": "sql@3", "log": True}],
        "fallback": ["sql@1"],
        "guard": {"baseline": "sql@1"},
    }
    assert client.put("/v1/routes/prod", json=document).json()["shares"] == {"sql@1": 0.9, "sql@2": 0.1}
    # The first step of the ramp gives it nothing yet: all users are answered by the old version, and shadowed.
    ramp = {"target": "sql@2", "steps": [0, 100], "every": 3600}
    assert client.post("/v1/routes/prod/ramp", json=ramp).json()["shares"]["sql@2"] == 0.0
    users = [str(number) for number in range(30)]
    assert {ask(client, user).json()["model"] for user in users[:6]} == {"sql@1"}

    def shadows() -> dict:
        (one,) = client.get("/v1/routes/prod").json()["observed_shadows"]
        return one

    unproven.wait_until(lambda: shadows()["answered"] + shadows()["dropped"] == 6, "the shadows' end")
    assert shadows()["answered"] >= 1
    assert shadows()["model"] == "sql@3"

    # The next step: everybody. The first answer is NaN.
    client.post("/v1/routes/prod/ramp", json={**ramp, "steps": [100]})
    broken = ask(client, "0")
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "non_finite_logits")
    unproven.wait_until(lambda: client.get("/v1/routes/prod").json()["who"] == "server", "the rollback")
    after = client.get("/v1/routes/prod").json()
    assert (after["shares"], after["ramp"]) == ({"sql@1": 1.0, "sql@2": 0.0}, None)
    replies = [ask(client, user) for user in users]
    assert {reply.json()["model"] for reply in replies} == {"sql@1"}
    assert not any("x-loraplex-fallback" in reply.headers for reply in replies)

    event = next(one for one in client.get("/v1/audit").json()["data"] if one["action"] == "route_rollback")
    assert (event["name"], event["who"]) == ("prod", "server")
    assert event["reason"]["target"] == "sql@2"
    assert (event["reason"]["kind"], event["reason"]["count"]) == ("non_finite", 1)
    assert event["was"]["ramp"]["target"] == "sql@2"
    metrics = client.get("/metrics").text
    assert 'loraplex_route_requests_total{outcome="failed",route="prod",target="sql@2"} 1.0' in metrics
    assert 'loraplex_route_non_finite_total{route="prod",target="sql@2"} 1.0' in metrics
    assert 'loraplex_route_ttft_seconds_count{route="prod",target="sql@1"} 36.0' in metrics
    assert 'target="shadow:sql@3"' in metrics


def test_a_quarantined_target_falls_back(unproven: LiveServer, overflowing: Path):
    client = unproven.client
    assert push(client, overflowing) == "sql@1"
    client.put("/v1/routes/prod", json={"targets": ["sql"], "fallback": ["red"]})
    assert ask(client, "u").status_code == 500
    reply = ask(client, "u")
    assert (reply.json()["model"], reply.headers["x-loraplex-fallback"]) == ("red@1", "sql: adapter_quarantined")


def test_no_request_fails_because_routes_change(unproven: LiveServer):
    """200 changes under traffic: a request sees the old or the new."""
    client = unproven.client
    ways = [
        {"targets": [model], "sticky_by": sticky} for model in ("red", "blue", "base") for sticky in ("user", "none")
    ]
    assert client.put("/v1/routes/prod", json=ways[0]).status_code == 201
    done = threading.Event()
    failures: list[str] = []
    answered: list[str] = []

    def traffic(name: str) -> None:
        with httpx2.Client(base_url=unproven.url, timeout=60) as mine:
            while not done.is_set():
                reply = ask(mine, name, max_tokens=2)
                if reply.status_code == 200:
                    answered.append(reply.json()["model"])
                else:
                    failures.append(reply.text)

    threads = [threading.Thread(target=traffic, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            assert client.put("/v1/routes/prod", json=ways[number % len(ways)]).status_code == 200
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert set(answered) == {"red@1", "blue@1", "base"}
    assert client.get("/v1/routes/prod").json()["revision"] >= 200


def test_a_shadow_gives_way(unproven: LiveServer):
    """A client's request ends it at once; it is tried again, and dropped when there is never room."""
    client = unproven.client
    client.put("/v1/routes/prod", json={"targets": ["red"], "shadow": ["blue"]})
    expected = ask(client, "u", model="red", max_tokens=30).json()["choices"]
    for _ in range(4):
        assert ask(client, "u", max_tokens=30).json()["choices"] == expected

    def ended() -> int:
        (one,) = client.get("/v1/routes/prod").json()["observed_shadows"]
        return one["answered"] + one["dropped"]

    unproven.wait_until(lambda: ended() == 4, "the shadows' end")

"""A route's life over a real socket: a new version gets a tenth of the users, is watched beside a shadow, ramps, fails
and is taken out by the server itself; and routes that change under load."""

import math
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from folders import parts_of
from live import DEADLINE, LiveServer
from safetensors.torch import load_file, save_file

from loraplex.config import Settings

PROMPT = "the quick brown fox"
USERS = [str(number) for number in range(400)]


@pytest.fixture(scope="module")
def shared(make_settings: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with LiveServer(make_settings(tmp_path_factory.mktemp("data"))) as server:
        yield server


@pytest.fixture
def server(shared: LiveServer, adapter_folders: dict[str, Path]) -> Iterator[LiveServer]:
    """Has three versions of sql, and no route when the test ends."""
    client = shared.client
    for folder in ("green", "grey", "red"):
        assert push(client, adapter_folders[folder]).status_code == 201
    yield shared
    for route in client.get("/v1/routes").json()["data"]:
        assert client.delete(f"/v1/routes/{route['alias']}").status_code == 200
    shared.check_at_rest()
    client.delete("/v1/adapters/sql")


def push(client: httpx2.Client, folder: Path) -> httpx2.Response:
    return client.post("/v1/adapters", data={"name": "sql"}, files=parts_of(folder))


def ask(client: httpx2.Client, user: str, **body: Any) -> httpx2.Response:
    body = {"model": "prod", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "user": user, **body}
    return client.post("/v1/completions", json=body)


def arms(client: httpx2.Client, users: Iterable[str]) -> dict[str, str]:
    """Which version answers each user; all are answered, and by no fallback."""

    def arm(user: str) -> str:
        reply = ask(client, user, max_tokens=1)
        assert reply.status_code == 200, reply.text
        assert "x-loraplex-fallback" not in reply.headers
        return reply.json()["model"]

    users = list(users)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(users, pool.map(arm, users), strict=True))


def on_route(client: httpx2.Client) -> dict[str, Any]:
    return client.get("/v1/routes/prod").json()


def on_shadow(client: httpx2.Client) -> dict[str, Any]:
    (one,) = on_route(client)["observed_shadows"]
    return one


def why(client: httpx2.Client) -> dict[str, Any]:
    """The audit's entry of the last rollback of the route."""
    events = client.get("/v1/routes/prod/history").json()["data"]
    event = next(one for one in events if one["action"] == "route_rollback")
    assert (event["name"], event["who"]) == ("prod", "server")
    assert event in client.get("/v1/audit").json()["data"]
    return event


def versions(client: httpx2.Client) -> list[str]:
    """Of sql, as ids, oldest first."""
    return [f"sql@{number}" for number in sorted(client.get("/v1/adapters/sql").json()["versions"])]


def digest_of(server: LiveServer, model: str) -> str:
    (use,) = server.service.resolve(model).uses
    return use.version.digest


class Steps:
    """Calls `before` in front of every step that has a row of `model`."""

    def __init__(self, server: LiveServer, model: str, before: Callable[[], object], patch: pytest.MonkeyPatch):
        digest, execute = digest_of(server, model), server.engine.runner.execute

        def executed(batch):
            if any(digest in entry.seq.digests for entry in batch.entries):
                before()
            return execute(batch)

        patch.setattr(server.engine.runner, "execute", executed)


class Clock:
    """Seconds since the epoch, for ramps."""

    def __init__(self, server: LiveServer, patch: pytest.MonkeyPatch):
        self.now = 1000.0
        patch.setattr(server.service.routes, "_clock", lambda: self.now)


def test_the_story(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    client, clock = server.client, Clock(server, monkeypatch)
    v1, v2, v3 = versions(client)
    document = {
        "targets": [{"model": v1, "weight": 90}, {"model": v2, "weight": 10}],
        "sticky_by": "user",
        "shadow": [{"model": v3, "log": True}],
        "guard": {"baseline": v1},
    }
    assert client.put("/v1/routes/prod", json=document).json()["shares"] == {v1: 0.9, v2: 0.1}

    # A tenth of the users, and always the same ones.
    tenth = arms(client, USERS)
    counts = Counter(tenth.values())
    assert counts.keys() == {v1, v2}
    assert abs(counts[v2] - 0.1 * len(USERS)) <= 3 * math.sqrt(len(USERS) * 0.1 * 0.9)
    seen = {one["model"]: one for one in on_route(client)["observed"]}
    assert {model: one["answered"] for model, one in seen.items()} == counts
    assert seen[v2]["observed_share"] == pytest.approx(counts[v2] / len(USERS), abs=1e-6)
    new = {user for user, model in tenth.items() if model == v2}
    sample = [*USERS[:40], *new]
    assert arms(client, sample) == {user: tenth[user] for user in sample}

    # The shadow is seen, and changes no answer.
    asked = len(USERS) + len(sample)
    server.wait_until(lambda: on_shadow(client)["answered"] + on_shadow(client)["dropped"] == asked, "the shadows' end")
    assert (on_shadow(client)["model"], on_shadow(client)["requests"]) == (v3, asked)
    assert on_shadow(client)["answered"] >= 1
    text = {model: ask(client, "", model=model).json()["choices"] for model in (v1, v2, v3)}
    assert text[v1] != text[v3] != text[v2]
    for user in sample[:10] + sample[-10:]:
        assert ask(client, user).json()["choices"] == text[tenth[user]]
    assert f'loraplex_route_requests_total{{outcome="answered",route="prod",target="shadow:{v3}"}}' in metrics(client)

    # The ramp takes more users to the new version, and none of them back.
    ramp = {"target": v2, "steps": [10, 50, 100], "every": 600}
    assert client.post("/v1/routes/prod/ramp", json=ramp).json()["shares"] == {v1: 0.9, v2: 0.1}
    assert arms(client, sample) == {user: tenth[user] for user in sample}
    clock.now += 600
    half = arms(client, USERS)
    assert abs(Counter(half.values())[v2] - 0.5 * len(USERS)) <= 3 * math.sqrt(len(USERS) * 0.25)
    assert new < {user for user, model in half.items() if model == v2}

    # It goes bad. One request fails; the route goes back by itself and says why.
    server.engine.cache.peek(digest_of(server, v2)).slab.fill_(3e38)
    victim = next(iter(new))
    broken = ask(client, victim)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "non_finite_logits")
    server.wait_until(lambda: on_route(client)["who"] == "server", "the rollback")
    after = on_route(client)
    assert (after["shares"], after["ramp"]) == ({v1: 1.0, v2: 0.0}, None)
    assert set(arms(client, USERS[:100] + [victim]).values()) == {v1}
    event = why(client)
    assert (event["reason"]["target"], event["reason"]["kind"], event["reason"]["count"]) == (v2, "non_finite", 1)
    assert (event["was"]["ramp"]["target"], event["now"]["ramp"]) == (v2, None)
    figures = metrics(client)
    assert f'loraplex_route_requests_total{{outcome="failed",route="prod",target="{v2}"}} 1.0' in figures
    assert f'loraplex_route_non_finite_total{{route="prod",target="{v2}"}} 1.0' in figures
    assert f'loraplex_route_ttft_seconds_count{{route="prod",target="{v1}"}}' in figures
    assert client.get(f"/v1/adapters/{v2}").json()["state"] == "quarantined"


def metrics(client: httpx2.Client) -> str:
    return client.get("/metrics").text


def guarded(client: httpx2.Client, **guard: Any) -> tuple[str, str]:
    """prod leads to two versions of sql in equal shares: the baseline's name, and the other's."""
    v1, v2, _ = versions(client)
    document = {"targets": [v1, v2], "sticky_by": "user", "guard": {"baseline": v1, "min_requests": 8, **guard}}
    assert client.put("/v1/routes/prod", json=document).status_code == 201
    return v1, v2


def ask_until_rolled_back(client: httpx2.Client) -> list[httpx2.Response]:
    """Requests of ever new users, until the server has changed the route."""
    replies = []
    while on_route(client)["who"] != "server":
        replies.append(ask(client, f"user {len(replies)}", max_tokens=3))
        assert len(replies) < 200, "nothing is taken out"
    return replies


def test_too_many_errors_take_a_target_out(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    """Its files cannot be read any more."""
    v1, v2 = guarded(server.client, max_error_rate=0.25)
    bad, read = digest_of(server, v2), server.engine.loads._read

    def spoilt(digest, *rest):
        if digest == bad:
            raise OSError(5, "the disk has lost it")
        return read(digest, *rest)

    monkeypatch.setattr(server.engine.loads, "_read", spoilt)
    server.call(server.service.engine.command("evict", digests=[bad]))
    replies = ask_until_rolled_back(server.client)
    assert Counter(reply.status_code for reply in replies).keys() == {200, 500}
    reason = why(server.client)["reason"]
    assert reason["requests"] == 8, "as few as the guard must see"
    assert (reason["target"], reason["kind"], reason["rate"], reason["limit"]) == (v2, "error_rate", 1.0, 0.25)
    assert set(arms(server.client, USERS[:50]).values()) == {v1}


def test_a_slow_target_is_taken_out(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    v1, v2 = guarded(server.client, max_latency_ratio=4)
    arms(server.client, USERS[:20])  # what is loaded, is loaded
    Steps(server, v2, lambda: threading.Event().wait(0.1), monkeypatch)
    replies = ask_until_rolled_back(server.client)
    assert all(reply.status_code == 200 for reply in replies)
    reason = why(server.client)["reason"]
    assert (reason["target"], reason["kind"], reason["max_ratio"]) == (v2, "latency", 4.0)
    assert reason["p95"] > 4 * reason["baseline_p95"]
    assert min(reason["requests"], reason["baseline_requests"]) >= 8
    assert set(arms(server.client, USERS[:50]).values()) == {v1}


def test_a_ramp_by_real_time(server: LiveServer):
    client = server.client
    v1, v2, _ = versions(client)
    client.put("/v1/routes/prod", json={"targets": [v1, {"model": v2, "weight": 0}], "sticky_by": "user"})
    client.post("/v1/routes/prod/ramp", json={"target": v2, "steps": [0, 100], "every": 0.5})
    answered: list[str] = []

    def has_changed() -> bool:
        answered.append(ask(client, "u", max_tokens=1).json()["model"])
        return answered[-1] == v2

    server.wait_until(has_changed, "the ramp's second step")
    assert set(answered[:-1]) <= {v1}
    assert set(arms(client, USERS[:20]).values()) == {v2}
    assert on_route(client)["ramp"]["steps"] == [0.0, 100.0], "a ramp at its end is still what it was"


def test_a_quarantined_target_falls_back(
    make_settings: Callable[..., Settings], adapter_folders: dict[str, Path], tmp_path: Path
):
    """A server that proves nothing accepts finite numbers whose products are not."""
    folder = tmp_path / "overflowing"
    shutil.copytree(adapter_folders["green"], folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: torch.full_like(one, 3e38) for key, one in load_file(weights).items()}, weights)
    with LiveServer(make_settings(tmp_path / "data", proof="off")) as unproven:
        client = unproven.client
        assert push(client, folder).json()["id"] == "sql@1"
        client.put("/v1/routes/prod", json={"targets": ["sql"], "fallback": ["red"]})
        assert ask(client, "u").status_code == 500
        reply = ask(client, "u")
        assert (reply.json()["model"], reply.headers["x-loraplex-fallback"]) == ("red@1", "sql: adapter_quarantined")
        unproven.check_at_rest()


def change(client: httpx2.Client, number: int) -> httpx2.Response:
    """One of the ways to change prod, in turn."""
    model = ("red", "blue", "base")[number % 3]
    match number % 5:
        case 0 | 1:
            targets = [{"model": one, "weight": 1 + number * (one == model)} for one in ("red", "blue", "base")]
            sticky = ("user", "none")[number % 2]
            return client.put("/v1/routes/prod", json={"targets": targets, "sticky_by": sticky})
        case 2:
            return client.post("/v1/routes/prod/promote", json={"target": model})
        case 3:
            ramp = {"target": model, "steps": [number % 50, 100], "every": 0.2}
            weights = [{"model": one, "weight": 1 + number} for one in ("red", "blue", "base")]
            assert client.put("/v1/routes/prod", json={"targets": weights}).is_success
            return client.post("/v1/routes/prod/ramp", json=ramp)
        case _:
            return client.post("/v1/routes/prod/rollback")


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=pytest.mark.slow)])
def test_no_request_fails_because_routes_change(server: LiveServer, seconds: float):
    """200 changes, spread over the time: every request sees the old or the new."""
    client = server.client
    assert client.put("/v1/routes/prod", json={"targets": ["red"]}).status_code == 201
    done = threading.Event()
    failures: list[str] = []
    answered: Counter[str] = Counter()

    def traffic(name: str) -> None:
        with httpx2.Client(base_url=server.url, timeout=60) as mine:
            while not done.is_set():
                reply = ask(mine, name, max_tokens=2, stream=name == "c")
                if reply.status_code == 200 and '"error"' not in reply.text:
                    answered[reply.headers.get("x-loraplex-adapter", "base")] += 1
                else:
                    failures.append(reply.text)

    threads = [threading.Thread(target=traffic, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    try:
        for number in range(200):
            reply = change(client, number)
            assert reply.status_code == 200, reply.text
            done.wait(seconds / 200)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]
    assert answered.keys() == {"red@1", "blue@1", "base"}
    assert answered.total() >= 200
    assert on_route(client)["revision"] >= 200


def test_a_shadow_in_flight_is_ended_by_a_client(server: LiveServer, monkeypatch: pytest.MonkeyPatch):
    """While it stands in a step, a request comes: it is aborted, and tried again afterwards."""
    client = server.client
    v1, v2, _ = versions(client)
    client.put("/v1/routes/prod", json={"targets": [v1], "shadow": [v2]})
    expected = ask(client, "u", model=v1).json()["choices"]
    stands, may_go = threading.Event(), threading.Event()

    def stand() -> None:
        stands.set()
        assert may_go.wait(DEADLINE)

    Steps(server, v2, stand, monkeypatch)
    with ThreadPoolExecutor() as pool:
        try:
            assert ask(client, "u").json()["choices"] == expected
            assert stands.wait(DEADLINE)
            asked = pool.submit(ask, client, "u")
            server.wait_until(lambda: on_shadow(client)["aborted"] == 1, "the shadow's end")
        finally:
            may_go.set()
        assert asked.result().json()["choices"] == expected
    server.wait_until(lambda: on_shadow(client)["answered"] == 2, "the shadows' end")
    seen = on_shadow(client)
    assert (seen["requests"], seen["aborted"], seen["dropped"]) == (2, 1, 0)
    figures = metrics(client)
    for outcome, count in (("answered", 2), ("aborted", 1)):
        assert f'requests_total{{outcome="{outcome}",route="prod",target="shadow:{v2}"}} {count}.0' in figures


def test_a_shadow_that_never_finds_room_is_dropped(server: LiveServer):
    """It is tried again when it has given way, and dropped when there is never room."""
    client = server.client
    client.put("/v1/routes/prod", json={"targets": ["red"], "shadow": ["blue"]})
    expected = ask(client, "u", model="red", max_tokens=30).json()["choices"]
    for _ in range(4):
        assert ask(client, "u", max_tokens=30).json()["choices"] == expected
    server.wait_until(
        lambda: sum(on_shadow(client)[outcome] for outcome in ("answered", "dropped")) == 4, "the shadows' end"
    )


def test_a_shadows_name_that_became_an_alias(server: LiveServer, adapter_folders: dict[str, Path]):
    """No shadow is a request of another route."""
    client = server.client
    files = parts_of(adapter_folders["green"])
    assert client.post("/v1/adapters", data={"name": "ghost"}, files=files).status_code == 201
    client.put("/v1/routes/prod", json={"targets": ["red"], "shadow": ["ghost"]})
    client.delete("/v1/adapters/ghost")
    client.put("/v1/routes/ghost", json={"targets": ["blue"]})
    assert ask(client, "u").status_code == 200
    server.wait_until(lambda: on_shadow(client)["unavailable"] == 1, "the shadow's end")
    (seen,) = client.get("/v1/routes/ghost").json()["observed"]
    assert seen["requests"] == 0

"""Routes over a real socket: who answers, what is said of it, and how routes change."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from folders import parts_of
from live import LiveServer, assert_error

from loraplex.config import Settings

PROMPT = "the quick brown"


@pytest.fixture
def routed(client: httpx2.Client) -> Iterator[httpx2.Client]:
    """The shared server; its routes are gone afterwards."""
    yield client
    for route in client.get("/v1/routes").json()["data"]:
        assert client.delete(f"/v1/routes/{route['alias']}").status_code == 200


def ask(client: httpx2.Client, model: str, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 3, "temperature": 0, **body}
    return client.post("/v1/completions", json=asked, headers=headers)


def answered(reply: httpx2.Response) -> str:
    assert reply.status_code == 200, reply.text
    return reply.json()["model"]


def put(client: httpx2.Client, alias: str, **document: Any) -> httpx2.Response:
    reply = client.put(f"/v1/routes/{alias}", json=document)
    assert reply.status_code in (200, 201), reply.text
    return reply


def test_a_route_is_a_model(routed: httpx2.Client):
    made = put(routed, "new", targets=["red"])
    assert (made.status_code, made.headers["etag"], made.json()["revision"]) == (201, '"1"', 1)
    assert made.json()["shares"] == {"red": 1.0}
    reply = ask(routed, "new")
    assert answered(reply) == "red@1"
    assert reply.json()["choices"] == ask(routed, "red").json()["choices"]
    assert (reply.headers["x-loraplex-route"], reply.headers["x-loraplex-adapter"]) == ("new", "red@1")
    assert "x-loraplex-fallback" not in reply.headers
    assert "x-loraplex-route" not in ask(routed, "red").headers
    with routed.stream("POST", "/v1/completions", json={"model": "new", "prompt": "a", "stream": True}) as stream:
        assert stream.headers["x-loraplex-route"] == "new"
        stream.read()
    assert "new" in [card["id"] for card in routed.get("/v1/models").json()["data"]]
    assert routed.get("/v1/models/new").json()["targets"] == ["red"]
    assert routed.post("/tokenize", json={"model": "new", "prompt": "a b"}).json()["count"] > 0


def test_a_user_stays_and_users_spread(routed: httpx2.Client):
    put(routed, "shop", targets=[{"model": "red", "weight": 1}, {"model": "blue", "weight": 1}], sticky_by="user")
    first = {user: answered(ask(routed, "shop", user=user)) for user in map(str, range(24))}
    assert set(first.values()) == {"red@1", "blue@1"}
    assert {user: answered(ask(routed, "shop", user=user)) for user in first} == first
    seen = routed.get("/v1/routes/shop").json()
    assert sum(one["requests"] for one in seen["observed"]) == 48
    counts = Counter(first.values())
    for one in seen["observed"]:
        assert one["desired_share"] == 0.5
        assert one["observed_share"] == pytest.approx(counts[f"{one['model']}@1"] / 24)
        assert one["answered"] == one["requests"]
        assert (one["failed"], one["error_rate"], one["running"]) == (0, 0.0, 0)
        assert 0 < one["ttft"]["p50"] <= one["ttft"]["p95"]
        assert 0 < one["inter_token"]["p50"] <= one["inter_token"]["p95"]


def test_targets_can_be_the_base_a_version_or_a_sum(routed: httpx2.Client):
    for target, expected in (("base", "base"), ("red@1", "red@1"), ("blue:0.5", "blue@1:0.5")):
        put(routed, "desk", targets=[target])
        assert answered(ask(routed, "desk")) == expected


def test_names_are_taken_both_ways(routed: httpx2.Client, adapter_folders: dict[str, Path]):
    put(routed, "front", targets=["red"])
    for alias, word in (("red", "adapter"), ("base", "base model")):
        refused = routed.put(f"/v1/routes/{alias}", json={"targets": ["blue"]})
        assert_error(refused, 409, "adapter_conflict", word)
    files = parts_of(adapter_folders["green"])
    refused = routed.post("/v1/adapters", data={"name": "front"}, files=files)
    assert_error(refused, 409, "adapter_conflict", "route")
    assert routed.delete("/v1/routes/front").json() == {"alias": "front", "deleted": True, "revision": 2}
    assert routed.post("/v1/adapters", data={"name": "front"}, files=files).status_code == 201
    assert_error(routed.put("/v1/routes/front", json={"targets": ["red"]}), 409, "adapter_conflict")
    assert routed.delete("/v1/adapters/front").status_code == 200
    assert put(routed, "front", targets=["red"]).json()["revision"] == 3


@pytest.mark.parametrize(
    ("document", "param", "text"),
    [
        ({"targets": []}, "targets", "1 to"),
        ({"targets": ["red", "red"]}, "targets", "twice"),
        ({"targets": [{"model": "red", "weight": 0}]}, "targets", "no weight"),
        ({"targets": [{"model": "red", "wieght": 3}]}, "targets", "wieght"),
        ({"targets": ["nobody"]}, "targets", "nobody"),
        ({"targets": ["red"], "fallback": ["red@9"]}, "targets", "no version 9"),
        ({"targets": ["red"], "sticky_by": "moon"}, "sticky_by", "header:NAME"),
        ({"targets": ["red"], "rules": [{"header": "x", "target": "red"}]}, "rules", "exact"),
        ({"targets": ["red"], "rules": [{"header": "x", "regex": "(", "target": "red"}]}, "rules", "compile"),
        ({"targets": ["red"], "rules": [{"header": "x", "exact": "a", "target": "blue"}]}, "rules", "none of"),
        ({"targets": ["red"], "ramp": {"target": "red"}}, "ramp", "another target"),
        ({"targets": ["red"], "guard": {"baseline": "blue"}}, "guard", "none of"),
        ({"targets": ["red"], "mirror": "blue"}, "body", "mirror"),
        ({"targets": "red"}, "body", "list"),
        ([], "body", "object"),
    ],
)
def test_what_fits_no_route_is_refused_by_name(routed: httpx2.Client, document: Any, param: str, text: str):
    reply = routed.put("/v1/routes/none", json=document)
    error = assert_error(reply, 400, reply.json()["error"]["code"], text, param=param)
    assert error["code"] in ("invalid_route", "unknown_target")
    assert_error(routed.get("/v1/routes/none"), 404, "model_not_found", "no route")
    assert_error(ask(routed, "none"), 404, "model_not_found")


def test_routes_do_not_lead_to_routes(routed: httpx2.Client):
    put(routed, "nested", targets=["red"])
    assert_error(routed.put("/v1/routes/more", json={"targets": ["nested"]}), 400, "invalid_route", "do not lead")


def test_a_change_of_what_was_seen(routed: httpx2.Client):
    """Compare and swap by ETag."""
    first = put(routed, "cas", targets=["red"])
    tag = {"If-Match": first.headers["etag"]}
    second = routed.put("/v1/routes/cas", json={"targets": ["blue"]}, headers=tag)
    assert (second.status_code, second.headers["etag"]) == (200, '"2"')
    for method, path in (("put", ""), ("post", "/promote"), ("post", "/rollback"), ("delete", "")):
        body = (
            {} if method == "delete" else {"json": {"target": "blue"} if path == "/promote" else {"targets": ["red"]}}
        )
        if path == "/rollback":
            body = {"json": {}}
        refused = getattr(routed, method)(f"/v1/routes/cas{path}", headers=tag, **body)
        assert_error(refused, 412, "route_changed", "revision 2", "not 1")
    new = {"If-None-Match": "*"}
    assert_error(routed.put("/v1/routes/cas", json={"targets": ["red"]}, headers=new), 412, "route_changed")
    assert routed.put("/v1/routes/other", json={"targets": ["red"]}, headers=new).status_code == 201
    bad = routed.put("/v1/routes/cas", json={"targets": ["red"]}, headers={"If-Match": "new"})
    assert_error(bad, 400, "invalid_request", "ETag")
    same = put(routed, "cas", targets=["blue"])
    assert same.headers["etag"] == '"2"', "what says the same is no change"


def test_promote_ramp_and_back(routed: httpx2.Client):
    two = [{"model": "red", "weight": 9}, {"model": "blue", "weight": 1}]
    put(routed, "way", targets=two, sticky_by="user")
    ramped = routed.post("/v1/routes/way/ramp", json={"target": "blue", "steps": [0, 100], "every": 3600}).json()
    assert (ramped["revision"], ramped["shares"]) == (2, {"red": 1.0, "blue": 0.0})
    assert answered(ask(routed, "way", user="u")) == "red@1"
    promoted = routed.post("/v1/routes/way/promote", json={"target": "blue"}).json()
    assert (promoted["shares"], promoted["ramp"]) == ({"red": 0.0, "blue": 1.0}, None)
    assert answered(ask(routed, "way", user="u")) == "blue@1"
    assert_error(routed.post("/v1/routes/way/promote", json={"target": "green"}), 400, "invalid_route", "green")
    back = routed.post("/v1/routes/way/rollback").json()
    assert (back["revision"], back["ramp"], back["shares"]) == (4, None, {"red": 0.9, "blue": 0.1})
    again = routed.post("/v1/routes/way/rollback").json()
    assert (again["revision"], again["shares"]) == (5, {"red": 0.9, "blue": 0.1})
    assert_error(routed.post("/v1/routes/way/rollback"), 409, "adapter_conflict", "nothing to roll back to")
    to = routed.post("/v1/routes/way/rollback", json={"revision": 3}).json()
    assert to["shares"] == {"red": 0.0, "blue": 1.0}
    history = routed.get("/v1/routes/way/history").json()
    assert [event["action"] for event in history["data"]][:6] == [
        *("route_rollback",) * 3,
        "route_promote",
        "route_ramp",
        "route_set",
    ]
    assert history["data"][0]["who"] == "local"
    assert history["data"][3]["was"]["ramp"]["target"] == "blue"
    assert history["data"][3]["now"]["ramp"] is None


def test_rules_come_before_weights(routed: httpx2.Client):
    put(
        routed,
        "tier",
        targets=["red", {"model": "blue", "weight": 0}, {"model": "base", "weight": 0}],
        rules=[
            {"header": "X-Tier", "exact": "gold", "target": "blue"},
            {"metadata": "plan", "prefix": "trial-", "target": "base"},
            {"header": "x-build", "regex": r"v2\.\d+", "target": "blue"},
        ],
    )
    assert answered(ask(routed, "tier")) == "red@1"
    assert answered(ask(routed, "tier", headers={"x-tier": "gold"})) == "blue@1"
    assert answered(ask(routed, "tier", headers={"x-tier": "golden"})) == "red@1"
    assert answered(ask(routed, "tier", metadata={"plan": "trial-7"})) == "base"
    assert answered(ask(routed, "tier", headers={"x-build": "v2.17"})) == "blue@1"
    assert answered(ask(routed, "tier", headers={"x-build": "v2.17b"})) == "red@1"
    seen = {one["model"]: one for one in routed.get("/v1/routes/tier").json()["observed"]}
    assert (seen["blue"]["by_rule"], seen["base"]["by_rule"], seen["red"]["by_rule"]) == (2, 1, 0)
    assert seen["red"]["observed_share"] == 1.0, "what rules led elsewhere has no part in it"


def test_a_fallback_answers_for_what_is_missing_and_says_so(routed: httpx2.Client, adapter_folders: dict[str, Path]):
    files = parts_of(adapter_folders["green"])
    assert routed.post("/v1/adapters", data={"name": "short"}, files=files).status_code == 201
    put(routed, "spare", targets=["short"], fallback=["short@1", "blue"])
    assert answered(ask(routed, "spare")).startswith("short@")
    routed.delete("/v1/adapters/short")
    reply = ask(routed, "spare")
    assert answered(reply) == "blue@1"
    assert (reply.headers["x-loraplex-route"], reply.headers["x-loraplex-fallback"]) == (
        "spare",
        "short: model_not_found",
    )
    (seen,) = routed.get("/v1/routes/spare").json()["observed"]
    assert (seen["requests"], seen["answered"], seen["unavailable"]) == (2, 1, 1)
    put(routed, "bare", targets=["red"])
    assert_error(routed.put("/v1/routes/bare", json={"targets": ["short"]}), 400, "unknown_target")


def test_a_target_over_its_limit(routed: httpx2.Client):
    put(routed, "full", targets=[{"model": "red", "max_running": 0}])
    refused = ask(routed, "full")
    assert_error(refused, 503, "overloaded", "'full'", "at once")
    assert refused.headers["retry-after"] == "1"
    put(routed, "full", targets=[{"model": "red", "max_running": 0}], fallback=["base"])
    reply = ask(routed, "full")
    assert (answered(reply), reply.headers["x-loraplex-fallback"]) == ("base", "red: over_limit")


def test_routes_are_there_after_a_restart(make_settings: Callable[..., Settings], tmp_path: Path):
    for start in range(2):
        with LiveServer(make_settings(tmp_path)) as server:
            if start == 0:
                put(server.client, "kept", targets=["red", "blue"], sticky_by="user")
                before = server.client.get("/v1/routes").json()
                users = {user: answered(ask(server.client, "kept", user=user)) for user in "abcdef"}
                continue
            assert server.client.get("/v1/routes").json() == before
            assert {user: answered(ask(server.client, "kept", user=user)) for user in "abcdef"} == users

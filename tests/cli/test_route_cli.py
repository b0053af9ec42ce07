"""`loraplex route`: against an answer that a server gives, in shape; the server's side is tests/api/test_api_routes."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from loraplex.cli import routes
from loraplex.cli.failures import UsageError

REPLY = {
    "alias": "prod",
    "revision": 3,
    "who": "local",
    "sticky_by": "user",
    "shares": {"sql@3": 0.9, "sql@4": 0.1},
    "rules": [],
    "fallback": ["sql@3"],
    "shadow": [],
    "ramp": None,
    "guard": None,
    "gate": None,
    "deleted": True,
}
SEEN = {"observed_share": 0.5, "requests": 2, "failed": 1, "unavailable": 0}
TIMES = {"ttft": {"p50": 0.01, "p95": 0.1}, "inter_token": {"p50": None, "p95": None}}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    sent: list[tuple[Any, ...]] = []

    def answer(method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        sent.append((method, path, kwargs))
        if path == "/v1/routes":
            return {"data": [REPLY]}
        observed = [{"model": "sql@3", **SEEN, **TIMES}] if method == "GET" else []
        return {**REPLY, "observed": observed}

    monkeypatch.setattr(routes, "request", answer)
    return sent


def run(*arguments: str) -> str:
    done = CliRunner().invoke(routes.app, list(arguments), env={"COLUMNS": "200"})
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_set_writes_the_route(sent):
    out = run(
        "set",
        "prod",
        "sql@3=90",
        "sql@4",
        "--sticky-by",
        "user",
        "--fallback",
        "base",
        "--guard",
        "sql@3",
        "--gate",
        "0.9",
    )
    assert out.startswith("prod  revision 3 by local, sticky by user")
    assert "90 %" in out
    assert 'fallback: ["sql@3"]' in out
    assert sent == [
        (
            "PUT",
            "/v1/routes/prod",
            {
                "json": {
                    "targets": [{"model": "sql@3", "weight": 90.0}, {"model": "sql@4", "weight": 1.0}],
                    "sticky_by": "user",
                    "fallback": ["base"],
                    "shadow": [],
                    "guard": {"baseline": "sql@3"},
                    "gate": {"min_pass": 0.9},
                }
            },
        )
    ]


def test_a_route_from_a_file(sent, tmp_path):
    file = tmp_path / "route.json"
    file.write_text('{"targets": ["a"]}')
    assert json.loads(run("set", "prod", "--file", str(file), "--json"))["alias"] == "prod"
    assert sent[0][2] == {"json": {"targets": ["a"]}}
    for wrong in (["set", "prod"], ["set", "prod", "a", "--file", str(file)], ["set", "prod", "a=x"]):
        with pytest.raises(UsageError):
            run(*wrong)


def test_the_other_verbs(sent):
    run("ramp", "prod", "sql@4", "--steps", "1,10,100", "--every", "60")
    run("promote", "prod", "sql@4")
    run("rollback", "prod")
    run("rollback", "prod", "--to", "2")
    assert run("rm", "prod") == "deleted the route prod\n"
    assert [(method, path, kwargs.get("json")) for method, path, kwargs in sent] == [
        ("POST", "/v1/routes/prod/ramp", {"target": "sql@4", "steps": [1.0, 10.0, 100.0], "every": 60.0}),
        ("POST", "/v1/routes/prod/promote", {"target": "sql@4"}),
        ("POST", "/v1/routes/prod/rollback", {}),
        ("POST", "/v1/routes/prod/rollback", {"revision": 2}),
        ("DELETE", "/v1/routes/prod", None),
    ]
    with pytest.raises(UsageError, match="per cents"):
        run("ramp", "prod", "sql@4", "--steps", "a,b")


def test_show(sent):
    one = run("show", "prod", "--window", "60")
    assert all(word in one for word in ("50 %", "10 ms / 100 ms", "- / -"))
    assert sent[0][2] == {"params": {"window": 60.0}}
    assert "sql@3=90%  sql@4=10%" in run("show")

"""`loraplex compare`: against an answer that a server gives, in shape; the server's side is
tests/api/test_api_compare."""

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loraplex.cli import compare

ERROR = {"message": "'sick@1' is in quarantine [since] today", "code": "adapter_quarantined"}
REPLY = {
    "base": "demo-base",
    "answers": [
        {
            "target": "sql",
            "model": "sql@3",
            "text": "[b]SELECT[/b]",
            "tokens": 4,
            "finish_reason": "stop",
            "divergence": {"mean": 0.12345, "max": 0.5, "positions": 4},
            "error": None,
        },
        {"target": "sick", "model": None, "text": None, "tokens": 0, "finish_reason": None, "divergence": None},
        {
            "target": "pig",
            "model": "pig@1",
            "text": "",
            "tokens": 0,
            "finish_reason": "stop",
            "divergence": None,
            "error": None,
        },
    ],
    "logprobs": {
        "scorers": ["sql@3", "sick", "pig@1", "demo-base"],
        "sum": [[-1.0, None, -8.0, -6.0], [None] * 4, [0.0, None, 0.0, 0.0]],
        "per_token": [[-0.25, None, -2.0, -1.5], [None] * 4, [None] * 4],
    },
}
REPLY["answers"][1]["error"] = ERROR


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    sent: list[tuple[Any, ...]] = []

    def answer(method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        sent.append((method, path, kwargs["json"]))
        return REPLY

    monkeypatch.setattr(compare, "request", answer)
    return sent


def run(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(compare.compare)
    done = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_tables(sent):
    out = run("-m", "sql", "-m", "sick", "--model", "pig", "the queen")
    assert all(word in out for word in ("[b]SELECT[/b]", "0.1235 (max 0.5)", "nats from demo-base", "[since]"))
    assert "-8.00 (-2.000)" in out
    last = [line.split() for line in out.splitlines() if "pig@1" in line][-1]
    assert [cell for cell in last if cell != "│"] == ["pig@1", "0.00", "-", "0.00", "0.00"]
    assert sent == [("POST", "/v1/compare", {"targets": ["sql", "sick", "pig"], "prompt": "the queen"})]


def test_a_chat_as_json(sent):
    out = run("a", "-m", "x", "-m", "y", "--chat", "--max-tokens", "5", "--temperature", "0", "--seed", "1", "--json")
    assert json.loads(out) == REPLY
    messages = [{"role": "user", "content": "a"}]
    asked = {"targets": ["x", "y"], "messages": messages, "max_tokens": 5, "temperature": 0.0, "seed": 1}
    assert sent[0][2] == asked

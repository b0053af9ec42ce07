"""`loraplex route eval`: against answers that a server gives, in shape; the server's side is
tests/api/test_api_evaluations."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loraplex.cli import adapters, evaluations, routes
from loraplex.cli.failures import UsageError

URL = "/v1/routes/prod/evaluation"
FAILURE = {"line": 7, "name": None, "check": "exact", "prompt": "[a]", "answer": "b" * 300, "why": "it is another text"}
REPORT = {
    "targets": [
        {
            "model": "sql@3",
            "passed": 9,
            "total": 10,
            "pass_rate": 0.9,
            "errors": 0,
            "failures": [FAILURE],
            "failures_left_out": 0,
        },
        {
            "model": "sql@4",
            "passed": 4,
            "total": 10,
            "pass_rate": 0.4,
            "errors": 2,
            "failures": [{**FAILURE, "answer": None}],
            "failures_left_out": 5,
        },
    ]
}
RUN = {"id": "0f", "state": "running", "done": 3, "total": 20, "set_revision": 2, "report": None}
SET = {
    "alias": "prod",
    "revision": 2,
    "cases": 10,
    "who": "local",
    "deleted": True,
    "gate": {"min_pass": 0.5},
    "targets": [
        {"model": "sql@3", "share": 0.9, "passed": 9, "total": 10, "pass_rate": 0.9, "closed": None},
        {
            "model": "sql@4",
            "share": 0.1,
            "passed": None,
            "total": None,
            "pass_rate": None,
            "closed": "has not been run",
        },
    ],
    "run": RUN,
}


class Answers:
    """What was sent; the run is seen running once, then as `ended`."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []
        self.ended: dict[str, Any] = {**RUN, "state": "done", "done": 20, "report": REPORT}
        self._looks = 0

    def request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        self.sent.append((method, path, kwargs.get("json", kwargs.get("content"))))
        if "/runs" not in path:
            return SET
        self._looks += method == "GET"
        return RUN if method == "POST" or self._looks == 1 and path.endswith("0f") else self.ended

    @contextmanager
    def download(self, path: str) -> Iterator[Any]:
        self.sent.append(("GET", path, None))
        yield SimpleNamespace(iter_bytes=lambda: iter([b'{"prompt"', b": 1}\n"]))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers = Answers()
    monkeypatch.setattr(evaluations, "request", answers.request)
    monkeypatch.setattr(evaluations, "download", answers.download)
    monkeypatch.setattr(evaluations, "_POLL_SECONDS", 0.0)
    return answers


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(routes.app, ["eval", *arguments], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit | typer.Exit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout


def test_put_and_show(answers: Answers, tmp_path: Path):
    file = tmp_path / "set.jsonl"
    file.write_bytes(b"{}\n")
    assert run("put", "prod", str(file)) == "prod: 10 cases, revision 2 of the set\n"
    out = run("show", "prod")
    assert out.startswith("prod: 10 cases, revision 2 by local, gate at 0.5\n")
    assert all(
        word in out for word in ("9 of 10", "90 %", "open", "has not been run", "latest run: 0f, running, 3 of 20")
    )
    assert run("lines", "prod") == '{"prompt": 1}\n'
    assert run("rm", "prod") == "deleted the evaluation set of prod\n"
    assert [one[:2] for one in answers.sent] == [("PUT", URL), ("GET", URL), ("GET", f"{URL}/lines"), ("DELETE", URL)]
    assert answers.sent[0][2] == b"{}\n"
    with pytest.raises(UsageError, match="cannot be read"):
        run("put", "prod", str(tmp_path / "none"))


def test_a_run_is_waited_for_and_judged(answers: Answers):
    out = run("run", "prod", "--target", "sql@3", "--target", "sql@4", code=1)
    assert all(word in out for word in ("0f  done, 20 of 20", "9 of 10", "40 %", "[a]", "another text", "5 more"))
    assert answers.sent[0] == ("POST", f"{URL}/runs", {"targets": ["sql@3", "sql@4"]})
    assert answers.sent[-1][:2] == ("GET", URL), "for the gate"
    run("run", "prod", "--min-pass", "0.4")
    assert json.loads(run("run", "prod", "--min-pass", "0.4", "--json"))["report"] == REPORT
    answers.ended = {**RUN, "state": "cancelled"}
    assert "0f  cancelled, 3 of 20" in run("run", "prod", "--min-pass", "0", code=1)


def test_a_run_that_is_left_alone(answers: Answers):
    assert run("run", "prod", "--no-wait").startswith("0f  0 of 20")
    assert json.loads(run("run", "prod", "--no-wait", "--json")) == RUN
    assert "0f  running" in run("report", "prod", "0f")
    assert "done, 20 of 20" in run("report", "prod")
    assert run("cancel", "prod", "0f") == "0f  done, 20 of 20\n"
    assert [one[:2] for one in answers.sent[2:]] == [
        ("GET", f"{URL}/runs/0f"),
        ("GET", f"{URL}/runs/latest"),
        ("DELETE", f"{URL}/runs/0f"),
    ]


def test_the_history_tells_of_sets(monkeypatch: pytest.MonkeyPatch):
    before = {"cases": 3, "digest": "0123456789ab"}
    row = {"at": "today", "who": "local", "action": "evaluation_set", "name": "prod", "version": 2, "was": None}
    rows = [{**row, "was": before, "now": {**before, "cases": 4}}, {**row, "now": before}]
    monkeypatch.setattr(adapters, "request", lambda *args, **kwargs: {"data": rows, "total": 2})
    app = typer.Typer()
    app.command()(adapters.history)
    out = CliRunner().invoke(app, ["prod"], env={"COLUMNS": "200"}).stdout
    assert "3 cases (01234567)" in out
    assert "4 cases (01234567)" in out

"""What routes cost, in small."""

import json

import pytest
from typer.testing import CliRunner

from loraplex.bench.routing import RoutingBench, RoutingSettings
from loraplex.cli import app


def test_everything_is_measured():
    result = RoutingBench(RoutingSettings(decisions=50, routes=3, targets=4, repeats=2)).run()
    assert result["decisions_us"].keys() == {2, 4, 64}
    assert all(taken.keys() == {"chance", "sticky", "rule"} for taken in result["decisions_us"].values())
    assert result["judgements_us"].keys() == {"errors", "times"}
    assert min(result[name] for name in ("revision_us", "change_ms", "load_ms")) > 0


def test_the_routing_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["bench", "routing", "--decisions", "20", "--routes", "2", "--targets", "3"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "a decision among 3 targets, by sticky" in shown.output
    assert "2 routes of 3 targets" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["settings"]["routes"] == 2

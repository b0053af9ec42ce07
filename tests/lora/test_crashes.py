"""Processes killed with SIGKILL at every named step of upload, deletion and change of version, and what they leave."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from registry_model import RegistryModel

from loraplex.lora.steps import STEPS

PROGRAM = Path(__file__).parent / "crashes.py"

Crash = Callable[[str, int], Counter[str]]


@pytest.fixture
def crash(tmp_path: Path, registry_url: str) -> Crash:
    """Runs the program; returns how often a process was killed at which step."""

    def run(how: str, rounds: int) -> Counter[str]:
        command = [sys.executable, str(PROGRAM), how, str(tmp_path / "data"), registry_url, "7", str(rounds)]
        path = os.pathsep.join([str(PROGRAM.parent), *sys.path])
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
        assert done.returncode == 0, done.stderr[-8000:]
        return Counter(json.loads(done.stdout))

    return run


def test_killed_at_every_step(crash: Crash, registry_url: str):
    """SQLite and PostgreSQL together: 200 kills and more."""
    is_sqlite = registry_url.startswith("sqlite")
    kills = crash("one", 6 if is_sqlite else 3)
    assert len(STEPS) >= 15
    assert set(kills) == set(STEPS)
    assert min(kills.values()) >= 1, kills
    assert kills.total() >= (135 if is_sqlite else 65), kills


def test_killed_while_routes_change(crash: Crash, registry_url: str):
    """A hundred kills and more: the last acknowledged routes are there."""
    is_sqlite = registry_url.startswith("sqlite")
    kills = crash("routes", 26 if is_sqlite else 4)
    assert {step.partition(":")[0] for step in kills} == {"route"}
    assert kills.total() >= (100 if is_sqlite else 14), kills


def test_three_processes_killed_on_one_store(crash: Crash):
    assert crash("three", 8).total() >= 8


def test_the_model_of_what_should_be_there():
    """The expectations themselves, on a story that a person can follow."""
    model = RegistryModel()
    for operation in [("push", "a", 0), ("push", "a", 1), ("rollback", "a", None), ("push", "a", 2)]:
        model = model.after(operation)
    assert model.names["a"].live == [1, 3]
    model = model.after(("rollback", "a", None))
    assert model.names["a"].current == 1
    model = model.after(("delete", "a", 1))
    assert model.names["a"].current == 3, "the newest, where there is no other"
    assert model.after(("rollback", "a", 2)).names["a"].live == [2]
    assert model.after(("delete", "a", None)).seen()["names"] == {}
    assert [event[0] for event in model.events] == ["push", "push", "rollback", "push", "rollback", "delete"]


def test_the_model_of_trees():
    model = RegistryModel()
    for operation in [("push", "a", 0), ("child", "a", 1), ("push", "a", 2), ("child", "a", 1), ("child", "b", 1)]:
        model = model.after(operation)
    assert model.names["on-a"].ready == {1: (1, 1), 2: (1, 2)}
    assert "on-b" not in model.names
    assert model.after(("delete", "a", None)).seen() == model.seen(), "others stand on it"
    model = model.after(("prune", "a", 2)).after(("delete", "a", 1)).after(("delete", "a", 2))
    assert model.names["a"].ready == {1: (0, None)}
    assert model.after(("prune", "a", None)).after(("delete", "a", None)).seen()["names"] == {}

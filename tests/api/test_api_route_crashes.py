"""Servers that are killed while routes change come back with the last acknowledged ones."""

import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from processes import DEADLINE, ServerProcess, servers

from forks import Forks

ALIASES = ("prod", "canary", "batch", "eval")
MODELS = ("red", "blue", "base")
GONE = None

State = dict[str, Any] | None
"""What GET says of an alias; None: there is no such route."""


def state_of(reply: dict[str, Any]) -> State:
    """What must not change while nobody changes it."""
    passing = {"observed", "observed_shadows", "window"}
    return {name: value for name, value in reply.items() if name not in passing}


@dataclass
class Known:
    """What a client knows of an alias: `acknowledged`, and what the change it has not heard of would make of it."""

    acknowledged: State = GONE
    revisions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    revision: int = 0
    under_way: Callable[[State], bool] | None = None
    num_changes: int = 0


class Changer(threading.Thread):
    """Changes one alias over and over until the server is gone."""

    def __init__(self, client: httpx2.Client, alias: str, known: Known, seed: int):
        super().__init__(name=alias)
        self._client, self._alias, self._known = client, alias, known
        self._dice = random.Random(seed)
        self.refused: list[str] = []
        self.has_begun = threading.Event()  # a change was acknowledged, or none can be

    def run(self) -> None:
        while self._change():
            self.has_begun.set()
        self.has_begun.set()

    def _change(self) -> bool:
        known, path = self._known, f"/v1/routes/{self._alias}"
        deed = "put" if known.acknowledged is GONE else self._dice.choice(("put", "put", "promote", "back", "delete"))
        body: Any = None
        if deed == "put":
            targets = [{"model": model, "weight": self._dice.randint(1, 10**6)} for model in MODELS]
            expected = weights_of(targets)
            body = {"targets": targets}
        elif deed == "promote":
            chosen = self._dice.choice(MODELS)
            expected = {model: float(model == chosen) for model in MODELS}
            body = {"target": chosen}
        elif deed == "back":
            revision = self._dice.choice(list(known.revisions))
            expected = weights_of(known.revisions[revision])
            body = {"revision": revision}
        else:
            expected = None
        known.under_way = lambda state: (None if state is GONE else weights_of(state["targets"])) == expected
        method = {"put": "PUT", "delete": "DELETE"}.get(deed, "POST")
        verb = {"promote": "/promote", "back": "/rollback"}.get(deed, "")
        try:
            reply = self._client.request(method, path + verb, json=body)
        except httpx2.TransportError:
            return False
        if not reply.is_success:
            self.refused.append(reply.text)
            return False
        self._acknowledge(deed, reply.json())
        return True

    def _acknowledge(self, deed: str, said: dict[str, Any]) -> None:
        self._known.under_way = None
        self._known.num_changes += 1
        learn(self._known, GONE if deed == "delete" else state_of(said), said["revision"])


def learn(known: Known, state: State, revision: int) -> None:
    known.acknowledged, known.revision = state, revision
    if state is not None:
        known.revisions[revision] = state["targets"]


def weights_of(targets: list[dict[str, Any]]) -> dict[str, float]:
    return {one["model"]: float(one["weight"]) for one in targets}


def check(client: httpx2.Client, alias: str, known: Known) -> None:
    """The route is the acknowledged one, or what the change under way makes of it; history and requests agree."""
    reply = client.get(f"/v1/routes/{alias}")
    state = GONE if reply.status_code == 404 else state_of(reply.json())
    if state != known.acknowledged:
        assert known.under_way is not None, f"{alias}: acknowledged {known.acknowledged}, found {state}"
        assert known.under_way(state), f"{alias}: neither before nor after the change under way: {state}"
    history = client.get(f"/v1/routes/{alias}/history", params={"limit": 1})
    events = history.json()["data"] if history.is_success else []
    revision = events[0]["version"] if events else 0
    assert revision == known.revision + (state != known.acknowledged)
    known.under_way = None
    learn(known, state, revision)
    if state is not None:
        assert state["revision"] == revision
        assert events[0]["now"]["targets"] == state["targets"]
    asked = client.post("/v1/completions", json={"model": alias, "prompt": "a", "max_tokens": 1})
    assert asked.status_code == (404 if state is None else 200), asked.text
    if state is not None:
        can = {model for model, weight in weights_of(state["targets"]).items() if weight}
        assert asked.json()["model"].partition("@")[0] in can


def kill_during_changes(server: ServerProcess, known: dict[str, Known], seed: int) -> None:
    dice = random.Random(seed)
    changers = [Changer(server.client, alias, one, dice.randrange(1 << 30)) for alias, one in known.items()]
    for changer in changers:
        changer.start()
    for changer in changers:
        assert changer.has_begun.wait(DEADLINE)
    threading.Event().wait(dice.uniform(0, 0.1))  # the moment is drawn; what is asserted holds at any
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    for changer in changers:
        changer.join()
        assert not changer.refused, changer.refused[0]


@pytest.mark.parametrize("kills", [15, pytest.param(120, marks=pytest.mark.slow)])
def test_a_killed_server_comes_back_with_the_last_acknowledged_routes(
    forks: Forks, base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path, kills: int
):
    known = {alias: Known() for alias in ALIASES}
    flags = ("--adapters", adapter_folders["red"].parent)
    for kill in range(kills + 1):
        with servers(forks, 1, base_folder, tmp_path / "data", *flags) as (server,):
            for alias, one in known.items():
                check(server.client, alias, one)
            if kill < kills:
                kill_during_changes(server, known, seed=kill)
    assert min(one.num_changes for one in known.values()) >= kills

"""The comparison: its cells, what it does about peers that are missing or fail, and a real one with a tiny model."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fake_server import FIRST, FakeServer
from typer.testing import CliRunner

from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.dialect import Dialect
from loraplex.bench.load import LoadResult, Outcome, Workload
from loraplex.bench.peers import comparison
from loraplex.bench.peers.comparison import PeersBench, PeersSettings, agreement, medians
from loraplex.bench.peers.http_peer import RunningServer, figures_of
from loraplex.bench.peers.material import Material
from loraplex.bench.peers.own import Loraplex
from loraplex.bench.peers.peer import Cell, Figures, Place
from loraplex.bench.peers.peft_mixed import PeftMixed
from loraplex.bench.peers.process import Command
from loraplex.bench.peers.tables import peers_notes, peers_table
from loraplex.bench.peers.vllm_cpu import VllmCpu
from loraplex.bench.popularity import Popularity
from loraplex.bench.server import BenchFailed
from loraplex.cli import app

TINY = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # its first tokens are no close calls
}
SMALL = {"rank": 2, "rounds": 1, "least_requests": 2, "prompt_tokens": 30, "output_tokens": 4, "changes": TINY}


@dataclass
class FakePeer:
    """Serves at a fixed rate; `fails` when it is started."""

    name: str
    rate: float = 100.0
    has_adapters: bool = True
    fails: bool = False
    cells: list[Cell] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    prepared: int = 0

    def missing(self) -> None:
        return None

    def version(self) -> str:
        return f"{self.name} 1"

    def prepare(self, material: Material) -> None:
        assert material.base.is_dir()
        self.prepared += 1

    def set_ups(self, material: Material, place: Place) -> list["FakePeer"]:
        self.places.append(place)
        return [self]

    @property
    def command(self) -> Command:
        return Command([self.name, "serve"])

    @contextmanager
    def start(self, log: Path) -> Iterator["FakePeer"]:
        if self.fails:
            raise BenchFailed("It has no memory.")
        yield self

    def measure(self, cell: Cell) -> Figures:
        self.cells.append(cell)
        return Figures(self.rate * len(self.cells), 1.0, 2.0, 3.0, 4_000_000)

    def first_tokens(self, prompts: Sequence[list[int]], names: Sequence[str]) -> list[str]:
        return [f"{name}{prompt[0]}" for name in names for prompt in prompts]


def compare(peers: Sequence, limits, **changes) -> dict:
    settings = PeersSettings(**{**SMALL, "num_adapters": 2, "adapters": (0, 2), "pin": False, **changes})
    return PeersBench(settings, peers, limits=limits).run()


def test_the_cells_are_all_pairs_and_requests_suffice():
    settings = PeersSettings(clients=(32, 1), adapters=(8, 0), rounds=2)
    shown = [(cell.clients, cell.adapters, cell.requests) for cell in settings.cells(True)]
    assert shown == [(1, 0, 8), (32, 0, 64), (1, 8, 8), (32, 8, 64)]
    assert {cell.adapters for cell in settings.cells(False)} == {0}
    assert settings.cells(True)[0].num_tokens == 8 * 32


def test_peers_take_turns_and_repeat(limits):
    ours, theirs = FakePeer("ours", 10.0), FakePeer("theirs", 20.0, has_adapters=False)
    result = compare([ours, theirs], limits, clients=(1, 2), repeats=2)
    assert [run["peer"] for run in result["runs"]] == 2 * (4 * ["ours"] + 2 * ["theirs"])
    assert [run["repeat"] for run in result["runs"]] == 6 * [0] + 6 * [1]
    rows = {(row["peer"], row["clients"], row["adapters"]): row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["ours", 1, 0]["tokens_per_second"] == (10 + 50) / 2, "the median of both"
    assert rows["ours", 1, 0]["repeats"] == 2
    assert ours.prepared == theirs.prepared == 1
    assert ours.places[0] == Place(None, 2, 30 + 4 + 32)
    assert result["versions"] == {"ours": "ours 1", "theirs": "theirs 1"}
    assert result["commands"] == {"ours": "ours serve", "theirs": "theirs serve"}
    assert result["agreement"]["theirs"] == {"asked": 8, "equal": 8}, "8 prompts for the base"
    assert json.loads(json.dumps(result))["rows"] == result["rows"]


def test_a_missing_peer_is_skipped_and_named(limits):
    result = compare([FakePeer("ours"), VllmCpu(None)], limits)
    assert result["skipped"] == {"vLLM": "--vllm-python was not given"}
    assert result["errors"] == []
    assert {row["peer"] for row in result["rows"]} == {"ours"}
    assert "SKIPPED vLLM: --vllm-python was not given" in peers_notes(result)


def test_a_peer_that_fails_does_not_stop_the_others(limits):
    result = compare([FakePeer("broken", fails=True), FakePeer("sound")], limits)
    assert result["errors"] == ["broken: It has no memory."]
    assert {row["peer"] for row in result["rows"]} == {"sound"}
    assert "ERROR broken: It has no memory." in peers_notes(result)


def test_nothing_to_show_when_every_peer_fails(limits):
    result = compare([FakePeer("broken", fails=True)], limits)
    assert result["rows"] == []
    assert peers_table(result).row_count == 0


def test_medians_pass_over_what_was_not_measured():
    run = {"peer": "a", "clients": 1, "adapters": 0, "tokens_per_second": 5.0, "per_token_p50": None, "load": 1.0}
    run |= {"ttft_p50": None, "ttft_max": 3.0, "pss_bytes": 7, "failed": 1}
    (row,) = medians([run, {**run, "ttft_p50": 2.0, "load": 3.0}])
    assert (row["ttft_p50"], row["per_token_p50"], row["failed"], row["load"]) == (2.0, None, 2, 3.0)


def test_agreement_is_with_the_first_peer():
    texts = {"ours": ["a", "b", ""], "theirs": ["a", "x", "\ufffd"], "base only": ["a"]}
    assert agreement(texts) == {
        "ours": {"asked": 3, "equal": 3},
        "theirs": {"asked": 3, "equal": 2},
        "base only": {"asked": 1, "equal": 1},
    }
    assert agreement({}) == {}


def test_the_table_says_how_far_behind_a_peer_is(limits):
    table = peers_table(compare([FakePeer("ours", 30.0), FakePeer("theirs", 10.0)], limits, clients=(1,)))
    assert table.row_count == 4
    assert list(table.columns[-1].cells) == ["", "", "3.00", "3.00"]


def test_the_bench_keeps_off_the_peers_core(limits, monkeypatch: pytest.MonkeyPatch):
    cores, asked = {0, 1, 2}, []
    monkeypatch.setattr(comparison.os, "sched_getaffinity", lambda _: cores, raising=False)
    monkeypatch.setattr(comparison.os, "sched_setaffinity", lambda _, to: asked.append(set(to)), raising=False)
    peer = FakePeer("ours")
    compare([peer], limits, pin=True)
    assert peer.places[0].core == 2
    assert asked == [{0, 1}, cores]


def test_material_is_made_once(tmp_path: Path):
    material = Material(tmp_path, 2, 2, TINY)
    material.make()
    weights = [
        material.base / "model.safetensors",
        *(path / "adapter_model.safetensors" for path in material.adapters.values()),
    ]
    before = [path.stat().st_mtime_ns for path in weights]
    Material(tmp_path, 3, 2, TINY).make()
    assert [path.stat().st_mtime_ns for path in weights] == before
    assert (material.adapters_folder / "bench-0002" / "adapter_config.json").is_file()
    contents = [path.read_bytes() for path in weights]
    Material(tmp_path, 2, 2, {**TINY, "hidden_size": 32}).make()
    assert weights[0].read_bytes() != contents[0]
    assert min(material.token_pool) == 257
    assert material.fixed_prompts(2, 5) == material.fixed_prompts(2, 5)


def test_a_server_is_loaded_in_its_dialect(tmp_path: Path):
    material = Material(tmp_path, 2, 2)

    class NoMemory:
        def peak(self) -> int:
            return 5

    with FakeServer(models=("base",)) as fake:
        dialect = Dialect(lora_ids={"bench-0000": 0, "bench-0001": 1})
        running = RunningServer(fake.url, material, dialect, NoMemory())  # type: ignore[arg-type]
        figures = running.measure(Cell(clients=2, adapters=2, requests=4, prompt_tokens=6, output_tokens=3))
        asked = [seen.body["lora"][0]["id"] for seen in fake.seen]
    assert sorted(asked[-4:]) == [0, 0, 1, 1]
    assert figures.failed == 0
    assert figures.pss_bytes == 5
    assert figures.ttft_p50 is not None
    assert figures.ttft_p50 >= 1e3 * FIRST
    assert figures.ttft_max is not None
    assert figures.ttft_max >= figures.ttft_p50
    assert 0 < figures.tokens_per_second < 4 * 3 / FIRST


def test_what_failed_and_what_was_cached_is_said():
    outcomes = [Outcome("a", False, 0.0, ended=1.0, first=0.5, last=0.9, events=4) for _ in range(3)]
    outcomes[0].cached_tokens = 16
    outcomes[1].output_tokens = 2
    outcomes[2].error = "HTTP 500"
    workload = Workload(
        models=("a",), popularity=Popularity("distinct"), arrivals=ClosedLoop(1), output_tokens=4, requests=3
    )
    figures = figures_of(LoadResult(workload, Dialect(), outcomes, 0.0, 2.0, 0.0, False), 9)
    assert figures.errors == (
        "1 × HTTP 500",
        "1 answers are shorter than asked for",
        "16 prompt tokens came from a prefix cache",
    )
    assert (figures.failed, figures.tokens_per_second, figures.ttft_max) == (1, (4 + 2) / 2.0, 500)


@pytest.mark.slow  # a server and PEFT's own process
def test_loraplex_and_peft_serve_the_same(limits, tmp_path: Path):
    """The real server, and the real program, on a tiny model."""
    peers = [Loraplex(), PeftMixed()]
    result = compare(peers, limits, clients=(1, 2), adapters=(0, 1, 2), folder=tmp_path)
    assert result["errors"] == []
    assert result["skipped"] == {}
    assert len(result["rows"]) == 12
    assert all(row["tokens_per_second"] > 0 and row["failed"] == 0 for row in result["rows"])
    assert all(row["pss_bytes"] > 50 << 20 for row in result["rows"])
    equal = result["agreement"]["PEFT mixed batch"]
    assert equal["asked"] == 24
    assert equal["equal"] >= 22, "bfloat16 may turn a close call"


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in [name for name in os.environ if name.startswith("LORAPLEX_")]:
        monkeypatch.delenv(name)
    asked = []

    def run(self: PeersBench) -> dict:
        asked.append((self._settings, self._peers))
        row = {"peer": "ours", "clients": 1, "adapters": 0, "tokens_per_second": 7.0, "load": 0.5, "failed": 0}
        row |= {"ttft_p50": 1.0, "ttft_max": None, "per_token_p50": 1.0, "pss_bytes": 1}
        machine = {"cpu": "a cpu", "cores": 2, "bytes_per_second": {}, "buffer_bytes": 0, "cache_bytes": 0}
        machine |= {"flops": {}, "threads": 1}
        parts = {"machine": machine, "versions": {}, "skipped": {}, "agreement": {}, "errors": ["ours: 1 × oh"]}
        return {**parts, "rows": [row]}

    monkeypatch.setattr(PeersBench, "run", run)
    out = tmp_path / "out.json"
    options = ("--clients", "4,1", "--adapters", "0,3", "--rounds", "1", "--no-pin", "--output", str(out))
    done = CliRunner().invoke(app, ["bench", "peers", *options, "--vllm-python", "/vllm/bin/python"])
    assert done.exit_code == 1, done.output
    assert "ERROR ours: 1 × oh" in done.stdout
    assert json.loads(out.read_text())["rows"][0]["tokens_per_second"] == 7
    settings, peers = asked[0]
    assert (settings.clients, settings.adapters, settings.num_adapters, settings.pin) == ((1, 4), (0, 3), 3, False)
    assert [peer.name for peer in peers] == ["loraplex", "llama.cpp", "vLLM", "PEFT mixed batch"]
    assert peers[2].python == Path("/vllm/bin/python")

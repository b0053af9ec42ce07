"""PeersBench: the same cells through every peer that is there, in turn in one sitting.

Cell by cell: a closed loop of clients, new random prompts, greedy, streamed, fixed lengths, request i for adapter
i mod K. A peer's compute has one core, this process the others. Every server is asked for the first token of the same
prompts, too: equal ones show that it serves the same weights and the same adapters.
"""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loraplex.bench.machine import MachineLimits, measure_limits
from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.peer import Cell, Peer, Place, Running, SetUp
from loraplex.bench.server import BenchFailed

VERSION = 1
_NUM_FIXED_PROMPTS = 8
_SPARE_TOKENS = 32  # a sequence's room beyond prompt and output: 128 with the usual sizes
_FIGURES = ("tokens_per_second", "ttft_p50", "ttft_max", "per_token_p50", "pss_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersSettings:
    """clients, adapters   the cells are all pairs of them; 0 adapters: the base
    num_adapters   loaded by every peer
    rounds         requests of each client, and at least `least_requests` in a cell
    repeats        of the whole sitting; a cell's figures are the medians
    folder         for model, adapters and logs, kept and used again; None: a temporary one
    pin            a peer's compute on the last core, this process on the others
    changes        to the model's config
    """

    clients: tuple[int, ...] = (1, 32)
    adapters: tuple[int, ...] = (0, 1, 8, 32)
    num_adapters: int = 32
    rank: int = 16
    rounds: int = 2
    least_requests: int = 8
    repeats: int = 1
    prompt_tokens: int = 64
    output_tokens: int = 32
    folder: Path | None = None
    pin: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    def cells(self, has_adapters: bool) -> list[Cell]:
        return [
            Cell(clients, adapters, max(self.least_requests, self.rounds * clients), **self._lengths)
            for adapters in sorted(self.adapters)
            if has_adapters or adapters == 0
            for clients in sorted(self.clients)
        ]

    @property
    def _lengths(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}


class PeersBench:
    def __init__(
        self,
        settings: PeersSettings,
        peers: Sequence[Peer],
        show: Callable[[str], object] = lambda _: None,
        limits: MachineLimits | None = None,
    ):
        """`peers`: the first one is what the others are compared with. `show` is told what is being done. `limits`
        None: measured."""
        self._settings = settings
        self._peers = peers
        self._show = show
        self._limits = limits
        self._skipped: dict[str, str] = {}
        self._errors: list[str] = []
        self._commands: dict[str, str] = {}
        self._first_tokens: dict[str, list[str]] = {}

    def run(self) -> dict[str, Any]:
        """{"machine", "versions", "commands", "skipped", "errors", "agreement", "rows", "runs"}."""
        settings = self._settings
        runs: list[dict[str, Any]] = []
        with self._folder() as folder, self._pinned() as core:
            self._show("limits of the machine")
            limits = self._limits or measure_limits("cpu", 1)
            self._show("random model and adapters")
            material = Material(folder, settings.num_adapters, settings.rank, settings.changes)
            material.make()
            versions, peers = self._look(material)
            place = Place(core, max(settings.clients), settings.prompt_tokens + settings.output_tokens + _SPARE_TOKENS)
            for repeat in range(settings.repeats):
                for peer in peers:
                    for set_up in peer.set_ups(material, place):
                        runs += self._run_set_up(set_up, folder, material, repeat)
        return {
            "report": VERSION,
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), **limits.to_json()},
            "settings": {**asdict(settings), "folder": str(settings.folder), "changes": dict(settings.changes)},
            "versions": versions,
            "commands": self._commands,
            "skipped": self._skipped,
            "errors": self._errors,
            "agreement": agreement(self._first_tokens),
            "rows": medians(runs),
            "runs": runs,
        }

    def _look(self, material: Material) -> tuple[dict[str, str], list[Peer]]:
        """The versions, and the peers that are there, prepared."""
        versions, there = {}, []
        for peer in self._peers:
            self._show(f"{peer.name}: version and files")
            try:
                why = peer.missing()
                if why is None:
                    versions[peer.name] = peer.version()
                    peer.prepare(material)
                    there.append(peer)
                else:
                    self._skipped[peer.name] = why
            except BenchFailed as error:
                self._errors.append(f"{peer.name}: {error.message}")
        return versions, there

    def _run_set_up(self, set_up: SetUp, folder: Path, material: Material, repeat: int) -> list[dict[str, Any]]:
        """The runs of all its cells, as far as it comes."""
        name, runs = set_up.name, []
        self._commands[name] = set_up.command.text
        log = folder / f"{''.join(letter if letter.isalnum() else '-' for letter in name)}.log"
        self._show(f"{name}: start")
        begun = time.perf_counter()
        try:
            with set_up.start(log) as running:
                start_seconds = time.perf_counter() - begun
                for cell in self._settings.cells(set_up.has_adapters):
                    self._show(f"{name}: {cell.clients} clients, {cell.adapters or 'no'} adapters")
                    load = os.getloadavg()[0]
                    figures = running.measure(cell)
                    self._errors += [f"{name}: {error}" for error in figures.errors]
                    about = {"peer": name, "repeat": repeat, "load": load, "start_seconds": start_seconds}
                    runs.append({**about, **asdict(cell), **asdict(figures)})
                if repeat == 0:
                    self._first_tokens[name] = self._ask_first_tokens(running, set_up, material)
        except BenchFailed as error:
            self._errors.append(f"{name}: {error.message}")
        return runs

    def _ask_first_tokens(self, running: Running, set_up: SetUp, material: Material) -> list[str]:
        prompts = material.fixed_prompts(_NUM_FIXED_PROMPTS, self._settings.prompt_tokens)
        adapters = [material.names[0], material.names[-1]] if set_up.has_adapters and material.names else []
        return running.first_tokens(prompts, [BASE_NAME, *adapters])

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with ExitStack() as stack:
            folder = self._settings.folder
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loraplex-peers-")))
            folder.mkdir(parents=True, exist_ok=True)
            yield folder.resolve()

    @contextmanager
    def _pinned(self) -> Iterator[int | None]:
        """The peers' core; this process keeps off it inside. The core of a machine with one is shared."""
        if not self._settings.pin or not hasattr(os, "sched_setaffinity"):
            yield None
            return
        cores = os.sched_getaffinity(0)
        last = max(cores)
        os.sched_setaffinity(0, cores - {last} or cores)
        try:
            yield last
        finally:
            os.sched_setaffinity(0, cores)


def medians(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each peer and cell, in the order of the runs: the median of each figure over its repeats."""
    groups: dict[tuple[str, int, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["peer"], run["clients"], run["adapters"]), []).append(run)
    rows = []
    for (peer, clients, adapters), group in groups.items():
        row: dict[str, Any] = {"peer": peer, "clients": clients, "adapters": adapters, "repeats": len(group)}
        for name in _FIGURES:
            values = [run[name] for run in group if run[name] is not None]
            row[name] = statistics.median(values) if values else None
        row["failed"] = sum(run["failed"] for run in group)
        row["load"] = max(run["load"] for run in group)
        rows.append(row)
    return rows


def agreement(first_tokens: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """By peer: of how many (prompt, adapter) pairs it was asked, and how many first tokens equal the first peer's. Half
    a character, which some give as nothing and some as U+FFFD, equals another half."""
    texts = {peer: [text.replace("\ufffd", "") for text in found] for peer, found in first_tokens.items()}
    reference = next(iter(texts.values()), [])
    return {
        peer: {"asked": len(found), "equal": sum(map(str.__eq__, reference, found))} for peer, found in texts.items()
    }


def cpu_name() -> str:
    """As Linux names it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

"""Peer: another server (or library) that runs LoRA adapters, as this benchmark sees it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from loraplex.bench.peers.material import Material
from loraplex.bench.peers.process import Command

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: `requests` by `clients` at once, in turn for `adapters` of them; 0: the base."""

    clients: int
    adapters: int
    requests: int
    prompt_tokens: int = 64
    output_tokens: int = 32

    @property
    def num_tokens(self) -> int:
        return self.requests * self.output_tokens


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one cell. Times in milliseconds: `ttft` to the first token, `per_token` after it, of each request. None: no
    request ended well. `failed`: requests. `errors`: what they said, and what else is not as it was asked for."""

    tokens_per_second: float
    ttft_p50: float | None
    ttft_max: float | None
    per_token_p50: float | None
    pss_bytes: int
    failed: int = 0
    errors: tuple[str, ...] = ()


class Running(Protocol):
    """A peer that is up."""

    def measure(self, cell: Cell) -> Figures: ...

    def first_tokens(self, prompts: Sequence[list[int]], names: Sequence[str]) -> list[str]:
        """The text of the first greedy token: for each name (the base's or an adapter's) and each prompt of it."""
        ...


class SetUp(Protocol):
    """One way to start a peer. `has_adapters` False: it serves the base only."""

    @property
    def name(self) -> str: ...

    @property
    def has_adapters(self) -> bool: ...

    @property
    def command(self) -> Command: ...

    def start(self, log: Path) -> AbstractContextManager[Running]:
        """Raises BenchFailed when it does not come up."""
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer runs: its core (None: any), how many compute threads, how many clients at most, and the longest
    sequence."""

    core: int | None
    max_clients: int
    max_tokens: int
    threads: int = 1


class Peer(Protocol):
    @property
    def name(self) -> str: ...

    def missing(self) -> str | None:
        """Why it cannot run here. None: it can."""
        ...

    def version(self) -> str:
        """Raises BenchFailed when it does not say."""
        ...

    def prepare(self, material: Material) -> None:
        """Bring base and adapters into its own format, where it has one."""
        ...

    def set_ups(self, material: Material, place: Place) -> list[SetUp]: ...

"""Arrivals: when requests are sent.

ClosedLoop: C clients, each sends its next request when its last one has ended: the load follows the server.
Poisson: requests come at a rate, whatever the server does. A request's clock starts when it was due, not when this
program got to it, so a client that falls behind makes the server look no better ("coordinated omission").
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Send = Callable[[float], Coroutine[Any, Any, None]]
"""Send one request and await its end; takes the time it was due (time.perf_counter)."""


class Arrivals(Protocol):
    async def run(self, send: Send, more: Callable[[], bool]) -> None:
        """Send until `more` says no, then wait for those under way. `more` is asked once for every request."""
        ...


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    clients: int

    async def run(self, send: Send, more: Callable[[], bool]) -> None:
        async def client() -> None:
            while more():
                await send(time.perf_counter())

        async with asyncio.TaskGroup() as group:
            for _ in range(self.clients):
                group.create_task(client())

    def __str__(self) -> str:
        return f"{self.clients} clients, closed loop"


@dataclass(frozen=True, slots=True)
class Poisson:
    """`rate`: requests a second."""

    rate: float
    seed: int = 0

    def gaps(self) -> Iterator[float]:
        """Seconds between arrivals: independent, exponentially distributed."""
        generator = np.random.default_rng([self.seed, 1])
        while True:
            yield from generator.exponential(1 / self.rate, 256).tolist()

    async def run(self, send: Send, more: Callable[[], bool]) -> None:
        due = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for gap in self.gaps():
                due += gap
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if not more():
                    break
                group.create_task(send(due))

    def __str__(self) -> str:
        return f"Poisson arrivals at {self.rate:g} a second"

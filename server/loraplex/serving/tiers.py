"""Tiers: what operators ask of RAM and device beside requests, by name: pins, adapters brought in ahead, what stands
where."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import structlog

from loraplex.engine.adapter_residency import AdapterStanding, TiersView, Wish
from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import AdapterUse, Failure
from loraplex.errors import AdapterLoadFailed, AdapterQuarantined, InvalidRequest, LoraplexError, ModelNotFound
from loraplex.lora.pins import Pin
from loraplex.lora.version import Version
from loraplex.serving.background import entered
from loraplex.serving.catalog import AdapterCatalog
from loraplex.serving.generation import as_error

logger = structlog.get_logger(__name__)

TIMEOUT = 30.0
"""Seconds after which a wish for room that nobody gives up is refused."""
PERIOD = 5.0
"""Seconds between two looks at the pins, which other processes may change, and at the idle."""

Tier = Literal["device", "ram", "disk"]


class Tiers:
    """`bytes_per_value`: of the dtype that is computed in. `ttl`: seconds after which an idle adapter leaves RAM; None:
    when its room is needed."""

    def __init__(self, catalog: AdapterCatalog, engine: EngineClient, bytes_per_value: int, ttl: float | None):
        self._catalog = catalog
        self._engine = engine
        self._bytes_per_value = bytes_per_value
        self._ttl = ttl
        self._changed = asyncio.Event()
        self._keeping = asyncio.Lock()  # one at a time decides what is pinned
        self._refused: set[str] = set()  # digests of pins that could not be kept, told of once

    # -- wishes -----------------------------------------------------------------------------------------------

    async def pin(self, name: str, version: int | None = None, *, who: str) -> Version:
        """Keep what `name` means in RAM, with what it stands on, and what it will mean, or exactly `version`; also over
        restarts. Raises ModelNotFound, InsufficientMemory when another adapter would have no room left."""
        await asyncio.to_thread(self._catalog.get, name, version)  # what is not there need not wait to be refused
        async with self._keeping:
            try:
                found = await self._with_path(name, version, self._pin)
            except LoraplexError:
                self.wake()  # what it stands on may be pinned already
                raise
            await asyncio.to_thread(self._catalog.registry.pins.add, Pin(name, version), who=who)
        return found

    async def unpin(self, name: str, version: int | None = None, *, who: str) -> Sequence[Pin]:
        """Take back the pins of `name`, or that of `version`. Raises InvalidRequest when there is none."""
        registry = self._catalog.registry
        known = await asyncio.to_thread(registry.pins.list, name)
        wanted = [pin for pin in known if version is None or pin.version == version]
        if not wanted:
            await asyncio.to_thread(registry.look, name, version)
            which = Pin(name, version).model
            hint = f" {name!r} itself is; unpin that." if known else " 'loraplex tiers' and GET /v1/tiers list what is."
            raise InvalidRequest(f"{which!r} is not pinned.{hint}")
        await asyncio.to_thread(registry.pins.remove, wanted, who=who)
        await self._keep_pins()
        return wanted

    async def prefetch(self, name: str, version: int | None = None, *, to: Literal["ram", "device"]) -> Version:
        """Bring an adapter, and what it stands on, in ahead of its first request. Raises ModelNotFound,
        InsufficientMemory, Overloaded when there is no room that nobody needs."""
        return await self._with_path(name, version, lambda one: self._bring(one, to))

    async def _with_path(self, name: str, version: int | None, do: Callable[[Version], Awaitable[None]]) -> Version:
        """Do something to what `name` means, and to what it stands on before. What is deleted or replaced while that
        waits is looked up anew."""
        while True:
            found = await asyncio.to_thread(self._catalog.get, name, version)
            try:
                for one in await asyncio.to_thread(self._catalog.path, found):
                    await do(one)
                return found
            except AdapterLoadFailed:
                if await asyncio.to_thread(self._catalog.get, name, version) == found:
                    raise

    async def standing(self, version: Version) -> AdapterStanding:
        (standing,) = await self._engine.command("standings", digests=(version.digest,))
        return standing

    async def view(
        self, tier: Tier | None, offset: int, limit: int
    ) -> tuple[TiersView, list[tuple[Version, AdapterStanding]], int]:
        """The tiers, the versions of one or of all by name with where they stand, and how many there are."""
        view: TiersView = await self._engine.command("tiers")
        by_digest = {standing.digest: standing for standing in view.standings}
        wanted = None
        if tier in ("device", "ram"):  # what stands on the device is in RAM, too
            tiers = ("device",) if tier == "device" else ("device", "ram")
            wanted = [digest for digest, standing in by_digest.items() if standing.tier in tiers]
        elif tier == "disk":
            resident = {digest for digest, standing in by_digest.items() if standing.tier in ("device", "ram")}
            wanted = await asyncio.to_thread(lambda: self._catalog.registry.live_digests() - resident)
        versions, total = await asyncio.to_thread(self._catalog.registry.pins.named, offset, limit, wanted)
        unknown = [version.digest for version in versions if version.digest not in by_digest]
        for standing in await self._engine.command("standings", digests=tuple(unknown)):
            by_digest[standing.digest] = standing
        return view, [(version, by_digest[version.digest]) for version in versions], total

    # -- keeping ----------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """A name may mean another version now: the pins are looked at at once."""
        self._changed.set()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Within the block pins are kept, and idle adapters let go."""
        keeper = asyncio.ensure_future(self._keep())
        try:
            yield
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)

    async def _keep(self) -> None:
        period = PERIOD if self._ttl is None else min(PERIOD, max(0.05, self._ttl / 2))
        while self._engine.is_alive:
            try:
                await self._keep_pins()
                if self._ttl is not None:
                    await self._engine.command("expire", seconds=self._ttl)
            except Exception as error:  # whatever it was: the next round looks again
                logger.warning("the tiers could not be looked after", reason=str(error))
            try:
                await asyncio.wait_for(self._changed.wait(), period)
            except TimeoutError:
                continue
            self._changed.clear()

    async def _keep_pins(self) -> None:
        """Have the engine hold exactly what the pins mean now."""
        async with self._keeping:
            wanted = await asyncio.to_thread(self._pinned_versions)
            pinned = set(await self._engine.command("pinned"))
            for digest in pinned - wanted.keys():
                await self._engine.command("unpin", digest=digest)
            self._refused &= wanted.keys()
            for digest in wanted.keys() - pinned:
                try:
                    await self._pin(wanted[digest])
                    self._refused.discard(digest)
                except LoraplexError as error:
                    if digest not in self._refused:
                        self._refused.add(digest)
                        logger.warning("a pin is not kept", adapter=wanted[digest].model_id, reason=error.message)

    def _pinned_versions(self) -> dict[str, Version]:
        """By digest. Pins of what was deleted are forgotten."""
        registry = self._catalog.registry
        found: dict[str, Version] = {}
        is_stale = False
        for pin in registry.pins.list():
            try:
                path = self._catalog.path(self._catalog.get(pin.name, pin.version))
            except ModelNotFound:
                is_stale = True
            except AdapterQuarantined:
                pass  # it does not answer, so it needs no room; the pin holds when it is back
            else:
                found |= {version.digest: version for version in path}
        if is_stale:
            registry.pins.drop_deleted()
        return found

    async def _pin(self, version: Version) -> None:
        pinned = await self._engine.command("pinned")
        other = await asyncio.to_thread(self._catalog.registry.pins.largest_other, {*pinned, version.digest})
        await self._bring(version, "pin", 0 if other is None else self._ram_bytes(other))

    async def _bring(self, version: Version, wish: Wish, room: int = 0) -> None:
        use = AdapterUse(version.digest, self._ram_bytes(version))
        hold = self._catalog.hold(version.digest)  # its files stay while the engine may read them
        async with entered(hold):
            arguments = {"use": use, "wish": wish, "timeout": TIMEOUT, "room": room}
            failure: Failure | None = await self._engine.command("bring", **arguments)
        if failure is not None:
            raise as_error(failure)

    def _ram_bytes(self, version: Version) -> int:
        return version.facts.num_values * self._bytes_per_value

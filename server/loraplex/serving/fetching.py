"""Fetching: adapters that the server gets itself: one source, several tries, then the way of every upload."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import stamina
import structlog

from loraplex.errors import SourceUnavailable
from loraplex.lora.staging import Staging
from loraplex.serving.background import Background, finished
from loraplex.serving.catalog import AdapterCatalog, Catalogued
from loraplex.sources.allow_list import AllowList
from loraplex.sources.source import Source
from loraplex.sources.transfer import Transfer

logger = structlog.get_logger(__name__)

Accept = Callable[[str, Staging, str, str, str | None], Coroutine[Any, Any, Catalogued]]
"""(name, staged files, who, source, parent) -> the accepted version."""

TRIES = 4
_AT_ONCE = 2


class Fetching:
    """`timeout`: seconds for one adapter, all tries together. Two are fetched at once; others wait. Closed by
    `close`."""

    def __init__(
        self, catalog: AdapterCatalog, accept: Accept, allowed: AllowList, *, max_weights_bytes: int, timeout: float
    ):
        self._catalog = catalog
        self._accept = accept
        self._allowed = allowed
        self._max_weights_bytes = max_weights_bytes
        self._timeout = timeout
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._threads = Background(_AT_ONCE)
        self.running: list[Transfer] = []

    async def fetch(self, name: str, source: str, who: str, parent: str | None = None) -> Catalogued:
        """Make what `source` names what `name` means, on top of what `parent` means. Raises SourceRefused,
        SourceFailed, AdapterError and kin; then nothing is kept."""
        self.check_name(name)
        return await self.fetch_from(name, self._allowed.source(source), who, parent)

    def check_name(self, name: str) -> None:
        """Raises InvalidName, or AdapterConflict for the base's."""
        self._catalog.check_name(name)

    async def fetch_from(self, name: str, source: Source, who: str, parent: str | None = None) -> Catalogued:
        """As `fetch`; the source need not be on the list."""
        async with self._slots:
            limits = {"max_weights_bytes": self._max_weights_bytes, "timeout": self._timeout}
            transfer = Transfer(name, source.shown, **limits)
            self.running.append(transfer)
            try:
                return await self._tried(name, source, who, parent, transfer)
            finally:
                transfer.stop()
                self.running.remove(transfer)

    async def _tried(self, name: str, source: Source, who: str, parent: str | None, transfer: Transfer) -> Catalogued:
        tries = stamina.retry_context(on=SourceUnavailable, attempts=TRIES, timeout=self._timeout, wait_initial=0.2)
        async for attempt in tries:
            with attempt:
                transfer.begin_try()
                with self._catalog.store.stage() as staging:  # fresh: nothing of an earlier try is in it
                    await finished(self._threads.run(source.fetch, staging, transfer), give_up=transfer.stop)
                    logger.info("adapter fetched", source=source.shown, bytes=transfer.bytes_done, tries=transfer.tries)
                    return await self._accept(name, staging, who, source.shown, parent)
        raise AssertionError("the last try returns or raises")

    def close(self) -> None:
        """Have everything that is under way give up."""
        for transfer in self.running:
            transfer.stop()
        self._threads.close()

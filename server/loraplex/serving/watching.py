"""Watching: the folder of --adapters, looked at again and again: new and changed adapters become versions.

A folder is taken when it has looked the same for one interval, and what was copied counts only if it still looks so
afterwards: one that is being written is left until it is at rest. Nothing is deleted because a folder is gone.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path, PurePath

import structlog

from loraplex.errors import LoraplexError, SourceFailed, StorageFull
from loraplex.lora.event import OPERATOR
from loraplex.lora.files import CONFIG
from loraplex.lora.parents import UNKNOWN_PARENT
from loraplex.lora.staging import Staging
from loraplex.serving.fetching import Fetching
from loraplex.sources.folder import FolderSource
from loraplex.sources.transfer import Transfer

logger = structlog.get_logger(__name__)

Signature = tuple[tuple[str, int, int, int], ...]


class Watching:
    """Links below `folder` are refused. `interval` in seconds."""

    def __init__(self, folder: Path, fetching: Fetching, interval: float):
        self._folder = folder
        self._fetching = fetching
        self._interval = interval
        self._seen: dict[str, Signature | str] = {}  # what was taken or refused
        self._pending: dict[str, Signature] = {}  # looked so at the last round

    async def seed(self) -> frozenset[str]:
        """Take what is there as seen: whoever starts the server registers it. Returns what is refused, by name."""
        found = await asyncio.to_thread(self._scan)
        self._seen = dict(found)
        refused = {name: why for name, why in found.items() if isinstance(why, str)}
        for name, why in refused.items():
            logger.warning("a folder is not served", name=name, reason=why)
        return frozenset(refused)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Within the block the folder is watched."""
        watcher = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self.look()
            except Exception as error:  # whatever it was: the next round looks again
                logger.warning("the folder of adapters could not be looked at", reason=str(error))

    async def look(self) -> None:
        """One round."""
        found = await asyncio.to_thread(self._scan)
        for name in self._seen.keys() - found.keys():
            del self._seen[name]
            logger.warning(
                "a folder is gone; its adapter stays until it is deleted", name=name, by=f"loraplex rm {name}"
            )
        pending, self._pending = self._pending, {}
        for name, signature in found.items():
            if signature == self._seen.get(name):
                continue
            if isinstance(signature, str):
                self._seen[name] = signature
                logger.warning("a folder is not served", name=name, reason=signature)
            elif pending.get(name) != signature:
                self._pending[name] = signature
            else:
                await self._take(name, signature)

    async def _take(self, name: str, signature: Signature) -> None:
        try:
            self._fetching.check_name(name)
            accepted = await self._fetching.fetch_from(name, _AtRest(self._folder, name, signature), OPERATOR)
        except LoraplexError as error:
            if isinstance(error, SourceFailed | StorageFull) or error.code == UNKNOWN_PARENT:
                self._pending[name] = signature  # it may be better at the next round
                logger.warning("a folder could not be taken yet", name=name, reason=error.message)
                return
            logger.warning("a folder is not served", name=name, reason=error.message)
        else:
            logger.info("adapter taken from its folder", adapter=accepted.version.model_id, is_new=accepted.created)
        self._seen[name] = signature

    def _scan(self) -> dict[str, Signature | str]:
        """Of every folder with an adapter how it looks, or why it is refused."""
        found: dict[str, Signature | str] = {}
        for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
            if not os.path.lexists(os.path.join(entry.path, CONFIG.name)):
                continue
            try:
                found[entry.name] = FolderSource(self._folder, PurePath(entry.name)).signature()
            except LoraplexError as error:  # half there, or links
                found[entry.name] = error.message
        return found


class _AtRest(FolderSource):
    """A folder that must look the same before and after it was copied."""

    def __init__(self, root: Path, name: str, signature: Signature):
        super().__init__(root, PurePath(name))
        self._expected = signature

    def fetch(self, staging: Staging, transfer: Transfer) -> None:
        super().fetch(staging, transfer)
        if self.signature() != self._expected:
            raise SourceFailed(f"{self.shown} is being written; it is read when it is at rest.")

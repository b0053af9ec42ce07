"""Acceptance: from staged files to a version that serves.

    text side ─> check and report ─> blob (durable) ─> proof by the engine ─> name@version (durable) = accepted

The engine reads what it proves from the blob, as it will for requests; a blob that no version names is nothing, and
goes when the proof fails. Until the last step the name means what it meant.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import structlog

from loraplex.engine.async_engine import EngineClient
from loraplex.engine.durations import Durations
from loraplex.engine.messages import AdapterUse
from loraplex.engine.proof_result import ProofResult
from loraplex.errors import AdapterLoadFailed, AdapterTooLarge, LoraplexError, StartupError, StorageFull
from loraplex.lora.event import OPERATOR
from loraplex.lora.parents import UNKNOWN_PARENT
from loraplex.lora.staging import Staging
from loraplex.serving.background import Background, entered, finished
from loraplex.serving.catalog import AdapterCatalog, Catalogued, Prepared
from loraplex.serving.generation import as_error
from loraplex.serving.path_proof import PathProof
from loraplex.serving.proof_record import proof_record
from loraplex.text.adapter_texts import AdapterTexts

logger = structlog.get_logger(__name__)

PHASES = ("receive", "check", "prove", "publish")
"""Of an upload: its body to durable files in staging, those to a blob, the proof, the entry in the registry."""


class Acceptance:
    """`vocab_size`: of the base. `proof_timeout`: seconds for one proof; None: nothing is proven. Closed by `close`."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        texts: AdapterTexts,
        engine: EngineClient,
        vocab_size: int,
        proof_timeout: float | None,
    ):
        self.background = Background(2)
        self._catalog = catalog
        self._texts = texts
        self._engine = engine
        self._proof_timeout = proof_timeout
        self._path_proof = None if proof_timeout is None else PathProof(catalog, engine, vocab_size, proof_timeout)
        self._accepting = asyncio.Semaphore(2)
        self.seconds = {phase: Durations() for phase in PHASES}  # of what went well

    def close(self) -> None:
        self.background.close()

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase].observe(time.perf_counter() - started)

    async def upload(
        self, name: str, staging: Staging, who: str, source: str = "upload", parent: str | None = None
    ) -> Catalogued:
        """Make staged files what `name` means, on top of what `parent` means. `source`: where they came from, for
        users. Raises AdapterError and kin; then nothing is kept."""
        async with self._accepting, self._withdrawing(staging):
            with self.timing("check"):
                brought = await self._texts.inspect(staging.folder)
                preparing = self.background.run(self._catalog.prepare, name, staging, brought, parent)
                prepared = await finished(preparing)
            return await self._publish(prepared, source, who)

    async def folders(self, named: Sequence[tuple[str, Path]]) -> None:
        """Register an operator's PEFT folders by name, those that others stand on first. Raises StartupError."""
        while named:
            orphans: dict[tuple[str, Path], LoraplexError] = {}
            for name, folder in named:
                try:
                    added = await self.folder(name, folder)
                except LoraplexError as error:
                    if error.code != UNKNOWN_PARENT:
                        raise _unserved(name, folder, error) from error
                    orphans[name, folder] = error
                    continue
                if added.created:
                    logger.info("adapter registered", adapter=added.version.model_id, folder=str(folder))
            if len(orphans) == len(named):
                raise _unserved(*named[0], orphans[named[0]])
            named = list(orphans)

    async def folder(self, name: str, folder: Path) -> Catalogued:
        """Register an operator's PEFT folder as `name`, once: a later start finds it there."""
        brought = await self._texts.inspect(folder)
        async with entered(self._catalog.store.import_folder(folder, brought.unneeded)) as staging:
            known = await asyncio.to_thread(self._catalog.known, name, staging.digest, brought.parent)
            if known is not None:
                return Catalogued(known, False, known)
            async with self._withdrawing(staging):
                prepared = await finished(asyncio.to_thread(self._catalog.prepare, name, staging, brought))
                return await self._publish(prepared, f"folder:{folder.name}", OPERATOR)

    async def _publish(self, prepared: Prepared, source: str, who: str) -> Catalogued:
        with self.timing("prove"):
            proof = await self._prove(prepared)
            if proof is not None and prepared.path and self._path_proof is not None:
                proof["path"] = await self._path_proof.run(prepared)
        with self.timing("publish"):
            return await finished(asyncio.to_thread(self._catalog.publish, prepared, proof, source, who))

    @asynccontextmanager
    async def _withdrawing(self, staging: Staging) -> AsyncIterator[None]:
        """What fails within the block leaves no blob, unless it is a version's."""
        try:
            yield
        except BaseException:
            if staging.held:
                with suppress(StorageFull):  # then a later sweep takes it
                    await finished(asyncio.to_thread(self._catalog.withdraw, staging))
            raise

    async def _prove(self, prepared: Prepared) -> dict[str, Any] | None:
        """The record of the proof, of an earlier one if there is one of the same files on this base."""
        if self._proof_timeout is None:
            return None
        earlier = await asyncio.to_thread(self._catalog.proof_of, prepared.digest)
        if earlier is not None:
            return earlier
        use = AdapterUse(prepared.digest, prepared.report.ram_bytes)
        result: ProofResult = await self._engine.command("prove", use=use, timeout=self._proof_timeout)
        if result.failure is None:
            return proof_record(result)
        error = as_error(result.failure)
        if isinstance(error, AdapterLoadFailed) and error.code == "adapter_too_large":
            raise AdapterTooLarge(error.message)
        raise error


def _unserved(name: str, folder: Path, error: LoraplexError) -> StartupError:
    return StartupError(f"The adapter {name!r} in {folder} cannot be served: {error.message}")

"""Merging: merged weights by name, and how they stand."""

import asyncio
from dataclasses import asdict
from typing import Any

from loraplex.engine.adapter_merges import MergeStatus
from loraplex.engine.async_engine import EngineClient
from loraplex.engine.messages import AdapterUse
from loraplex.errors import InvalidRequest, ModelNotFound, NotMergeable
from loraplex.lora.version import Version
from loraplex.serving.background import entered
from loraplex.serving.catalog import AdapterCatalog
from loraplex.serving.generation import as_error


class Merging:
    """`mode`: of --merge. `bytes_per_value`: of the dtype that is computed in."""

    def __init__(self, catalog: AdapterCatalog, engine: EngineClient, mode: str, bytes_per_value: int):
        self._catalog = catalog
        self._engine = engine
        self._mode = mode
        self._bytes_per_value = bytes_per_value

    async def merge(self, name: str, version: int | None = None) -> tuple[Version, MergeStatus]:
        """Build the merged weights of what `name` means now; when this returns, steps that are its own run on them.
        Raises NotMergeable, InsufficientMemory, ModelNotFound."""
        if self._mode == "off":
            raise NotMergeable(
                "This server was started without merging. Start it with --merge manual or --merge auto.",
                code="merging_is_off",
            )
        # its files stay while the engine may read them
        hold = self._catalog.holding(lambda: self._mergeable(name, version))
        async with entered(hold) as (found, _):
            use = AdapterUse(found.digest, found.facts.num_values * self._bytes_per_value)
            status: MergeStatus = await self._engine.command("merge", use=use)
        if status.failure is not None:
            raise as_error(status.failure)
        return found, status

    def _mergeable(self, name: str, version: int | None) -> Version:
        found = self._catalog.get(name, version)
        if not self._catalog.is_served(found):
            raise ModelNotFound(f"{found.model_id} is not served, so it is not merged.", param="model")
        if found.parent is not None:
            raise NotMergeable(
                f"{found.model_id} is a sum, since it stands on {found.parent}, and merged weights are one adapter's. "
                "Make one adapter of the sum (loraplex merge) and push that."
            )
        return found

    async def unmerge(self, name: str, version: int | None = None) -> Version:
        """Drop the merged weights of what `name` means now. Raises InvalidRequest when there are none."""
        found = await asyncio.to_thread(self._catalog.get, name, version)
        try:
            await self._engine.command("unmerge", digest=found.digest)
        except ValueError as error:
            raise InvalidRequest(
                f"{found.model_id} is not merged and is not being merged. GET /v1/adapters/{name} says how it stands."
            ) from error
        return found


def describe_merge(status: MergeStatus) -> dict[str, Any]:
    """For clients."""
    failure = None if status.failure is None else asdict(status.failure)
    return {
        "state": status.state,
        "automatic": status.is_automatic,
        "progress": round(status.progress, 3),
        "bytes": status.nbytes,
        "relative_error": status.error,
        "seconds": round(status.seconds, 3),
        "steps": status.num_steps,
        "failure": failure,
    }

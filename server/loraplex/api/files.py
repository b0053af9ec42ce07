"""/v1/adapters/{model}/files/{part}: an adapter's files as they were accepted."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse

from loraplex.api.openai import TheService
from loraplex.errors import AdapterLoadFailed, InvalidRequest
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, file_sha256, text_sha256
from loraplex.lora.files import FILES
from loraplex.lora.version import Version
from loraplex.routing.names import parse_model
from loraplex.service import Service
from loraplex.serving.background import entered

router = APIRouter(prefix="/v1/adapters")

DIGEST_HEADER = "x-loraplex-digest"
VERSION_HEADER = "x-loraplex-adapter"


@asynccontextmanager
async def held_files(service: Service, model: str) -> AsyncIterator[tuple[Version, Path]]:
    """A version, served or not, and the folder of its files, which stay for the length of the block."""
    ref = parse_model(model)
    hold = service.catalog.holding(lambda: service.catalog.registry.look(ref.name, ref.version))
    async with entered(hold) as held:
        yield held


async def _held(model: str, service: TheService) -> AsyncIterator[tuple[Version, Path]]:
    async with held_files(service, model) as held:
        yield held  # FastAPI goes on behind this line when the response has been sent


@router.get("/{model}/files/{part}")
async def get_file(part: str, held: Annotated[tuple[Version, Path], Depends(_held)]) -> FileResponse:
    """One file, verified before its first byte is sent. Parts have the names that an upload's form gives them."""
    version, folder = held
    file = next((one for one in FILES if one.part == part), None)
    if file is None or not (folder / file.name).is_file():
        there = ", ".join(one.part for one in FILES if (folder / one.name).is_file())
        raise InvalidRequest(f"{version.model_id} has no file {part[:64]!r}; it has {there}.", param="part")
    await asyncio.to_thread(_verify, version, folder)
    headers = {DIGEST_HEADER: version.digest, VERSION_HEADER: version.model_id}
    return FileResponse(folder / file.name, media_type="application/octet-stream", filename=file.name, headers=headers)


def _verify(version: Version, folder: Path) -> None:
    """Raises AdapterLoadFailed when the files are not what was accepted."""
    try:
        sums = file_sha256(folder / CONFIG_NAME), file_sha256(folder / WEIGHTS_NAME)
        found = adapter_digest(*sums, text_sha256(folder))
    except OSError as cause:
        reason = f"cannot be read: {cause.strerror or cause}"
    else:
        if found == version.digest:
            return
        reason = "are not what was accepted: the disk has changed them"
    raise AdapterLoadFailed(f"The files of {version.model_id} {reason}. Push the adapter again.")

"""/v1/adapters: upload, list, look, delete."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from loraplex.api.multipart import AdapterUpload, boundary_of
from loraplex.api.openai import TheMetrics, TheService
from loraplex.errors import LoraplexError
from loraplex.lora.files import FILES, REQUIRED
from loraplex.lora.version import Version
from loraplex.routing.names import parse_model

router = APIRouter(prefix="/v1/adapters")

_BATCH_BYTES = 1 << 20


@router.post("", status_code=201)
async def upload(request: Request, service: TheService, metrics: TheMetrics) -> Response:
    """A name and the files of `files.FILES`; 201 when the adapter is durable and usable, 200 when it was here."""
    boundary = boundary_of(request)
    try:
        with service.catalog.store.stage() as staging:
            body = AdapterUpload(staging, boundary, service.catalog.check_name)
            try:
                await _receive(request, body)
                name = body.finish()
            finally:
                body.close()
            accepted = await service.accept_upload(name, staging)
    except ClientDisconnect:
        metrics.uploads.labels("broken_off").inc()
        return Response(status_code=499)  # nobody reads it
    except (LoraplexError, HTTPException):
        metrics.uploads.labels("refused").inc()
        raise
    metrics.uploads.labels("created" if accepted.created else "unchanged").inc()
    report = {
        **describe(accepted.version),
        "is_new": accepted.created,
        "ignored": dict(accepted.ignored),
        "notes": list(accepted.notes),
    }
    return JSONResponse(report, 201 if accepted.created else 200)


async def _receive(request: Request, body: AdapterUpload) -> None:
    """Feed the body to the staging in pieces worth a trip to a worker thread."""
    pending: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        pending.append(chunk)
        size += len(chunk)
        if size >= _BATCH_BYTES:
            await asyncio.to_thread(body.feed, b"".join(pending))
            pending, size = [], 0
    if pending:
        await asyncio.to_thread(body.feed, b"".join(pending))


@router.get("")
async def list_adapters(
    service: TheService,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    versions = await asyncio.to_thread(service.catalog.page, offset, limit)
    stats = await service.stats()
    data = [
        {
            **describe(version),
            **_tier(version, stats.ram_digests, stats.device_digests),
            "state": version.state if service.catalog.is_served(version) else "other_base",
        }
        for version in versions
    ]
    total = await asyncio.to_thread(service.catalog.registry.count)
    return {"object": "list", "data": data, "offset": offset, "total": total}


@router.get("/{model}")
async def get_adapter(model: str, service: TheService) -> dict[str, Any]:
    ref = parse_model(model)
    version = await asyncio.to_thread(service.catalog.get, ref.name, ref.version)
    stats = await service.stats()
    versions = await asyncio.to_thread(service.catalog.registry.versions, ref.name)
    return {
        **describe(version),
        **_tier(version, stats.ram_digests, stats.device_digests),
        "versions": [v.version for v in versions],
    }


@router.delete("/{model}")
async def delete_adapter(model: str, service: TheService) -> dict[str, Any]:
    """Forget a name with all its versions, or one version. Running requests keep theirs."""
    ref = parse_model(model)
    deleted = await service.delete_adapter(ref.name, ref.version)
    return {"name": ref.name, "deleted": [version.model_id for version in deleted]}


def describe(version: Version) -> dict[str, Any]:
    facts = version.facts
    return {
        "id": version.model_id,
        "object": "adapter",
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "state": version.state,
        "rank": facts.rank,
        "alpha": facts.alpha,
        "use_rslora": facts.use_rslora,
        "target_modules": list(facts.target_modules),
        "num_modules": facts.num_modules,
        "dtype": facts.dtype,
        "bytes": facts.nbytes,
        "files": [file.name for file in FILES if file in REQUIRED or file.name in facts.text_files],
        "profile": facts.profile,
        "created": int(version.created_at.timestamp()),
        "source": version.source,
    }


def _tier(version: Version, ram: tuple[str, ...], device: tuple[str, ...]) -> dict[str, str]:
    return {"tier": "device" if version.digest in device else "ram" if version.digest in ram else "disk"}

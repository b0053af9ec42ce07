"""/v1/adapters: upload, list, look, roll back, delete; who did it, and when."""

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect

from loraplex.api.auth import caller_of
from loraplex.api.errors import is_json
from loraplex.api.multipart import AdapterUpload, boundary_of
from loraplex.api.openai import TheMetrics, TheService
from loraplex.api.paging import Limit, Offset
from loraplex.api.receiving import receive
from loraplex.api.sources import fetch_adapter
from loraplex.api.streaming import ClientGone
from loraplex.api.tiers import describe_standing
from loraplex.errors import InvalidRequest, LoraplexError, ModelNotFound
from loraplex.lora.event import Event
from loraplex.lora.files import FILES, REQUIRED
from loraplex.lora.version import Version
from loraplex.routing.names import parse_model
from loraplex.service import Service
from loraplex.serving.catalog import Catalogued
from loraplex.serving.merging import describe_merge

router = APIRouter(prefix="/v1/adapters")
audit_router = APIRouter(prefix="/v1/audit")


@router.post("", status_code=201)
async def upload(request: Request, service: TheService, metrics: TheMetrics) -> Response:
    """A name and the files of `files.FILES`, or as JSON a name and the source to fetch them from; 201 when the adapter
    is durable and usable, 200 when it was here."""
    try:
        if is_json(request.headers.get("content-type", "")):
            accepted = await fetch_adapter(request, service)
        else:
            accepted = await _upload(request, service)
    except (ClientDisconnect, ClientGone):
        metrics.uploads.labels("broken_off").inc()
        return Response(status_code=499)  # nobody reads it
    except (LoraplexError, HTTPException):
        metrics.uploads.labels("refused").inc()
        raise
    metrics.uploads.labels("created" if accepted.created else "unchanged").inc()
    report = {
        **describe(accepted.version),
        "path": await _path(service, accepted.version),
        "is_new": accepted.created,
        "previous": accepted.previous and accepted.previous.model_id,
        **_checked(accepted),
    }
    return JSONResponse(report, 201 if accepted.created else 200)


async def _upload(request: Request, service: Service) -> Catalogued:
    boundary = boundary_of(request)
    with service.catalog.store.stage() as staging:
        checks = {"name": service.catalog.check_name, "parent": service.catalog.lineage.read}
        body = AdapterUpload(staging, boundary, checks)
        try:
            with service.acceptance.timing("receive"):
                await receive(request, body, service)
                name, parent = body.finish()
        finally:
            body.close()
        return await service.accept_upload(name, staging, caller_of(request), parent=parent)


@router.get("")
async def list_adapters(
    service: TheService,
    offset: Offset = 0,
    limit: Limit = 1000,
) -> dict[str, Any]:
    """What every name means; of a name that has no version for this base its newest incompatible one."""
    versions = await asyncio.to_thread(service.catalog.page, offset, limit)
    stats = await service.stats()
    data = [{**describe(version), **_tier(version, stats.ram_digests, stats.device_digests)} for version in versions]
    total = await asyncio.to_thread(service.catalog.registry.count)
    return {"object": "list", "data": data, "offset": offset, "total": total}


@router.get("/{model}")
async def get_adapter(model: str, service: TheService) -> dict[str, Any]:
    """A version, by default the one that the name means. `path`: what it is the sum of, the root first; `children`:
    those that stand on it; `versions`: all numbers of the name, newest first; `current`: the one it means;
    `incompatible`: those that were checked on another base."""
    ref = parse_model(model)
    registry = service.catalog.registry
    version = await asyncio.to_thread(registry.look, ref.name, ref.version)
    stats = await service.stats()
    versions = await asyncio.to_thread(registry.versions, ref.name)
    current = await _current(service, ref.name)
    return {
        **describe(version),
        "path": await _path(service, version),
        "children": await asyncio.to_thread(registry.parents.children, version),
        **describe_standing(await service.tiers.standing(version)),
        "merge": next((describe_merge(one) for one in stats.merges if one.digest == version.digest), None),
        "report": version.report,
        "proof": version.proof,
        "current": current and current.version,
        "versions": [v.version for v in versions],
        "incompatible": [v.version for v in versions if not service.catalog.is_mine(v)],
    }


class RollbackRequest(BaseModel):
    """`version` None: the one before the last push."""

    model_config = ConfigDict(extra="forbid")

    version: int | None = Field(None, ge=1, lt=2**31, strict=True)


@router.post("/{name}/rollback")
async def roll_back(
    name: str, request: Request, service: TheService, body: RollbackRequest | None = None
) -> dict[str, Any]:
    """Make the name mean an earlier version again. Running requests keep theirs."""
    if parse_model(name).version is not None:
        raise InvalidRequest(f"Roll back a name, not {name[:80]!r}; the version to go to is `version` in the body.")
    change = await service.rollback_adapter(name, body.version if body else None, who=caller_of(request))
    return {**describe(change.version), "previous": change.previous and change.previous.model_id}


@router.delete("/{model}")
async def delete_adapter(model: str, request: Request, service: TheService) -> dict[str, Any]:
    """Forget a name with all its versions for this base, or one version. Running requests keep theirs."""
    ref = parse_model(model)
    deleted = await service.delete_adapter(ref.name, ref.version, who=caller_of(request))
    current = await _current(service, ref.name)
    return {
        "name": ref.name,
        "deleted": [version.model_id for version in deleted],
        "current": current and current.model_id,
    }


@router.get("/{name}/history")
async def history(name: str, service: TheService, offset: Offset = 0, limit: Limit = 100) -> dict[str, Any]:
    """The changes of a name, deleted or not, latest first."""
    return await list_events(service, parse_model(name).name, offset, limit)


@audit_router.get("")
async def audit(service: TheService, offset: Offset = 0, limit: Limit = 100) -> dict[str, Any]:
    """The changes of all names, latest first."""
    return await list_events(service, None, offset, limit)


async def list_events(service: Service, name: str | None, offset: int, limit: int) -> dict[str, Any]:
    events, total = await asyncio.to_thread(service.catalog.history, name, offset, limit)
    return {"object": "list", "data": [_describe_event(event) for event in events], "offset": offset, "total": total}


async def _path(service: Service, version: Version) -> list[str]:
    return [one.model_id for one in await asyncio.to_thread(service.catalog.registry.parents.path, version)]


async def _current(service: Service, name: str) -> Version | None:
    """What the name means, be it in quarantine."""
    try:
        found = await asyncio.to_thread(service.catalog.registry.look, name)
    except ModelNotFound:
        return None
    return found if service.catalog.is_mine(found) else None


def describe(version: Version) -> dict[str, Any]:
    facts = version.facts
    return {
        "id": version.model_id,
        "object": "adapter",
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "state": version.state,
        "parent": version.parent and str(version.parent),
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
        "quarantine": version.quarantine,
    }


def _checked(accepted: Catalogued) -> dict[str, Any]:
    """The report of this upload; its remarks stand by themselves, too."""
    assert accepted.report is not None, "an upload is always checked"
    report = accepted.report.to_json()
    return {
        "report": report,
        "proof": accepted.version.proof,
        "ignored": report["ignored"],
        "notes": report["notes"],
    }


def _describe_event(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "object": "event",
        "at": event.at.isoformat(timespec="milliseconds"),
        "who": event.who,
        "action": event.action,
        "name": event.name,
        "version": event.version,
        **event.detail,
    }


def _tier(version: Version, ram: tuple[str, ...], device: tuple[str, ...]) -> dict[str, str]:
    return {"tier": "device" if version.digest in device else "ram" if version.digest in ram else "disk"}

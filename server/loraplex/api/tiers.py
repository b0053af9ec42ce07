"""/v1/tiers, and pin, unpin, prefetch below /v1/adapters/{model}."""

from dataclasses import asdict
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from loraplex.api.auth import caller_of
from loraplex.api.openai import TheService
from loraplex.api.paging import Limit, Offset
from loraplex.engine.adapter_residency import AdapterStanding
from loraplex.lora.version import Version
from loraplex.routing.names import parse_model

router = APIRouter(prefix="/v1")


@router.get("/tiers")
async def get_tiers(
    service: TheService,
    tier: Literal["device", "ram", "disk"] | None = None,
    offset: Offset = 0,
    limit: Limit = 100,
) -> dict[str, Any]:
    """What stands where now; `data` lists the versions of one tier, or of all, by name."""
    view, rows, total = await service.tiers.view(tier, offset, limit)
    pinned = [one.digest for one in view.standings if one.is_pinned]
    return {
        "object": "tiers",
        "device": {"places": view.num_places, "used": view.num_places_used, "bytes": view.pool_bytes},
        "ram": {
            "bytes": view.ram_bytes,
            "budget": view.ram_budget,
            "pinned_bytes": view.pinned_bytes,
            "reserved_bytes": view.reserved_bytes,
            "adapters": sum(one.tier in ("device", "ram") for one in view.standings),
            "pinned": len(pinned),
        },
        "data": [{**_named(version), **describe_standing(standing)} for version, standing in rows],
        "offset": offset,
        "total": total,
    }


@router.post("/adapters/{model}/pin")
async def pin(model: str, request: Request, service: TheService) -> dict[str, Any]:
    """Keep an adapter in RAM, over restarts. A name's pin follows it to later versions."""
    ref = parse_model(model)
    version = await service.tiers.pin(ref.name, ref.version, who=caller_of(request))
    return {**_named(version), **describe_standing(await service.tiers.standing(version))}


@router.post("/adapters/{model}/unpin")
async def unpin(model: str, request: Request, service: TheService) -> dict[str, Any]:
    """Take the pins of a name back, or that of one version."""
    ref = parse_model(model)
    taken = await service.tiers.unpin(ref.name, ref.version, who=caller_of(request))
    return {"object": "adapter.standing", "name": ref.name, "unpinned": [pin.model for pin in taken]}


class PrefetchRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    to: Literal["ram", "device"] = "ram"


@router.post("/adapters/{model}/prefetch")
async def prefetch(model: str, service: TheService, body: PrefetchRequest | None = None) -> dict[str, Any]:
    """Bring an adapter into RAM, or on to the device, ahead of its first request; answers when it is there."""
    ref = parse_model(model)
    version = await service.tiers.prefetch(ref.name, ref.version, to=body.to if body else "ram")
    return {**_named(version), **describe_standing(await service.tiers.standing(version))}


def _named(version: Version) -> dict[str, Any]:
    return {
        "id": version.model_id,
        "object": "adapter.standing",
        "name": version.name,
        "version": version.version,
        "digest": version.digest,
        "state": version.state,
        "disk_bytes": version.nbytes,
    }


def describe_standing(standing: AdapterStanding) -> dict[str, Any]:
    """For clients; seconds of the past."""
    row = asdict(standing)
    return {
        "tier": row["tier"],
        "ram_bytes": row["nbytes"],
        "leases": row["leases"],
        "pinned": row["is_pinned"],
        "hits": row["uses"],
        "loads": row["loads"],
        "last_use": _rounded(row["seconds_since_use"]),
        "evicted": None
        if row["left"] is None
        else {"why": row["left"], "for": row["left_for"], "seconds_ago": _rounded(row["seconds_since_left"])},
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)

"""Adapters that the server fetches itself: POST /v1/adapters as JSON, vLLM's dialect, and what is under way."""

import asyncio
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraplex.api.auth import caller_of
from loraplex.api.openai import TheMetrics, TheService
from loraplex.api.streaming import ClientGone, unless_gone
from loraplex.errors import InvalidRequest, ModelNotFound
from loraplex.service import Service
from loraplex.serving.catalog import Catalogued

router = APIRouter(prefix="/v1")

MAX_BYTES = 64 << 10


class FromSource(BaseModel):
    """POST /v1/adapters as JSON."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=256)
    source: str = Field(max_length=1024)
    parent: str | None = Field(None, max_length=256)


async def fetch_adapter(request: Request, service: Service) -> Catalogued:
    """The adapter that a JSON body names."""
    body = await read_body(request)
    try:
        wanted = FromSource.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part)[:64] for part in first["loc"])
        raise InvalidRequest(
            f'{where or "the body"}: {first["msg"]}. Send {{"name": …, "source": …}}, or the files as '
            "multipart/form-data.",
            param=where or None,
        ) from None
    return await _fetch(request, service, wanted.name, wanted.source, wanted.parent)


async def _fetch(request: Request, service: Service, name: str, source: str, parent: str | None = None) -> Catalogued:
    """A client that goes away takes its transfer with it: another may have the place."""
    return await unless_gone(request, service.fetching.fetch(name, source, caller_of(request), parent))


async def read_body(request: Request) -> bytes:
    """A small body. Raises 413 beyond MAX_BYTES: the route also takes uploads, so its own limit is far higher."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise HTTPException(413)
    return bytes(body)


@router.get("/transfers")
async def transfers(service: TheService) -> dict[str, Any]:
    """What is being fetched now, and how far it is."""
    rows = [
        {
            "object": "transfer",
            "name": one.name,
            "source": one.source,
            "bytes": one.bytes_done,
            "total": one.bytes_total,
            "tries": one.tries,
            "seconds": round(one.seconds, 3),
        }
        for one in service.fetching.running
    ]
    return {"object": "list", "data": rows}


class LoadLoraAdapter(BaseModel):
    """vLLM's request (vllm/entrypoints/serve/lora/protocol.py); other fields of it mean nothing here."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=1024)
    load_inplace: bool = False


class UnloadLoraAdapter(BaseModel):
    lora_name: str = Field(max_length=256)


@router.post("/load_lora_adapter")
async def load_lora_adapter(
    body: LoadLoraAdapter, request: Request, service: TheService, metrics: TheMetrics
) -> PlainTextResponse:
    """vLLM's way to load an adapter by path; only from where the operator allows it."""
    name = body.lora_name
    if not body.load_inplace and await _is_served(service, name):
        raise InvalidRequest(
            f"The lora adapter {name!r} has already been loaded. Set load_inplace to make what is at the path its next "
            "version.",
            param="lora_name",
        )
    try:
        accepted = await _fetch(request, service, name, body.lora_path)
    except ClientGone:
        metrics.uploads.labels("broken_off").inc()
        return PlainTextResponse("", 499)  # nobody reads it
    metrics.uploads.labels("created" if accepted.created else "unchanged").inc()
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter")
async def unload_lora_adapter(body: UnloadLoraAdapter, request: Request, service: TheService) -> PlainTextResponse:
    """vLLM's way to delete one, with all its versions."""
    await service.delete_adapter(body.lora_name, who=caller_of(request))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


async def _is_served(service: Service, name: str) -> bool:
    service.catalog.check_name(name)
    try:
        await asyncio.to_thread(service.catalog.get, name)
    except ModelNotFound:
        return False
    return True

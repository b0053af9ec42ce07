"""/v1/adapters/{model}/merge and /unmerge: merged weights by request."""

from typing import Any

from fastapi import APIRouter

from loraplex.api.openai import TheService
from loraplex.routing.names import parse_model
from loraplex.serving.merging import describe_merge

router = APIRouter(prefix="/v1/adapters")


@router.post("/{model}/merge")
async def merge(model: str, service: TheService) -> dict[str, Any]:
    """Build W + s·B·A beside the base's weights; answers when steps that are wholly this adapter's run on it. GET
    /v1/adapters/{model} says how far it has come."""
    ref = parse_model(model)
    version, status = await service.merging.merge(ref.name, ref.version)
    return {"id": version.model_id, "object": "adapter.merge", **describe_merge(status)}


@router.post("/{model}/unmerge")
async def unmerge(model: str, service: TheService) -> dict[str, Any]:
    """Drop it, or stop building it."""
    ref = parse_model(model)
    version = await service.merging.unmerge(ref.name, ref.version)
    return {"id": version.model_id, "object": "adapter.merge", "state": "unmerged"}

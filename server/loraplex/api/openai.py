"""/v1/completions, /v1/chat/completions and /v1/models.

Non-streaming folds the stream: there is one way to generate. Shapes: OpenAI's API reference; extras as vLLM has them.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from loraplex.api.auth import tenant_of
from loraplex.api.errors import body_of, error_body
from loraplex.api.metrics import Metrics
from loraplex.api.replies import ChatReply, CompletionReply, Reply
from loraplex.api.schemas import ChatCompletionRequest, CompletionRequest
from loraplex.api.streaming import DONE, ClientGone, EventStream, event, unless_gone
from loraplex.errors import LoraplexError
from loraplex.lora.version import Version
from loraplex.routing.router import Asked
from loraplex.service import Service
from loraplex.serving.generation import Generation
from loraplex.serving.routes import Live

logger = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1")


def service_of(request: Request) -> Service:
    return request.app.state.service


def metrics_of(request: Request) -> Metrics:
    return request.app.state.metrics


TheService = Annotated[Service, Depends(service_of)]
TheMetrics = Annotated[Metrics, Depends(metrics_of)]
Tenant = Annotated[bytes, Depends(tenant_of)]


@router.post("/completions")
async def completions(
    body: CompletionRequest, request: Request, service: TheService, metrics: TheMetrics, tenant: Tenant
) -> Response:
    generation = await service.generate(replace(body.to_service(tenant), asked=asked_of(request, body)))
    return await _answer(body, request, metrics, generation, CompletionReply(generation))


@router.post("/chat/completions")
async def chat_completions(
    body: ChatCompletionRequest, request: Request, service: TheService, metrics: TheMetrics, tenant: Tenant
) -> Response:
    generation = await service.generate(replace(body.to_service(tenant), asked=asked_of(request, body)))
    return await _answer(body, request, metrics, generation, ChatReply(generation))


async def _answer(
    body: CompletionRequest | ChatCompletionRequest,
    request: Request,
    metrics: Metrics,
    generation: Generation,
    reply: Reply,
) -> Response:
    headers = {"x-loraplex-adapter": generation.adapter or generation.model, **_route_headers(generation)}
    if body.ignored_params:
        headers["x-ignored-params"] = ",".join(body.ignored_params)
    if body.stream:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        continuous = bool(options and options.continuous_usage_stats)
        events = _stream(generation, reply, metrics, usage=usage, continuous=continuous)
        return EventStream(events, headers, generation.close)
    try:
        whole = await unless_gone(request, _fold(generation, reply, metrics))
    except ClientGone:
        return Response(status_code=499)  # nobody reads it
    finally:
        await generation.close()
    if generation.adapter and service_of(request).settings.merge != "off":
        headers["x-loraplex-merged-tokens"] = str(generation.usage.merged_tokens)
    return JSONResponse(whole, headers=headers)


def asked_of(request: Request, body: CompletionRequest | ChatCompletionRequest) -> Asked:
    """What a route may decide by."""
    metadata = body.metadata if isinstance(body.metadata, dict) else {}
    user = body.user if isinstance(body.user, str) else None
    return Asked(user, tenant_of(request).hex() or None, request.headers, metadata)


def _route_headers(generation: Generation) -> dict[str, str]:
    routed = generation.routed
    if routed is None:
        return {}
    headers = {"x-loraplex-route": routed.alias}
    if routed.reason is not None:
        headers["x-loraplex-fallback"] = f"{routed.target}: {routed.reason}"
    return headers


async def _fold(generation: Generation, reply: Reply, metrics: Metrics) -> dict[str, Any]:
    with metrics.watching(generation) as watch:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                watch.see(delta)
                reply.add(delta)
    return reply.whole()


async def _stream(
    generation: Generation, reply: Reply, metrics: Metrics, *, usage: bool, continuous: bool
) -> AsyncGenerator[bytes]:
    try:
        for chunk in reply.opening():
            yield event(_with_usage(chunk, reply, usage, continuous))
        with metrics.watching(generation) as watch:
            async with aclosing(generation.deltas()) as deltas:
                async for delta in deltas:
                    watch.see(delta)
                    for chunk in reply.chunks(delta):
                        yield event(_with_usage(chunk, reply, usage, continuous))
        if usage:
            yield event({**reply.frame(), "choices": [], "usage": reply.usage()})
    except LoraplexError as error:
        yield event(body_of(error))
    except Exception as error:
        logger.exception("a stream failed")
        message = f"The server failed unexpectedly ({type(error).__name__}); its log says more."
        yield event(error_body(500, message, "internal_error"))
    yield DONE


def _with_usage(chunk: dict[str, Any], reply: Reply, usage: bool, continuous: bool) -> dict[str, Any]:
    if continuous:
        return {**chunk, "usage": reply.usage()}
    return {**chunk, "usage": None} if usage else chunk


@router.get("/models")
def models(service: TheService) -> dict[str, Any]:
    """The base first, then every adapter by name, then the routes by alias."""
    adapters = [model_card(service, version.name, version) for version in service.catalog.served()]
    routes = [route_card(service, live) for live in service.routes.all()]
    return {"object": "list", "data": [base_card(service), *adapters, *routes]}


@router.get("/models/{model:path}")
def model(model: str, service: TheService) -> dict[str, Any]:
    live = service.routes.find(model)
    if live is not None:
        return route_card(service, live)
    resolved = service.resolve(model)
    return base_card(service) if resolved.adapter is None else model_card(service, model, resolved.adapter)


def base_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.base_name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "loraplex",
        "root": str(service.settings.model),
        "parent": None,
        "max_model_len": service.info.config.max_model_len,
        "permission": [],
    }


def route_card(service: Service, live: Live) -> dict[str, Any]:
    return {
        "id": live.route.alias,
        "object": "model",
        "created": int(live.revision.at.timestamp()),
        "owned_by": "loraplex",
        "root": live.route.alias,
        "parent": service.base_name,
        "max_model_len": service.info.config.max_model_len,
        "permission": [],
        "targets": [target.model for target in live.route.targets],
    }


def model_card(service: Service, name: str, version: Version) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": int(version.created_at.timestamp()),
        "owned_by": "loraplex",
        "root": version.model_id,
        "parent": service.base_name if version.parent is None else str(version.parent),
        "max_model_len": service.info.config.max_model_len,
        "permission": [],
        "profile": version.facts.profile,
    }

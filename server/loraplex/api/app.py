"""create_app: the FastAPI application around a running service."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp

from loraplex import __version__
from loraplex.api import adapters, compare, evaluations, files, merges, openai, routes, sources, tiers, tokens
from loraplex.api.auth import ApiKeyMiddleware, LoopbackGuard
from loraplex.api.edge import EdgeMiddleware
from loraplex.api.errors import install_error_handlers
from loraplex.api.metrics import Metrics
from loraplex.config import LOOPBACK_HOSTS
from loraplex.lora.files import FILES
from loraplex.service import Service

MAX_BODY_BYTES = 8 << 20


class _App(FastAPI):
    """FastAPI with the edge outside of everything, its own error pages and body limit included."""

    def build_middleware_stack(self) -> ASGIApp:
        return EdgeMiddleware(super().build_middleware_stack())


def create_app(service: Service) -> FastAPI:
    settings = service.settings
    # The files and what multipart puts around them; the staging enforces the exact limits.
    upload_bytes = int(settings.max_upload_bytes) + sum(file.max_bytes or 0 for file in FILES) + (2 << 20)
    app = _App(
        title="loraplex",
        version=__version__,
        summary="Many LoRA adapters on one base model",
        max_body_size=max(upload_bytes, MAX_BODY_BYTES),
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.metrics = Metrics(service)
    install_error_handlers(app)
    app.include_router(openai.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(compare.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(adapters.router, max_body_size=upload_bytes)
    app.include_router(files.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(sources.router, max_body_size=sources.MAX_BYTES)
    app.include_router(tiers.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(merges.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(adapters.audit_router, max_body_size=MAX_BODY_BYTES)
    app.include_router(evaluations.router, max_body_size=evaluations.MAX_BODY_BYTES)
    app.include_router(routes.router, max_body_size=MAX_BODY_BYTES)
    app.include_router(tokens.router, max_body_size=MAX_BODY_BYTES)
    _add_probes(app, service)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
    elif settings.host in LOOPBACK_HOSTS:
        app.add_middleware(LoopbackGuard)
    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the process can serve; 503 when its engine died or it is stopping."""
        if not service.engine.is_alive:
            return JSONResponse({"status": "dead", "reason": service.engine.death}, 503)
        if service.is_draining:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        return await health()

    @app.get("/version")
    async def version() -> dict[str, Any]:
        info = service.info
        return {
            "version": __version__,
            "base": service.base_name,
            "model_type": info.model_type,
            "dtype": info.dtype,
            "device": info.device,
            "threads": info.threads,
            # on merged weights a step rounds once more, and its neighbours decide whether it runs on them
            "batch_invariant": info.is_batch_invariant and service.settings.merge == "off",
            "merge": service.settings.merge,
            "max_model_len": info.config.max_model_len,
            "max_loras": info.config.max_loras,
        }

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(await request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)

"""create_app: the FastAPI application around a running service."""

import re
import secrets
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex import __version__
from loraplex.api import adapters, openai, tokens
from loraplex.api.auth import ApiKeyMiddleware
from loraplex.api.errors import install_error_handlers
from loraplex.api.metrics import Metrics
from loraplex.config import LOOPBACK_HOSTS
from loraplex.service import Service

MAX_BODY_BYTES = 8 << 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def create_app(service: Service) -> FastAPI:
    settings = service.settings
    app = FastAPI(
        title="loraplex",
        version=__version__,
        summary="Many LoRA adapters on one base model",
        max_body_size=MAX_BODY_BYTES,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.metrics = Metrics(service)
    install_error_handlers(app)
    app.include_router(openai.router)
    # Two files and what multipart puts around them; the staging enforces the exact limit.
    app.include_router(adapters.router, max_body_size=int(settings.max_upload_bytes) + (2 << 20))
    app.include_router(tokens.router)
    _add_probes(app, service)
    if settings.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=settings.api_key)
    elif settings.host in LOOPBACK_HOSTS:
        # A web page that rebinds its name to 127.0.0.1 must not reach a server without a key.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    app.add_middleware(RequestIdMiddleware)
    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    def health() -> Response:
        """200 while the process can serve; 503 when its engine died or it is stopping."""
        if not service.engine.is_alive:
            return JSONResponse({"status": "dead", "reason": service.engine.death}, 503)
        if service.is_draining:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "5"})
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    def ready() -> Response:
        return health()

    @app.get("/version")
    def version() -> dict[str, Any]:
        info = service.info
        return {
            "version": __version__,
            "base": service.base_name,
            "model_type": info.model_type,
            "dtype": info.dtype,
            "device": info.device,
            "threads": info.threads,
            "batch_invariant": info.is_batch_invariant,
            "max_model_len": info.config.max_model_len,
            "max_loras": info.config.max_loras,
        }

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(await request.app.state.metrics.render(), media_type=CONTENT_TYPE_LATEST)


class RequestIdMiddleware:
    """Every reply carries `x-request-id`: the client's own if it sent a sane one."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Request(scope).headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).append("x-request-id", request_id)
            await send(message)

        await self._app(scope, receive, send_with_id)

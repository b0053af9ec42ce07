"""Who may come in, and which tenant's KV blocks a request may share."""

import hashlib
import hmac
from urllib.parse import urlsplit

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.api.errors import error_body
from loraplex.lora.event import LOCAL

OPEN_PATHS = ("/health", "/ready", "/version")
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")


def tenant_of(request: Request) -> bytes:
    """The salt of the caller's KV blocks: a hash of the key, or b"" where no key is asked for."""
    return getattr(request.state, "tenant", b"")


def caller_of(request: Request) -> str:
    """Who asks, for the audit trail: the beginning of the key's SHA-256, or `LOCAL` where no key is asked for."""
    tenant = tenant_of(request)
    return f"key:{tenant[:4].hex()}" if tenant else LOCAL


class ApiKeyMiddleware:
    """Everything but the probes needs `Authorization: Bearer KEY`. Compared as hashes in constant time."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app = app
        self._digest = hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        header = Headers(scope=scope).get("authorization", "")
        scheme, _, key = header.partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        if scheme.lower() == "bearer" and hmac.compare_digest(digest, self._digest):
            scope.setdefault("state", {})["tenant"] = digest[:16]
            await self._app(scope, receive, send)
            return
        message = "This server asks for an API key: send 'Authorization: Bearer KEY'."
        if header:
            message = "The API key is not the one this server was started with."
        body = error_body(401, message, "invalid_api_key")
        await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)


class LoopbackGuard:
    """Guards a server without a key from the web pages that its user's browser shows.

    A page that rebinds its own name to 127.0.0.1 betrays itself by the Host header; one that posts a form to
    127.0.0.1 (browsers send those without asking) by the Origin header.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            if _host_name(f"//{host}") not in LOOPBACK_NAMES:
                message = (
                    f"The Host header names {host[:100]!r}. A server without --api-key answers only to 127.0.0.1, "
                    "localhost and [::1]; start it with --api-key to use other names."
                )
                await JSONResponse(error_body(400, message, "invalid_host"), 400)(scope, receive, send)
                return
            if origin is not None and _host_name(origin) not in LOOPBACK_NAMES:
                message = "Web pages of other sites may not use a server without --api-key."
                await JSONResponse(error_body(403, message, "forbidden_origin"), 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None

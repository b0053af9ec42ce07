"""One API key: who may come in, and which tenant's KV blocks a request may share."""

import hashlib
import hmac

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex.api.errors import error_body

OPEN_PATHS = ("/health", "/ready", "/version")


def tenant_of(request: Request) -> bytes:
    """The salt of the caller's KV blocks: a hash of the key, or b"" where no key is asked for."""
    return getattr(request.state, "tenant", b"")


class ApiKeyMiddleware:
    """Everything but the probes needs `Authorization: Bearer KEY`. Compared as hashes in constant time."""

    def __init__(self, app: ASGIApp, api_key: str):
        self._app = app
        self._digest = hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        header = Request(scope).headers.get("authorization", "")
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

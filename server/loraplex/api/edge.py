"""EdgeMiddleware: what holds for every reply, whoever made it: a request id, JSON errors, and a body that was read."""

import asyncio
import json
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex.api.errors import TOO_LARGE, error_body

DRAIN_BYTES = 256 << 20
DRAIN_SECONDS = 30.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class EdgeMiddleware:
    """`x-request-id` is the client's own if it sent a sane one.

    Before an error goes out, what the client is still sending is read and thrown away, within bounds. Without that the
    connection would be reset under a client that writes first and reads later: it would never see why it was refused.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its reply."""

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        self._receive = receive
        self._send = send
        self._is_read = False  # the whole body has arrived
        self._waits_for_continue = headers.get("expect", "").lower() == "100-continue"
        self._replaces_body = False

    async def receive(self) -> Message:
        self._waits_for_continue = False
        message = await self._receive()
        self._is_read = self._is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= 400:
                await self._drain()
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._request_id
            if message["status"] == 413 and not headers.get("content-type", "").startswith("application/json"):
                # Starlette's own answer to a large body is plain text.
                body = json.dumps(error_body(413, TOO_LARGE, "request_too_large")).encode()
                headers["content-type"] = "application/json"
                headers["content-length"] = str(len(body))
                await self._send(message)
                await self._send({"type": "http.response.body", "body": body, "more_body": False})
                self._replaces_body = True
                return
        if not self._replaces_body:
            await self._send(message)

    async def _drain(self) -> None:
        if self._waits_for_continue:  # the client asked before sending: it reads the answer first
            return
        size = 0
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self._is_read and size < DRAIN_BYTES:
                    size += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return

"""What the client commands share: requests to the server of LORAPLEX_URL, with LORAPLEX_API_KEY."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any
from urllib.parse import quote

import httpx2

from loraplex.cli.failures import NoServer, ServerRefused, UsageError
from loraplex.config import ClientSettings

_PAGE = 1000
_TIMEOUT = 300
_IDLE_SECONDS = 2
"""Less than the server keeps an idle connection: it never closes one that is being used again."""


def path_of(name: str, below: str = "") -> str:
    """The path of the adapter or version `name`."""
    return f"/v1/adapters/{quote(name, safe='@')}{below}"


def request(method: str, path: str, **kwargs: Any) -> dict[str, Any]:
    """The JSON object of the reply. Raises NoServer, ServerRefused."""
    with _answering() as server:
        return _body(server, server.client.request(method, server.url + path, **kwargs))


def listed(path: str) -> dict[str, Any]:
    """A list that the server gives in pages, whole: one page with the rows of all. Raises as `request`."""
    whole = request("GET", path, params={"offset": 0, "limit": _PAGE})
    while len(whole["data"]) < whole["total"]:
        page = request("GET", path, params={"offset": len(whole["data"]), "limit": _PAGE})
        if not page["data"]:
            break  # some were deleted meanwhile
        whole["data"] += page["data"]
    return whole


@contextmanager
def download(path: str) -> Iterator[httpx2.Response]:
    """A reply whose body is still to be read. Raises ServerRefused; NoServer, also when it breaks off."""
    with _answering() as server:
        with server.client.stream("GET", server.url + path) as reply:
            if reply.status_code >= 400:
                reply.read()
                _body(server, reply)
            yield reply


@contextmanager
def connected() -> Iterator[None]:
    """Commands run within such a block. Their requests share one client, and so its connection."""
    server = _Server()
    token = _server.set(server)
    try:
        yield
    finally:
        _server.reset(token)
        server.close()


class _Server:
    """The one that the settings name. They are read for the first request, and the client is made for it: its SSL
    context alone takes longer than that."""

    @cached_property
    def _settings(self) -> ClientSettings:
        return ClientSettings()

    @cached_property
    def url(self) -> str:
        url = self._settings.url.rstrip("/")
        if not url.lower().startswith(("http://", "https://")):
            hint = "" if "://" in url else f", as http://{url}"
            raise UsageError(f"LORAPLEX_URL is {self._settings.url!r}. Let it begin with http:// or https://{hint}.")
        return url

    @cached_property
    def client(self) -> httpx2.Client:
        key = self._settings.api_key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(keepalive_expiry=_IDLE_SECONDS)
        return httpx2.Client(headers=headers, timeout=_TIMEOUT, limits=limits)

    def close(self) -> None:
        if "client" in self.__dict__:
            self.client.close()


_server: ContextVar[_Server] = ContextVar("server")  # of the block `connected` that runs


@contextmanager
def _answering() -> Iterator[_Server]:
    server = _server.get()
    try:
        yield server
    except httpx2.InvalidURL as error:
        raise UsageError(f"LORAPLEX_URL is {server.url!r}, and that is no address: {error}.") from error
    except httpx2.TransportError as error:
        raise NoServer(
            f"No server answers at {server.url} ({error}). Start one with 'loraplex serve', or set LORAPLEX_URL."
        ) from error


def _body(server: _Server, reply: httpx2.Response) -> dict[str, Any]:
    status = reply.status_code
    try:
        body = reply.json()
    except ValueError as error:
        message = f"{server.url} answered {status} and no JSON."
        raise (ServerRefused(message, status) if status >= 400 else NoServer(message)) from error
    if status >= 400:
        try:
            error = body["error"]
            raise ServerRefused(error["message"], status, code=error.get("code"), param=error.get("param"))
        except (KeyError, TypeError, AttributeError):
            raise ServerRefused(f"{server.url} answered {status}: {str(body)[:200]}", status) from None
    return body

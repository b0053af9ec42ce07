"""What the client commands share: one request to the server of LORAPLEX_URL, with LORAPLEX_API_KEY."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from urllib.parse import quote

import httpx2
import typer

from loraplex.config import ClientSettings
from loraplex.errors import LoraplexError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class ServerRefused(LoraplexError):
    """The server answered with an error, or there is none."""

    code = "server_refused"


def path_of(name: str, below: str = "") -> str:
    """The path of the adapter or version `name`."""
    return f"/v1/adapters/{quote(name, safe='@')}{below}"


def request(method: str, path: str, **kwargs: Any) -> dict[str, Any]:
    """The JSON object of the reply. Raises ServerRefused."""
    with _answering() as settings:
        reply = httpx2.request(method, _url(settings, path), headers=_headers(settings), timeout=300, **kwargs)
    return _body(settings, reply)


@contextmanager
def download(path: str) -> Iterator[httpx2.Response]:
    """A reply whose body is still to be read. Raises ServerRefused, also when it breaks off."""
    with _answering() as settings:
        with httpx2.stream("GET", _url(settings, path), headers=_headers(settings), timeout=300) as reply:
            if reply.status_code >= 400:
                reply.read()
                _body(settings, reply)
            yield reply


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


@contextmanager
def _answering() -> Iterator[ClientSettings]:
    settings = ClientSettings()
    try:
        yield settings
    except (httpx2.TransportError, httpx2.InvalidURL) as error:
        raise ServerRefused(
            f"No server answers at {settings.url} ({error}). Start one with 'loraplex serve', or set LORAPLEX_URL."
        ) from error


def _url(settings: ClientSettings, path: str) -> str:
    return settings.url.rstrip("/") + path


def _headers(settings: ClientSettings) -> dict[str, str]:
    return {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}


def _body(settings: ClientSettings, reply: httpx2.Response) -> dict[str, Any]:
    try:
        body = reply.json()
    except json.JSONDecodeError as error:
        raise ServerRefused(f"{settings.url} answered {reply.status_code} and no JSON.") from error
    if reply.status_code >= 400:
        try:
            message = body["error"]["message"]
        except (KeyError, TypeError):
            message = f"{settings.url} answered {reply.status_code}: {str(body)[:200]}"
        raise ServerRefused(message)
    return body

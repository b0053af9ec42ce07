"""HubSource: an adapter's files in a repository of a hub that speaks Hugging Face's dialect, at one commit.

Two routes of it are used: /api/models/{repo}/revision/{revision} and /{repo}/resolve/{commit}/{file}. Not through
huggingface_hub's downloads: those write to a cache of their own, and this process keeps that library offline.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx2

from loraplex.errors import AdapterInvalid, SourceFailed, SourceNotFound, SourceUnavailable
from loraplex.lora.files import FILES, REQUIRED, AdapterFile
from loraplex.lora.headers import refuse_pickle_name
from loraplex.lora.staging import Staging
from loraplex.sources.transfer import Transfer

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_INFO_BYTES = 4 << 20


class HubSource:
    """`repository` and `revision` are of the patterns above. `token`: the server's own, None for public ones."""

    def __init__(self, endpoint: str, repository: str, revision: str = "main", token: str | None = None):
        self._endpoint = endpoint.rstrip("/")
        self._repository = repository
        self._revision = revision
        self._token = token
        self._commit: str | None = None  # what the revision was when it was fetched

    @property
    def shown(self) -> str:
        return f"hf://{self._repository}@{self._commit or self._revision}"

    def fetch(self, staging: Staging, transfer: Transfer) -> None:
        headers = {"accept-encoding": "identity"}
        if self._token is not None:
            headers["authorization"] = f"Bearer {self._token}"  # not sent on to other hosts after a redirect
        left = max(0.1, transfer.seconds_left)  # a hub that falls silent is not waited for beyond the end
        timeout = httpx2.Timeout(min(30.0, left), connect=min(5.0, left))
        with httpx2.Client(headers=headers, timeout=timeout, follow_redirects=True, trust_env=False) as client:
            info = self._info(client, transfer)
            commit = str(info.get("sha", ""))
            if not _COMMIT.fullmatch(commit):
                raise SourceFailed(f"The hub's answer about {self.shown} names no commit.")
            names = {str(one.get("rfilename")) for one in info.get("siblings") or [] if isinstance(one, dict)}
            self._check(names)
            self._commit = commit
            for file in FILES:
                if file.name in names:
                    self._copy(client, commit, file, staging, transfer)

    def _info(self, client: httpx2.Client, transfer: Transfer) -> dict[str, Any]:
        body = bytearray()
        path = f"/api/models/{self._repository}/revision/{quote(self._revision, safe='')}"
        with self._reply(client, path) as reply:
            for chunk in reply.iter_bytes():
                transfer.check()
                body += chunk
                if len(body) > _MAX_INFO_BYTES:
                    raise SourceFailed(f"The hub says more about {self.shown} than {_MAX_INFO_BYTES} bytes.")
        try:
            info = json.loads(bytes(body))
        except ValueError:
            info = None
        if not isinstance(info, dict):
            raise SourceFailed(f"The hub's answer about {self.shown} is no JSON object.")
        return info

    def _check(self, names: set[str]) -> None:
        missing = [file.name for file in REQUIRED if file.name not in names]
        if missing:
            for name in sorted(names):
                if name.startswith("adapter_"):
                    refuse_pickle_name(name)
            raise AdapterInvalid(f"{self.shown} is not a PEFT adapter: it lacks {' and '.join(missing)}.")

    def _copy(
        self, client: httpx2.Client, commit: str, file: AdapterFile, staging: Staging, transfer: Transfer
    ) -> None:
        with self._reply(client, f"/{self._repository}/resolve/{commit}/{file.name}") as reply:
            size = reply.headers.get("content-length", "")
            if not size.isdecimal():
                raise SourceFailed(f"The hub does not say how large {file.name} of {self.shown} is.")
            # as they come: in larger pieces a slow hub would keep a transfer from noticing that its time is over
            transfer.write(staging, file, int(size), reply.iter_bytes())

    @contextmanager
    def _reply(self, client: httpx2.Client, path: str) -> Iterator[httpx2.Response]:
        try:
            with client.stream("GET", self._endpoint + path) as reply:
                if reply.status_code == 404:
                    raise SourceNotFound(f"The hub has no {self.shown}, or not for this server.")
                if reply.status_code in (401, 403):
                    raise SourceFailed(f"{self.shown} may not be read by this server. Set LORAPLEX_HUB_TOKEN.")
                if reply.status_code == 429 or reply.status_code >= 500:
                    raise SourceUnavailable(f"The hub answered {reply.status_code} for {self.shown}.")
                if reply.status_code != 200:
                    raise SourceFailed(f"The hub answered {reply.status_code} for {self.shown}.")
                yield reply
        except httpx2.TransportError as cause:
            raise SourceUnavailable(f"The hub broke off at {self.shown} ({type(cause).__name__}).") from None

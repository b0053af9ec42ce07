"""ServerUnderTest: what an OpenAI-compatible server tells beside generating text; a loraplex one tells more."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from loraplex.errors import LoraplexError

PAGE = 1000


class BenchFailed(LoraplexError):
    """The measurement cannot be made: no server, or one that does not do what was asked for."""

    code = "bench_failed"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """`version`: the reply of /version of a loraplex server, empty of any other. `base`: the name of the base model.
    `models`: all names, the base first. `root`: the base's folder, if that is on this machine."""

    version: Mapping[str, Any]
    base: str
    models: Sequence[str]
    root: Path | None

    @property
    def is_loraplex(self) -> bool:
        return bool(self.version)

    @property
    def adapters(self) -> list[str]:
        return [name for name in self.models if name != self.base]


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """`num_values`: of all A and B, as the size of its files tells."""

    rank: int
    num_values: float


class ServerUnderTest:
    """Use as `async with`. `url` without /v1."""

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 600.0):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = httpx2.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=30.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> "ServerUnderTest":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    @property
    def is_local(self) -> bool:
        return httpx2.URL(self.url).host in ("127.0.0.1", "localhost", "::1")

    async def look(self) -> ServerFacts:
        """Raises BenchFailed when nothing answers, or not as OpenAI's API does."""
        cards = (await self._json("GET", "/v1/models")).get("data")
        if not cards:
            raise BenchFailed(f"{self.url}/v1/models names no model.")
        version = await self._optional("/version")
        is_loraplex = "max_loras" in version and "base" in version
        bases = [card for card in cards if card.get("parent") is None]
        base = (bases or cards)[0]
        root = base.get("root")
        folder = Path(root) if isinstance(root, str) and self.is_local else None
        has_root = folder is not None and (folder / "config.json").is_file()
        names = [base["id"], *(card["id"] for card in cards if card is not base)]
        return ServerFacts(version if is_loraplex else {}, base["id"], names, folder if has_root else None)

    async def adapters(self) -> dict[str, AdapterRow]:
        """The newest version of every adapter of a loraplex server."""
        rows: dict[str, AdapterRow] = {}
        newest: dict[str, int] = {}
        offset = total = 0
        while not offset or offset < total:
            page = await self._json("GET", "/v1/adapters", params={"offset": offset, "limit": PAGE})
            for row in page["data"]:
                if row["version"] >= newest.get(row["name"], 0):
                    newest[row["name"]] = row["version"]
                    value_bytes = 4 if "F32" in row["dtype"] else 2
                    rows[row["name"]] = AdapterRow(row["rank"], row["bytes"] / value_bytes)
            total = page["total"]
            offset += PAGE
        return rows

    async def push(self, name: str, folder: Path) -> None:
        """Upload the PEFT folder. Raises BenchFailed with the server's own words."""
        files = {
            part: (file, (folder / file).read_bytes())
            for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors"))
        }
        await self._json("POST", "/v1/adapters", data={"name": name}, files=files)

    async def token_ids(self, text: str, model: str) -> list[int] | None:
        """`text` as the server's tokens (/tokenize of vLLM, loraplex and llama.cpp), None where it cannot say."""
        body = {"model": model, "prompt": text, "content": text}
        try:
            reply = await self.http.post("/tokenize", json=body)
            ids = reply.json()["tokens"] if reply.is_success else None
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return None
        is_ids = isinstance(ids, list) and bool(ids) and all(isinstance(token, int) for token in ids)
        return ids if is_ids else None

    async def counters(self) -> dict[str, float]:
        """Counters of /metrics by name, their labels summed; empty where the server has none."""
        try:
            reply = await self.http.get("/metrics")
            families = list(text_string_to_metric_families(reply.text)) if reply.is_success else []
        except (httpx2.HTTPError, ValueError):
            return {}
        totals: dict[str, float] = {}
        for family in families:
            for sample in family.samples:
                if family.type == "counter" and sample.name.endswith("_total"):
                    totals[family.name] = totals.get(family.name, 0.0) + sample.value
        return totals

    async def _optional(self, path: str) -> dict[str, Any]:
        try:
            reply = await self.http.get(path)
            body = reply.json() if reply.is_success else {}
        except (httpx2.HTTPError, ValueError):
            return {}
        return body if isinstance(body, dict) else {}

    async def _json(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            reply = await self.http.request(method, path, **kwargs)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise BenchFailed(f"No server answers at {self.url} ({error or type(error).__name__}).") from error
        if not reply.is_success:
            raise BenchFailed(
                f"{method} {path} was answered with {describe_refusal(reply.status_code, reply.content)}."
            )
        try:
            body = reply.json()
        except ValueError as error:
            raise BenchFailed(f"{self.url}{path} did not answer with JSON.") from error
        if not isinstance(body, dict):
            raise BenchFailed(f"{self.url}{path} did not answer as OpenAI's API does.")
        return body


def describe_refusal(status: int, content: bytes) -> str:
    """ "HTTP 404 model_not_found: ..." from OpenAI's error object, as far as there is one."""
    try:
        error = json.loads(content)["error"]
        code, message = error.get("code") or error.get("type") or "", error.get("message") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"HTTP {status}"
    return f"HTTP {status} {code}: {str(message)[:200]}".replace(" :", ":")

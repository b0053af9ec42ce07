"""The disk tier driven by the operations of `registry_model`: store and registry as `AdapterCatalog.accept` uses them,
without torch, so that a process that holds it starts and forks fast."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from registry_model import CONTENTS, alias_of, child_of

from loraplex.errors import AdapterConflict, ModelNotFound
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, file_sha256
from loraplex.lora.event import ROUTE_DELETE, ROUTE_SET
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.registry import Registry
from loraplex.lora.steps import Step, unwatched
from loraplex.lora.store import AdapterStore
from loraplex.routing.names import ModelRef

CONFIG_BYTES = b"config"
FACTS = AdapterFacts(8, 16.0, True, 14, ("q_proj",), "BF16", 12345, 678)


def digest_of(content: int) -> str:
    return adapter_digest(hashlib.sha256(CONFIG_BYTES).digest(), hashlib.sha256(CONTENTS[content]).digest())


CONTENT_OF = {digest_of(content): content for content in range(len(CONTENTS))}


class DiskTier:
    """Store and registry of one process."""

    def __init__(self, root: Path, url: str, step: Step = unwatched):
        self.store = AdapterStore(root, step=step)
        self.registry = Registry(url, "base", step)
        self.store.bind(self.registry.identity)

    def do(self, verb: str, name: str, number: int | None) -> None:
        """An operation. What is refused because of what the name is changes nothing."""
        getattr(self, f"_{verb}")(name, number)

    def _child(self, name: str, content: int) -> None:
        with suppress(ModelNotFound):
            self._push(child_of(name), content, self.registry.get(name).ref)

    def _prune(self, name: str, version: int | None) -> None:
        self._delete(child_of(name), version)

    def _push(self, name: str, content: int, parent: ModelRef | None = None) -> None:
        with self.store.stage() as staging:
            for file, data in ((CONFIG, CONFIG_BYTES), (WEIGHTS, CONTENTS[content])):
                with staging.open(file) as stream:
                    stream.write(data)
            digest = self.store.commit(staging)
            self.registry.publish(name, digest, FACTS, source="upload", who="me", parent=parent)

    def _rollback(self, name: str, to: int | None) -> None:
        with suppress(AdapterConflict, ModelNotFound):
            self.registry.rollback(name, to, who="me")

    def _delete(self, name: str, version: int | None) -> None:
        with suppress(AdapterConflict, ModelNotFound):
            self.registry.delete(name, version, who="me")
        self._sweep(name, None)

    def _sweep(self, name: str, number: int | None) -> None:
        self.store.sweep(self.registry.live_digests)

    def _route(self, name: str, number: int | None) -> None:
        action = ROUTE_DELETE if number is None else ROUTE_SET
        document = None if number is None else {"number": number}
        with suppress(ModelNotFound):
            self.registry.routes.change(alias_of(name), lambda was: document, who="me", action=action)

    def _damage(self, name: str, content: int) -> None:
        """The disk loses something. Whoever pushes the content next repairs it."""
        path = self.store.path(digest_of(content)) / WEIGHTS_NAME
        if path.exists():
            path.write_bytes(b"damaged")

    def seen(self) -> dict[str, Any]:
        """What the registry says, in the words of `RegistryModel.seen`."""
        names: dict[str, Any] = {}
        for one in self.registry.list():
            found = self.registry.versions(one.name)
            versions = {v.version: (CONTENT_OF[v.digest], v.parent and v.parent.version) for v in found}
            names[one.name] = {
                "versions": dict(sorted(versions.items())),
                "current": self.registry.get(one.name).version,
            }
        routes = {one.alias: (one.revision, number_of(one.document)) for one in self.registry.routes.list()}
        events = [
            (event.action, event.name, event.version, *(number_of(event.detail[key]) for key in ("was", "now")))
            for event in reversed(self.registry.events()[0])
        ]
        return {"names": names, "routes": routes, "events": events}

    def broken(self, digests: frozenset[str]) -> set[int]:
        """The contents among `digests` whose blob is not whole."""
        return {CONTENT_OF[digest] for digest in digests if not self._is_whole(digest)}

    def _is_whole(self, digest: str) -> bool:
        folder = self.store.path(digest)
        try:
            return adapter_digest(file_sha256(folder / CONFIG_NAME), file_sha256(folder / WEIGHTS_NAME)) == digest
        except OSError:
            return False

    @property
    def staged(self) -> list[str]:
        return [path.name for path in (self.store.blobs.parent / "staging").iterdir()]

    def close(self) -> None:
        self.registry.close()
        self.store.close()


@contextmanager
def opened(root: Path, url: str, step: Step = unwatched) -> Iterator[DiskTier]:
    tier = DiskTier(root, url, step)
    try:
        yield tier
    finally:
        tier.close()


def number_of(meant: str | Mapping[str, int] | None) -> int | None:
    """Of "name@3", or of the document of a route."""
    if isinstance(meant, str):
        return int(meant.partition("@")[2])
    return None if meant is None else meant["number"]

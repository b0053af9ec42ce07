"""AdapterCatalog: the disk tier's two halves as one: blobs by digest and versions by name, for the base that is served.

    staged files ──check──> blob (durable) ──publish──> name@version (durable) = accepted

What stands between the two, the proof, is `acceptance`'s. Synchronous and thread-safe; called from worker threads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import URL

from loraplex.engine.build import EngineInfo
from loraplex.errors import AdapterConflict, AdapterLoadFailed, AdapterQuarantined, AdapterTooLarge
from loraplex.lora.event import SERVER, Event
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.reader import AdapterReader, Checked
from loraplex.lora.registry import Change, Registry
from loraplex.lora.report import AdapterReport, BaseFacts, report_on
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.lora.version import QUARANTINED, READY, Version
from loraplex.routing.names import ModelRef, validate_name
from loraplex.serving.lineage import Lineage
from loraplex.serving.proof_record import is_proof_for
from loraplex.text.adapter_text import Brought


@dataclass(frozen=True, slots=True)
class Prepared:
    """A checked adapter whose files are a blob; no version names it yet. `path`: what it stands on, the root first."""

    name: str
    digest: str
    facts: AdapterFacts
    report: AdapterReport
    path: tuple[Version, ...] = ()


@dataclass(frozen=True, slots=True)
class Catalogued:
    """An accepted adapter. `created` False: the name had a version with these very files already. `previous`: what the
    name meant before (None: nothing). `report` None: it was known and not checked again."""

    version: Version
    created: bool
    previous: Version | None = None
    report: AdapterReport | None = None


class AdapterCatalog:
    """`reader` is the engine's own: it compares with the base's weights. `max_depth`: see `Lineage`. Raises
    StartupError when the registry cannot be opened, or is not that of the store's blobs."""

    def __init__(
        self,
        store: AdapterStore,
        registry_url: str | URL,
        info: EngineInfo,
        reader: AdapterReader,
        base_name: str,
        max_depth: int = 4,
    ):
        self.store = store
        self.registry = Registry(registry_url, info.fingerprint)
        try:
            store.bind(self.registry.identity)
        except BaseException:
            self.registry.close()
            raise
        self.lineage = Lineage(self.registry, info, base_name, max_depth)
        self._info = info
        self._base_name = base_name
        self._reader = reader

    @property
    def bytes_per_value(self) -> int:
        """Of the dtype that is computed in."""
        return self._info.bytes_per_value

    def close(self) -> None:
        self.registry.close()

    def __enter__(self) -> "AdapterCatalog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- in ---------------------------------------------------------------------------------------------------

    def check_name(self, name: str) -> str:
        """Raises InvalidName, or AdapterConflict for the base's name and that of a route."""
        if validate_name(name) == self._base_name:
            raise AdapterConflict(f"{name!r} is the name of the base model; choose another one.", param="name")
        self.registry.routes.refuse_alias(name)
        return name

    def prepare(self, name: str, staging: Staging, brought: Brought, parent: str | None = None) -> Prepared:
        """Check staged files and make them a blob, durably, which `staging` holds until it ends. `brought`: what their
        text side says; `parent`: what they stand on, if it does not. Raises AdapterError and kin; then nothing is
        kept."""
        self.check_name(name)
        parent = brought.parent if parent is None else parent
        path = () if parent is None else self.lineage.choose(name, parent)
        staging.leave_out(brought.unneeded)
        checked = self._reader.check(staging.folder, staging.digest)
        self._check_size(checked)
        self.lineage.check_sum(path, checked.weights)
        brought.check_rows(checked.plan.trained_tokens)
        profile = None if brought.profile is None else brought.profile.shown()
        report = self._report(checked, brought.notes)
        digest = self.store.commit(staging)
        facts = replace(checked.facts, text_files=staging.text_files, profile=profile)
        return Prepared(name, digest, facts, report, path)

    def publish(self, prepared: Prepared, proof: dict[str, Any] | None, source: str, who: str) -> Catalogued:
        """Make a prepared adapter what its name means, durably. `proof`: its record; None: it was not asked for."""
        change = self.registry.publish(
            prepared.name,
            prepared.digest,
            prepared.facts,
            source=source,
            who=who,
            report=prepared.report.to_json(),
            proof=proof,
            parent=prepared.path[-1].ref if prepared.path else None,
        )
        return Catalogued(change.version, change.is_new, change.previous, prepared.report)

    def withdraw(self, staging: Staging) -> None:
        """The counterpart of `prepare`, when nothing was published: the blob goes, unless someone else needs it."""
        self.store.let_go(staging)
        self.sweep()

    def known(self, name: str, digest: str, parent: str | None = None) -> Version | None:
        """The version of `name` on this base that is made of these files and stands on a version that `parent` means or
        meant. A restart must not put a folder's files back above a version that was uploaded since."""
        self.check_name(name)
        ref = None if parent is None else self.lineage.read(parent)
        wanted = None if ref == ModelRef(self._base_name) else ref
        found = (v for v in self.registry.versions(name) if v.digest == digest and self.is_mine(v))
        return next((v for v in found if v.parent == wanted or (v.parent and ModelRef(v.parent.name) == wanted)), None)

    def proof_of(self, digest: str) -> dict[str, Any] | None:
        """The record of a proof of these files that still holds: by this release, on this base as it is served; without
        what it says of adapters they stood on."""
        for proof in self.registry.proofs(digest):
            if is_proof_for(proof, self._info):
                return {key: value for key, value in proof.items() if key != "path"}
        return None

    def _report(self, checked: Checked, notes: tuple[str, ...]) -> AdapterReport:
        info = self._info
        return report_on(
            checked.config,
            checked.plan,
            info.targets,
            BaseFacts(info.model_type, info.vocab_size, info.fingerprint),
            dtype=checked.dtype,
            compute_dtype=info.dtype,
            value_bytes=info.bytes_per_value,
            disk_bytes=checked.nbytes,
            on_device=not info.device.startswith("cpu"),
            notes=notes,
        )

    def _check_size(self, checked: Checked) -> None:
        budget = self._info.config.adapter_cache_bytes
        if checked.weights.nbytes > budget:
            raise AdapterTooLarge(
                f"The adapter needs {checked.weights.nbytes} bytes in RAM and the whole adapter cache has {budget}; it "
                f"could never be served. Start the server with --adapter-cache-bytes {checked.weights.nbytes} or more."
            )

    # -- out --------------------------------------------------------------------------------------------------

    def get(self, name: str, version: int | None = None) -> Version:
        """Raises ModelNotFound, also for a version that was made for another base."""
        return self.registry.get(name, version)

    def path(self, version: Version) -> tuple[Version, ...]:
        """What `version` is the sum of, the root first, itself last. Raises AdapterQuarantined for those it stands
        on."""
        path = self.registry.parents.path(version)
        for one in path[:-1]:
            if one.state == QUARANTINED:
                raise AdapterQuarantined(
                    f"{version.model_id!r} stands on {one.model_id!r}, which is in quarantine: "
                    f"{(one.quarantine or {}).get('reason', 'it failed while it ran')} Push the files of "
                    f"{one.model_id!r} again, to have them proven anew, or push {version.name!r} with another parent.",
                    param="model",
                )
        return path

    def names(self) -> list[str]:
        return [version.name for version in self.served()]

    def served(self) -> list[Version]:
        """What every name means, without names that have no version for this base."""
        return [version for version in self.page() if self.is_served(version)]

    def is_served(self, version: Version) -> bool:
        return version.state == READY

    def is_mine(self, version: Version) -> bool:
        """Whether the version was made for the base that is served."""
        return version.base_fingerprint == self._info.fingerprint

    def page(self, offset: int = 0, limit: int | None = None) -> Sequence[Version]:
        return self.registry.list(offset, limit)

    def hold(self, digest: str) -> AbstractContextManager[Path]:
        """Keep the adapter's files on disk for the length of a `with` block."""
        return self.store.hold(digest)

    @contextmanager
    def holding(self, find: Callable[[], Version]) -> Iterator[tuple[Version, Path]]:
        """The version that `find` gives, and the folder of its files, which stay for the length of a `with` block.
        Raises as `find`, and AdapterLoadFailed when the disk has lost them."""
        while True:
            found = find()
            try:
                folder = self.store.acquire(found.digest)
                break
            except AdapterLoadFailed:
                if find() == found:  # else it was deleted or replaced between the two lines above
                    raise
        try:
            yield found, folder
        finally:
            self.store.release(found.digest)

    def history(self, name: str | None, offset: int, limit: int) -> tuple[Sequence[Event], int]:
        """The changes of `name`, or of all, latest first, and how many there are. Raises ModelNotFound."""
        return self.registry.events(name, offset, limit)

    def rollback(self, name: str, to: int | None = None, *, who: str) -> Change:
        """Make `name` mean what it meant before the last push, or the version `to`."""
        return self.registry.rollback(name, to, who=who)

    def delete(self, name: str, version: int | None = None, *, who: str) -> Sequence[Version]:
        return self.registry.delete(name, version, who=who)

    def quarantine(self, digest: str, reason: str) -> Sequence[Version]:
        """Serve nothing that is made of these files, until a push of them is proven again."""
        return self.registry.quarantine(digest, reason, who=SERVER)

    def unnamed(self, digests: Iterable[str]) -> list[str]:
        """Those of `digests` that no ready version names any more."""
        live = self.registry.live_digests()
        return [digest for digest in dict.fromkeys(digests) if digest not in live]

    def sweep(self) -> list[str]:
        """Remove the blobs that nothing names or holds."""
        return self.store.sweep(self.registry.live_digests)

    def check_integrity(self) -> None:
        self.store.check_integrity()
        self.registry.check_integrity()
        missing = self.missing()
        assert not missing, f"versions without files: {sorted(missing)}"

    def missing(self) -> frozenset[str]:
        """The digests that a version names and the store has not: the disk lost them."""
        return self.registry.live_digests() - self.store.digests()

"""AdapterCatalog: the disk tier's two halves as one: blobs by digest and versions by name, for the base that is served.

    staged files ──check──> blob (durable) ──publish──> name@version (durable) = accepted

Synchronous and thread-safe; the service calls it from worker threads.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from loraplex.engine.build import EngineInfo
from loraplex.errors import AdapterConflict, AdapterTooLarge, ModelNotFound
from loraplex.lora.reader import AdapterReader, Checked
from loraplex.lora.registry import Registry, sqlite_url
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.lora.version import Version
from loraplex.routing.names import validate_name
from loraplex.text.adapter_text import Brought

REGISTRY_FILE = "registry.sqlite"


@dataclass(frozen=True, slots=True)
class Catalogued:
    """An accepted adapter. `created` False: the name's newest version had these very files already. `ignored`: fields
    of its config without effect on inference, each with the reason; `notes`: remarks for whoever sent it."""

    version: Version
    created: bool
    ignored: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


class AdapterCatalog:
    """`reader` is the engine's own: it compares with the base's weights."""

    def __init__(self, store: AdapterStore, data_dir: Path, info: EngineInfo, reader: AdapterReader, base_name: str):
        self.store = store
        self.registry = Registry(sqlite_url(data_dir / REGISTRY_FILE))
        self._info = info
        self._base_name = base_name
        self._reader = reader

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
        """Raises InvalidName, or AdapterConflict for the base's name."""
        if validate_name(name) == self._base_name:
            raise AdapterConflict(f"{name!r} is the name of the base model; choose another one.", param="name")
        return name

    def accept(self, name: str, staging: Staging, brought: Brought, source: str) -> Catalogued:
        """Check staged files and make them the newest version of `name`, durably. `brought`: what their text side says.
        Raises AdapterError and kin; then nothing is kept."""
        self.check_name(name)
        staging.leave_out(brought.unneeded)
        checked = self._reader.check(staging.folder)
        self._check_size(checked)
        brought.check_rows(checked.plan.trained_tokens)
        profile = None if brought.profile is None else brought.profile.shown()
        digest = self.store.commit(staging)
        version, created = self.registry.publish(
            name,
            digest,
            replace(checked.facts, text_files=staging.text_files, profile=profile),
            base_fingerprint=self._info.fingerprint,
            source=source,
            new_version=True,
        )
        return Catalogued(version, created, checked.config.ignored, (*checked.plan.notes, *brought.notes))

    def add_folder(self, name: str, folder: Path, brought: Brought) -> Catalogued:
        """Register an operator's PEFT folder as `name`."""
        self.check_name(name)
        with self.store.import_folder(folder, brought.unneeded) as staging:
            for version in self.registry.versions(name):
                # A restart must not put the folder's files back above a version that was uploaded since.
                if (version.digest, version.base_fingerprint) == (staging.digest, self._info.fingerprint):
                    return Catalogued(version, False)
            return self.accept(name, staging, brought, source=f"folder:{folder.name}")

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
        found = self.registry.get(name, version)
        if not self.is_served(found):
            raise ModelNotFound(
                f"{found.model_id!r} was checked on another base model than the one served now, so it is not served. "
                "Push it again to have it checked on this one.",
                param="model",
                code="adapter_incompatible",
            )
        return found

    def names(self) -> list[str]:
        return [version.name for version in self.served()]

    def served(self) -> list[Version]:
        """The newest version of every name, without those that were made for another base."""
        return [version for version in self.page() if self.is_served(version)]

    def is_served(self, version: Version) -> bool:
        return version.base_fingerprint == self._info.fingerprint

    def page(self, offset: int = 0, limit: int | None = None) -> Sequence[Version]:
        return self.registry.list(offset, limit)

    def hold(self, digest: str) -> AbstractContextManager[Path]:
        """Keep the adapter's files on disk for the length of a `with` block."""
        return self.store.hold(digest)

    def delete(self, name: str, version: int | None = None) -> Sequence[Version]:
        return self.registry.delete(name, version)

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
        missing = self.registry.live_digests() - self.store.digests()
        assert not missing, f"versions without files: {sorted(missing)}"

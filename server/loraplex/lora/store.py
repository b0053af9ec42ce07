"""AdapterStore: accepted adapters on disk, by digest. Several processes may use one folder.

    root/blobs/<digest>/adapter_config.json, …         the files of `files.FILES`; complete, durable, never changed
    root/staging/<process>.<random>/   uploads on their way and blobs on their way out; the dead's are swept
    root/locks                         who holds which blob, which process lives (`NameLocks`)
    root/registry                      the identity of the registry whose versions these blobs are

Accepted means durable: files are synced, then their folder, then it is renamed into `blobs`, then `blobs` is
synced (a rename without that can be lost; Pillai et al., OSDI 2014). A blob goes only by `sweep`, when no
version and no hold of any process names it. Names never become paths; only digests do.
"""

import os
import shutil
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from loraplex.errors import AdapterInvalid, AdapterLoadFailed, StartupError, StorageFull
from loraplex.lora.digest import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    adapter_digest,
    file_sha256,
    open_regular,
    read_chunks,
    text_sha256,
    validate_digest,
)
from loraplex.lora.files import CONFIG, TEXT_FILES, WEIGHTS
from loraplex.lora.headers import refuse_pickle_name
from loraplex.lora.locks import NameLocks
from loraplex.lora.staging import StagedFile, Staging, fsync_folder, storage_full
from loraplex.lora.steps import Step, unwatched
from loraplex.lora.text import shown


class AdapterStore:
    """The blobs below `root`. Any thread may call any method.

    `max_weights_bytes` bounds an upload's weights file; below `min_free_bytes` of free space nothing new is
    taken. Raises StartupError when the folder cannot be used. Closed by `close` or as a `with`.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_weights_bytes: int = 4 << 30,
        min_free_bytes: int = 64 << 20,
        step: Step = unwatched,
    ):
        self.blobs = root / "blobs"
        self._root = root
        self._staging = root / "staging"
        self._process = uuid.uuid4().hex
        self._max_weights_bytes = max_weights_bytes
        self._min_free_bytes = min_free_bytes
        self._step = step
        self._holds: Counter[str] = Counter()  # each digest's lock is shared while it is here
        self._lock = threading.Lock()  # guards _holds, and blobs against sweep
        self._commit_lock = threading.Lock()  # one commit at a time; taken before _lock, never after
        try:
            self.blobs.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            fsync_folder(root)
            self._locks = NameLocks(root / "locks")
            try:
                self._locks.share(self._process)
                self._sweep_staging()
            except OSError:
                self._locks.close()
                raise
        except OSError as cause:
            raise StartupError(
                f"The data directory {root} cannot be used: {cause.strerror or cause}. "
                "Give --data-dir a folder that this user may write, on a file system with locks."
            ) from cause

    def close(self) -> None:
        """Let go of everything that is held."""
        self._locks.close()

    def __enter__(self) -> "AdapterStore":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def bind(self, registry: str) -> None:
        """Remember that the blobs are those of the registry with this identity. Raises StartupError if they are
        another's: the sweep would remove every one of them."""
        mark = self._root / "registry"
        try:
            with self._locks.alone("registry"):
                if not mark.exists():
                    new = self._new_path()
                    with StagedFile(new, None, lambda: None) as file:
                        file.write(registry.encode())
                    os.rename(new, mark)
                    fsync_folder(self._root)
                bound = mark.read_text(errors="replace")
        except (OSError, StorageFull) as cause:
            raise StartupError(f"{mark} cannot be used: {cause}. Check the rights on the data directory.") from cause
        if bound != registry:
            raise StartupError(
                f"The adapters in {self._root} belong to another registry ({shown(bound)}, not {registry}). Give the "
                "--registry-url they were pushed with, or another --data-dir. If that registry is lost, and these "
                f"files with it, remove {mark} to start anew: adapters without a version are then removed."
            )

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """A new Staging. Within the block a committed adapter is held, so that a sweep cannot take it before the
        registry names it; what was not committed is removed at its end. Raises StorageFull."""
        with self._new_staging(self._max_weights_bytes) as staging:
            yield staging

    @contextmanager
    def import_folder(self, path: Path, leave_out: Collection[str] = ()) -> Iterator[Staging]:
        """A Staging with a copy of the operator's PEFT folder `path`, to check and commit like an upload, without the
        files named in `leave_out`.

        Copied, not hard-linked: a training script that saves into the same folder again would rewrite our
        blob. If the store has the adapter already, nothing is copied. Links are followed: the operator chose
        them. Raises AdapterInvalid, PickleRefused, AdapterTooLarge, StorageFull.
        """
        _check_folder(path)
        try:
            digest = _folder_digest(path, leave_out=leave_out, follow_symlinks=True)
        except OSError as cause:
            raise _unreadable(path, cause) from cause
        with self._holding(digest) as blob:
            if self._is_intact(digest):
                yield Staging.of_blob(blob, digest)
                return
        with self._new_staging(None) as staging:
            brought = [file for file in TEXT_FILES if file.name not in leave_out and (path / file.name).exists()]
            for file in (CONFIG, WEIGHTS, *brought):
                _copy(path / file.name, staging.open(file))
            yield staging

    def commit(self, staging: Staging) -> str:
        """Make `staging` a blob, durably, and return its digest. A digest the store has already is kept, or replaced
        if its files were damaged. Raises AdapterInvalid (a file is missing) and StorageFull."""
        digest = staging.digest
        blob = self.blobs / digest
        try:
            if staging.folder == blob:  # whoever renamed it may not have come so far as to sync it
                fsync_folder(self.blobs)
                return digest
            with self._commit_lock, self._locks.alone(f"commit {digest}"):
                if not staging.held:
                    self._hold(digest)
                    staging.held = True
                self._step("commit: held")
                if self._is_intact(digest):
                    fsync_folder(self.blobs)
                else:
                    self._put(staging.folder, blob)
        except OSError as cause:
            raise storage_full(cause, f"the adapter {digest}") from cause
        staging.folder = blob
        return digest

    def let_go(self, staging: Staging) -> None:
        """End the hold that `commit` took for the length of the staging, before that ends."""
        if staging.held:
            staging.held = False
            self.release(staging.digest)

    def _put(self, folder: Path, blob: Path) -> None:
        """Make `folder`, whose files are durable, the blob; one that is there is damaged."""
        fsync_folder(folder)
        self._step("commit: folder synced")
        damaged = self._new_path()
        if blob.exists():
            os.rename(blob, damaged)
            self._step("commit: damaged blob moved away")
        os.rename(folder, blob)
        self._step("commit: renamed")
        fsync_folder(self.blobs)
        self._step("commit: blobs synced")
        _remove(damaged)

    def path(self, digest: str) -> Path:
        """The folder of the blob `digest`. Raises InvalidRequest for what is no digest."""
        return self.blobs / validate_digest(digest)

    def digests(self) -> frozenset[str]:
        """The blobs on disk. Raises StorageFull when the folder cannot be read."""
        try:
            return frozenset(name for name in os.listdir(self.blobs) if _is_digest(name))
        except OSError as cause:
            raise storage_full(cause, "a list of the adapters") from cause

    def acquire(self, digest: str) -> Path:
        """Keep the blob `digest` from every process's sweep until as many `release`. Raises AdapterLoadFailed if it is
        gone, StorageFull when there are no locks."""
        blob = self.path(digest)
        try:
            self._hold(digest)
        except OSError as cause:
            raise storage_full(cause, f"a lock on the adapter {digest}") from cause
        if not blob.is_dir():
            self.release(digest)
            raise AdapterLoadFailed(f"The files of the adapter {digest} are gone. Push the adapter again.")
        return blob

    def _hold(self, digest: str) -> None:
        """The blob, if it is there, stays. It need not be."""
        with self._lock:
            if digest not in self._holds:
                self._locks.share(digest)
            self._holds[digest] += 1

    def release(self, digest: str) -> None:
        """The counterpart of `acquire`."""
        with self._lock:
            assert self._holds[digest] > 0, f"release of {digest}, which is not held"
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]
                self._locks.release(digest)

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """`acquire` and `release` as a `with` block; yields the blob's folder."""
        blob = self.acquire(digest)
        try:
            yield blob
        finally:
            self.release(digest)

    def sweep(self, live: Callable[[], Iterable[str]]) -> list[str]:
        """Remove every blob that no process holds and that is not among `live()`, and what dead processes left in
        staging; returns the digests. Raises StorageFull.

        `live` (the registry's `live_digests`) is asked again under the locks that end holds: whoever publishes inside a
        `stage` block is seen either as a hold or as a row.
        """
        gone: list[Path] = []
        removed: list[str] = []
        try:
            with self._lock, self._taking(self.digests() - self._holds.keys() - set(live())) as unheld:
                self._step("sweep: locked")
                # again, since another process may have swept or published one before it was locked
                for digest in sorted((unheld & self.digests()) - set(live())):
                    gone.append(self._new_path())
                    os.rename(self.blobs / digest, gone[-1])
                    removed.append(digest)
                    self._step("sweep: renamed")
            fsync_folder(self.blobs)
            self._step("sweep: synced")
            self._sweep_staging()
        except OSError as cause:
            raise storage_full(cause, "the removal of unused adapters") from cause
        finally:
            for folder in gone:
                _remove(folder)
        self._step("sweep: removed")
        return removed

    @contextmanager
    def _taking(self, digests: Iterable[str]) -> Iterator[set[str]]:
        """Those of `digests` that nobody holds; until the block ends nobody can."""
        taken: set[str] = set()
        try:
            for digest in digests:
                if self._locks.try_take(digest):
                    taken.add(digest)
            yield taken
        finally:
            for digest in taken:
                self._locks.release(digest)

    def _sweep_staging(self) -> None:
        """Remove what processes that are no more left in staging. Raises OSError."""
        for left in self._staging.iterdir():
            process = left.name.partition(".")[0]
            if process != self._process and self._locks.try_take(process):
                _remove(left)
                self._locks.release(process)

    def check_integrity(self) -> None:
        """Raise AssertionError if a hold is empty or a blob lacks a file."""
        with self._lock:
            for digest, count in self._holds.items():
                assert count > 0, f"{digest} has {count} holds"
            for digest in self.digests():
                for name in (CONFIG_NAME, WEIGHTS_NAME):
                    assert (self.blobs / digest / name).is_file(), f"{digest} lacks {name}"

    @contextmanager
    def _new_staging(self, max_weights_bytes: int | None) -> Iterator[Staging]:
        self._check_space()
        folder = self._new_path()
        try:
            folder.mkdir(mode=0o700)
            self._step("stage: folder made")
        except OSError as cause:
            raise storage_full(cause, "a new adapter") from cause
        staging = Staging(folder, max_weights_bytes, self._check_space, self._step)
        try:
            yield staging
        finally:
            _remove(folder)
            if staging.held:
                self.release(staging.digest)

    @contextmanager
    def _holding(self, digest: str) -> Iterator[Path]:
        """A hold on a blob that may not exist."""
        self._hold(digest)
        try:
            yield self.blobs / digest
        finally:
            self.release(digest)

    def _new_path(self) -> Path:
        """A path in staging that is this process's to make and to clear away."""
        return self._staging / f"{self._process}.{uuid.uuid4().hex}"

    def _is_intact(self, digest: str) -> bool:
        try:
            return _folder_digest(self.blobs / digest) == digest
        except OSError:
            return False

    def _check_space(self) -> None:
        try:
            free = os.statvfs(self._root)
        except OSError as cause:
            raise storage_full(cause, "a look at its free space") from cause
        if free.f_bavail * free.f_frsize < self._min_free_bytes:
            raise StorageFull(
                f"The disk of the data directory would be left with less than {self._min_free_bytes >> 20} MiB. "
                "Delete adapters or free some space, then try again."
            )


def _remove(path: Path) -> None:
    # what cannot be removed now is removed by the sweep after this process has ended
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_digest(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


def _folder_digest(folder: Path, *, leave_out: Collection[str] = (), follow_symlinks: bool = False) -> str:
    return adapter_digest(
        file_sha256(folder / CONFIG_NAME, follow_symlinks=follow_symlinks),
        file_sha256(folder / WEIGHTS_NAME, follow_symlinks=follow_symlinks),
        text_sha256(folder, leave_out=leave_out, follow_symlinks=follow_symlinks),
    )


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise AdapterInvalid(f"{path} is not a folder. Name a folder that PEFT's save_pretrained wrote.")
    if (path / CONFIG_NAME).exists() and (path / WEIGHTS_NAME).exists():
        return
    for name in sorted(os.listdir(path)):
        if name.startswith("adapter_"):
            refuse_pickle_name(name)
    raise AdapterInvalid(
        f"{path} is not a PEFT adapter: it needs {CONFIG_NAME} and {WEIGHTS_NAME}. "
        "Name a folder that PEFT's save_pretrained wrote."
    )


def _copy(source: Path, file: StagedFile) -> None:
    with file:
        try:
            fd = open_regular(source, follow_symlinks=True)
        except OSError as cause:
            raise _unreadable(source, cause) from cause
        try:
            for chunk in read_chunks(fd):
                file.write(chunk)
        except OSError as cause:
            raise _unreadable(source, cause) from cause
        finally:
            os.close(fd)


def _unreadable(path: Path, cause: OSError) -> AdapterInvalid:
    return AdapterInvalid(
        f"{path} cannot be read: {shown(cause.strerror or str(cause), 200)}. Check the file and its rights.",
    )

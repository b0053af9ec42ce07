"""AdapterStore: accepted adapters on disk, by digest.

    root/lock                          held by the one process that uses this folder
    root/blobs/<digest>/adapter_config.json, …         the files of `files.FILES`; complete, durable, never changed
    root/staging/<random>/             uploads on their way and blobs on their way out; emptied at start

Accepted means durable: files are synced, then their folder, then it is renamed into `blobs`, then `blobs` is
synced (a rename without that can be lost; Pillai et al., OSDI 2014). A blob goes only by `sweep`, when no
version and no hold names it. Names never become paths; only digests do.
"""

import errno
import fcntl
import os
import shutil
import threading
import uuid
import weakref
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
from loraplex.lora.staging import StagedFile, Staging, fsync_folder, storage_full
from loraplex.lora.text import shown


class AdapterStore:
    """The blobs below `root`. Any thread may call any method.

    `max_weights_bytes` bounds an upload's weights file; below `min_free_bytes` of free space nothing new is
    taken. Raises StartupError when the folder cannot be used or another process uses it. Closed by `close` or
    as a `with`.
    """

    def __init__(self, root: Path, *, max_weights_bytes: int = 4 << 30, min_free_bytes: int = 64 << 20):
        self.blobs = root / "blobs"
        self._root = root
        self._staging = root / "staging"
        self._max_weights_bytes = max_weights_bytes
        self._min_free_bytes = min_free_bytes
        self._holds: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards _holds, and blobs against sweep
        self._commit_lock = threading.Lock()  # one commit at a time; taken before _lock, never after
        try:
            self.blobs.mkdir(parents=True, exist_ok=True)
            self._staging.mkdir(exist_ok=True)
            self._close = weakref.finalize(self, os.close, _lock_folder(root))
            for left in self._staging.iterdir():
                _remove(left)
            fsync_folder(root)
        except OSError as cause:
            raise StartupError(
                f"The data directory {root} cannot be used: {cause.strerror or cause}. "
                "Give --data-dir a folder that this user may write."
            ) from cause

    def close(self) -> None:
        """Let another process use the folder."""
        self._close()

    def __enter__(self) -> "AdapterStore":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

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
        if staging.folder == blob:
            return digest
        with self._commit_lock:
            if not staging.held:
                with self._lock:
                    self._holds[digest] += 1
                staging.held = True
            try:
                if not self._is_intact(digest):
                    fsync_folder(staging.folder)
                    damaged = self._staging / uuid.uuid4().hex
                    if blob.exists():
                        os.rename(blob, damaged)
                    os.rename(staging.folder, blob)
                    fsync_folder(self.blobs)
                    _remove(damaged)
            except OSError as cause:
                raise storage_full(cause, f"the adapter {digest}") from cause
            staging.folder = blob
        return digest

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
        """Keep the blob `digest` from the sweep until as many `release`. Raises AdapterLoadFailed if it is gone."""
        blob = self.path(digest)
        with self._lock:
            if not blob.is_dir():
                raise AdapterLoadFailed(f"The files of the adapter {digest} are gone. Push the adapter again.")
            self._holds[digest] += 1
        return blob

    def release(self, digest: str) -> None:
        """The counterpart of `acquire`."""
        with self._lock:
            assert self._holds[digest] > 0, f"release of {digest}, which is not held"
            self._holds[digest] -= 1
            if not self._holds[digest]:
                del self._holds[digest]

    @contextmanager
    def hold(self, digest: str) -> Iterator[Path]:
        """`acquire` and `release` as a `with` block; yields the blob's folder."""
        blob = self.acquire(digest)
        try:
            yield blob
        finally:
            self.release(digest)

    def sweep(self, live: Callable[[], Iterable[str]]) -> list[str]:
        """Remove every blob that is neither held nor among `live()`; returns their digests. Raises StorageFull.

        `live` (the registry's `live_digests`) is called under the lock that ends holds: whoever publishes
        inside a `stage` block is seen either as a hold or as a row.
        """
        gone: list[Path] = []
        removed: list[str] = []
        try:
            with self._lock:
                keep = self._holds.keys() | set(live())
                for digest in sorted(self.digests() - keep):
                    gone.append(self._staging / uuid.uuid4().hex)
                    os.rename(self.blobs / digest, gone[-1])
                    removed.append(digest)
            fsync_folder(self.blobs)
        except OSError as cause:
            raise storage_full(cause, "the removal of unused adapters") from cause
        finally:
            for folder in gone:
                _remove(folder)
        return removed

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
        folder = self._staging / uuid.uuid4().hex
        try:
            folder.mkdir(mode=0o700)
        except OSError as cause:
            raise storage_full(cause, "a new adapter") from cause
        staging = Staging(folder, max_weights_bytes, self._check_space)
        try:
            yield staging
        finally:
            _remove(folder)
            if staging.held:
                self.release(staging.digest)

    @contextmanager
    def _holding(self, digest: str) -> Iterator[Path]:
        """A hold on a blob that may not exist."""
        with self._lock:
            self._holds[digest] += 1
        try:
            yield self.blobs / digest
        finally:
            self.release(digest)

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
                f"The disk of the data directory has less than {self._min_free_bytes >> 20} MiB left. "
                "Delete adapters or free some space, then try again."
            )


def _lock_folder(root: Path) -> int:
    """A descriptor that holds the exclusive lock of `root`; the system ends the lock with the process."""
    fd = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartupError(
            f"The data directory {root} is in use by another loraplex. Stop that one, or give this one its "
            "own --data-dir."
        ) from None
    except OSError as cause:
        # some network file systems have no locks; there the operator has to see to it
        if cause.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(fd)
            raise
    return fd


def _remove(path: Path) -> None:
    # what cannot be removed now is removed at the next start
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

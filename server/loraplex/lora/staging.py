"""Staging: an adapter on its way into the store, hashed as its bytes arrive and bounded in size."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from loraplex.errors import AdapterInvalid, AdapterTooLarge, StorageFull
from loraplex.lora.digest import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, adapter_digest

# Free space is looked up once in so many written bytes.
_SPACE_CHECK_BYTES = 16 << 20


def storage_full(cause: OSError, doing: str) -> StorageFull:
    """The error for a disk that refuses (full, read-only, broken) while `doing` something."""
    full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Free some space" if full else "Check the disk and the rights on the data directory"
    return StorageFull(f"The disk refuses {doing}: {cause.strerror or cause}. {advice}, then try again.")


def fsync_folder(path: Path) -> None:
    """Make the entries of the folder `path` durable (a rename is not, before this). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StagedFile:
    """One new file below the staging folder. A `with` block: leaving it makes the bytes durable.

    `limit` is the most bytes it may have (None: any number); `check_space` raises StorageFull when the disk
    is low.
    """

    def __init__(self, path: Path, limit: int | None, check_space: Callable[[], None]):
        self._path = path
        self._limit = limit
        self._check_space = check_space
        self._unchecked = 0
        self._sha = hashlib.sha256()
        self.nbytes = 0
        self.complete = False
        check_space()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
        except OSError as cause:
            raise storage_full(cause, f"a new {path.name}") from cause

    @property
    def sha256(self) -> bytes:
        """SHA-256 of what was written, 32 bytes."""
        return self._sha.digest()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append `data`. Raises AdapterTooLarge and StorageFull; the staging is of no use after either."""
        size = len(data)
        if self._limit is not None and self.nbytes + size > self._limit:
            raise AdapterTooLarge(
                f"{self._path.name} has more than {self._limit} bytes, which is this server's limit. "
                "Send a smaller adapter (a smaller rank, or bfloat16 instead of float32)."
            )
        self._unchecked += size
        if self._unchecked >= _SPACE_CHECK_BYTES:
            self._unchecked = 0
            self._check_space()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as cause:
            raise storage_full(cause, f"{self._path.name}") from cause
        self._sha.update(data)
        self.nbytes += size

    def __enter__(self) -> "StagedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
                self.complete = True
        except OSError as cause:
            raise storage_full(cause, f"{self._path.name}") from cause
        finally:
            os.close(self._fd)


class Staging:
    """The two files of one adapter below `folder`, which is gone when the store's `with` block ends.

    After `AdapterStore.commit`, `folder` is the blob's. `nbytes` and `digest` are known when both files are
    complete.
    """

    def __init__(self, folder: Path, max_weights_bytes: int | None, check_space: Callable[[], None]):
        self.folder = folder
        self._max_weights_bytes = max_weights_bytes
        self._check_space = check_space
        self._config: StagedFile | None = None
        self._weights: StagedFile | None = None
        self._digest: str | None = None
        self.held = False  # whether the store holds the digest until the staging ends

    @classmethod
    def of_blob(cls, folder: Path, digest: str) -> "Staging":
        """A staging with nothing left to do: the blob `digest` is in the store already."""
        staging = cls(folder, None, lambda: None)
        staging._digest = digest
        return staging

    def open_config(self) -> StagedFile:
        """A `with` block to write adapter_config.json in."""
        self._config = StagedFile(self.folder / CONFIG_NAME, MAX_CONFIG_BYTES, self._check_space)
        return self._config

    def open_weights(self) -> StagedFile:
        """A `with` block to write adapter_model.safetensors in."""
        self._weights = StagedFile(self.folder / WEIGHTS_NAME, self._max_weights_bytes, self._check_space)
        return self._weights

    @property
    def digest(self) -> str:
        """The digest of both files. Raises AdapterInvalid while one is missing."""
        if self._digest is None:
            config, weights = self._config, self._weights
            if config is None or not config.complete or weights is None or not weights.complete:
                raise AdapterInvalid(f"The adapter lacks a file. Send both {CONFIG_NAME} and {WEIGHTS_NAME}.")
            self._digest = adapter_digest(config.sha256, weights.sha256)
        return self._digest

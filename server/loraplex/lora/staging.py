"""Staging: an adapter on its way into the store, hashed as its bytes arrive and bounded in size."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from loraplex.errors import AdapterInvalid, AdapterTooLarge, StorageFull
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, text_sha256
from loraplex.lora.files import AdapterFile
from loraplex.lora.running_digest import RunningDigest
from loraplex.lora.steps import Step, unwatched

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

    def __init__(self, path: Path, limit: int | None, check_space: Callable[[], None], step: Step = unwatched):
        self._path = path
        self._step = step
        self._limit = limit
        self._advice = "Send a smaller file, or none: it need not be there."
        if path.name in (CONFIG_NAME, WEIGHTS_NAME):
            self._advice = "Send a smaller adapter (a smaller rank, or bfloat16 instead of float32)."
        if path.name == WEIGHTS_NAME:
            self._advice += f" Or start the server with max_upload_bytes (LORAPLEX_MAX_UPLOAD_BYTES) above {limit}."
        self._check_space = check_space
        self._unchecked = 0
        self.sha256 = b""  # 32 bytes of what was written, when it is complete
        self.nbytes = 0
        self.complete = False
        check_space()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o600)
        except OSError as cause:
            raise storage_full(cause, f"a new {path.name}") from cause
        self._digest = RunningDigest(self._fd)
        step("stage: file opened")

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which must not change any more. Raises AdapterTooLarge and StorageFull; the staging is of no
        use after either."""
        size = len(data)
        if self._limit is not None and self.nbytes + size > self._limit:
            raise AdapterTooLarge(
                f"{self._path.name} has more than {self._limit} bytes, which is this server's limit. {self._advice}"
            )
        self._unchecked += size
        if self._unchecked >= _SPACE_CHECK_BYTES:
            self._unchecked = 0
            self._check_space()
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            self._step("stage: bytes written")
            self._digest.add(data)
        except OSError as cause:
            raise storage_full(cause, f"{self._path.name}") from cause
        self.nbytes += size

    def __enter__(self) -> "StagedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self.sha256 = self._digest.finish()
                os.fsync(self._fd)
                self.complete = True
                self._step("stage: file synced")
        except OSError as cause:
            raise storage_full(cause, f"{self._path.name}") from cause
        finally:
            self._digest.close()
            os.close(self._fd)


class Staging:
    """The files of one adapter below `folder`, which is gone when the store's `with` block ends.

    After `AdapterStore.commit`, `folder` is the blob's. `digest` is known when config and weights are complete.
    """

    def __init__(
        self, folder: Path, max_weights_bytes: int | None, check_space: Callable[[], None], step: Step = unwatched
    ):
        self.folder = folder
        self._step = step
        self._max_weights_bytes = max_weights_bytes
        self._check_space = check_space
        self._files: dict[str, StagedFile] = {}
        self._digest: str | None = None
        self.held = False  # whether the store holds the digest until the staging ends

    @classmethod
    def of_blob(cls, folder: Path, digest: str) -> "Staging":
        """A staging with nothing left to do: the blob `digest` is in the store already."""
        staging = cls(folder, None, lambda: None)
        staging._digest = digest
        return staging

    def open(self, file: AdapterFile) -> StagedFile:
        """A `with` block to write `file` in."""
        limit = self._max_weights_bytes if file.max_bytes is None else file.max_bytes
        self._files[file.name] = StagedFile(self.folder / file.name, limit, self._check_space, self._step)
        return self._files[file.name]

    def leave_out(self, names: Iterable[str]) -> None:
        """Remove files of the text side that nobody needs, before the commit. Raises StorageFull."""
        for name in names:
            if name in self._files:
                try:
                    os.unlink(self.folder / name)
                except OSError as cause:
                    raise storage_full(cause, f"the removal of {name}") from cause
                del self._files[name]
                self._digest = None

    @property
    def digest(self) -> str:
        """The digest of all files. Raises AdapterInvalid while one is missing or incomplete."""
        if self._digest is None:
            sums = {name: file.sha256 for name, file in self._files.items() if file.complete}
            if len(sums) < len(self._files) or not {CONFIG_NAME, WEIGHTS_NAME} <= sums.keys():
                raise AdapterInvalid(f"The adapter lacks a file. Send both {CONFIG_NAME} and {WEIGHTS_NAME}.")
            self._digest = adapter_digest(sums[CONFIG_NAME], sums[WEIGHTS_NAME], sums)
        return self._digest

    @property
    def text_files(self) -> dict[str, str]:
        """SHA-256 in hexadecimal of every file of the text side, by name. Raises StorageFull."""
        try:
            return {name: value.hex() for name, value in text_sha256(self.folder).items()}
        except OSError as cause:
            raise storage_full(cause, "a look at the adapter's files") from cause

"""RunningDigest: the SHA-256 of a file that is being written, made beside the writing, as is the disk's work on it."""

import hashlib
import os
from concurrent.futures import Future, ThreadPoolExecutor

_LARGE_PIECE = 64 << 10  # smaller ones are not worth a trip to another thread

_SYNC_BYTES = 16 << 20
"""So much is left to the system at most before it has to reach the disk: the sync at the end is short, and another
file's (a registry's commit) never waits behind gigabytes."""


class RunningDigest:
    """Of what is written to `fd`, and given to `add` after that. One caller; `close` before the file is closed."""

    def __init__(self, fd: int):
        self._fd = fd
        self._sha = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = None
        self._taking: Future[None] | None = None
        self._unsynced = 0

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes; they must not change any more. Raises OSError when the disk refuses earlier ones."""
        self._wait()
        if len(data) < _LARGE_PIECE:
            self._sha.update(data)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "digest")
        self._taking = self._thread.submit(self._take, data)

    def _take(self, data: bytes | memoryview) -> None:
        self._sha.update(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            self._unsynced = 0
            os.fsync(self._fd)

    def _wait(self) -> None:
        taking, self._taking = self._taking, None
        if taking is not None:
            taking.result()

    def finish(self) -> bytes:
        """The digest of all, 32 bytes. Raises OSError when the disk refused some."""
        self._wait()
        return self._sha.digest()

    def close(self) -> None:
        """End the thread; what it refused since is nobody's any more."""
        self._taking = None
        if self._thread is not None:
            self._thread.shutdown(wait=True)

"""NameLocks: locks by name between all who open one file, in this process or in others.

A name is one byte of the file, at the hash of the name; two names on one byte (1 in 2^62) only wait for each other.
The system ends a process's locks with the process, however it ends.
"""

import fcntl
import hashlib
import os
import struct
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Locks of the open file, as Linux has them: two NameLocks of one process exclude each other as two processes do.
# Elsewhere they are the process's: one NameLocks a file and process.
_OF_FILE = hasattr(fcntl, "F_OFD_SETLK")


class NameLocks:
    """Locks in the file `path`, which is made if need be. A name is held at most once by one NameLocks: whoever shares
    it among threads counts. Raises OSError where the file cannot be had or its file system has no locks.
    Closed by `close`, which ends all its locks."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self.close = weakref.finalize(self, os.close, self._fd)

    def share(self, name: str) -> None:
        """Hold `name` beside others who share it; waits while one has it alone."""
        self._set(name, fcntl.F_RDLCK, wait=True)

    def take(self, name: str) -> None:
        """Hold `name` alone; waits for those who hold it."""
        self._set(name, fcntl.F_WRLCK, wait=True)

    def try_take(self, name: str) -> bool:
        """Hold `name` alone, unless another NameLocks holds it."""
        try:
            self._set(name, fcntl.F_WRLCK, wait=False)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def release(self, name: str) -> None:
        """The counterpart of `share`, `take` and `try_take`. After `close` there is nothing to release."""
        if self.close.alive:
            self._set(name, fcntl.F_UNLCK, wait=False)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """`take` and `release` as a `with` block."""
        self.take(name)
        try:
            yield
        finally:
            self.release(name)

    def _set(self, name: str, kind: int, *, wait: bool) -> None:
        byte = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8]) >> 2
        if _OF_FILE:
            command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
            fcntl.fcntl(self._fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, byte, 1, 0))
        else:
            kinds = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}
            fcntl.lockf(self._fd, kinds[kind] | (0 if wait else fcntl.LOCK_NB), 1, byte)

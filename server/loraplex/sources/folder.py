"""FolderSource: a PEFT folder below a root that the operator allowed, read without following a single link.

Every component is opened by itself from the root's descriptor on, so that neither a link nor a folder that is exchanged
meanwhile leads out of the root.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from loraplex.errors import AdapterInvalid, SourceFailed, SourceNotFound, SourceRefused
from loraplex.lora.digest import read_chunks
from loraplex.lora.files import FILES, REQUIRED, AdapterFile
from loraplex.lora.headers import refuse_pickle_name
from loraplex.lora.staging import Staging
from loraplex.sources.transfer import Transfer

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class FolderSource:
    """`relative` has no `..`; `root` may be reached by links, nothing below it."""

    def __init__(self, root: Path, relative: PurePath):
        self._root = root
        self._relative = relative

    @property
    def shown(self) -> str:
        return f"folder:{self._relative.name or self._root.name}"

    def fetch(self, staging: Staging, transfer: Transfer) -> None:
        with self._opened() as folder:
            self._check(folder)
            for file in FILES:
                with self._file(folder, file) as fd:
                    if fd is not None:
                        transfer.write(staging, file, os.fstat(fd).st_size, read_chunks(fd))

    def signature(self) -> tuple[tuple[str, int, int, int], ...]:
        """Name, size, inode and time of every file of an adapter that is there: equal as long as nothing is written.
        Raises as `fetch`."""
        with self._opened() as folder:
            self._check(folder)
            found = []
            for file in FILES:
                with self._file(folder, file) as fd:
                    if fd is not None:
                        now = os.fstat(fd)
                        found.append((file.name, now.st_size, now.st_ino, now.st_mtime_ns))
            return tuple(found)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the folder."""
        fd = -1
        try:
            fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for part in self._relative.parts:
                below = os.open(part, _FLAGS | os.O_DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = below
        except OSError as cause:
            if fd >= 0:
                os.close(fd)
            raise self._error(cause, str(self._relative)) from cause
        try:
            yield fd
        finally:
            os.close(fd)

    def _check(self, folder: int) -> None:
        names = set(os.listdir(folder))
        missing = [file.name for file in REQUIRED if file.name not in names]
        if missing:
            for name in sorted(names):
                if name.startswith("adapter_"):
                    refuse_pickle_name(name)
            raise AdapterInvalid(f"{self.shown} is not a PEFT adapter: it lacks {' and '.join(missing)}.")

    @contextmanager
    def _file(self, folder: int, file: AdapterFile) -> Iterator[int | None]:
        """A descriptor of the regular file, None where there is none."""
        try:
            fd = os.open(file.name, _FLAGS, dir_fd=folder)
        except FileNotFoundError:
            yield None
            return
        except OSError as cause:
            raise self._error(cause, file.name) from cause
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SourceRefused(f"{file.name} in {self.shown} is no regular file.")
            yield fd
        except OSError as cause:
            raise self._error(cause, file.name) from cause
        finally:
            os.close(fd)

    def _error(self, cause: OSError, what: str) -> Exception:
        if cause.errno in (errno.ELOOP, errno.ENOTDIR) and self._is_link(what):
            return SourceRefused(
                f"{what} in {self.shown} is a symbolic link or leads through one; links are not followed below an "
                "allowed root. Copy the files there."
            )
        if cause.errno in (errno.ENOENT, errno.ENOTDIR):
            return SourceNotFound(f"There is no folder {self.shown}.")
        return SourceFailed(f"{what} in {self.shown} cannot be read: {cause.strerror or cause}.")

    def _is_link(self, what: str) -> bool:
        path = self._root
        for part in PurePath(what).parts if what == str(self._relative) else (*self._relative.parts, what):
            path = path / part
            if path.is_symlink():
                return True
        return False

"""Confinement: what a child process takes from itself before it looks at a stranger's text.

No file can be opened or written any more, no process started; memory and processor time are bounded by the kernel
(setrlimit(2)). On systems without /proc memory is bounded by the parent's clock alone. Standard library only.
"""

import contextlib
import math
import os
import resource

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Confinement:
    """The limits of this process from now on: `memory_bytes` more than it has, and `cpu_seconds` after each `renew`."""

    def __init__(self, memory_bytes: int, cpu_seconds: int):
        self._cpu_seconds = cpu_seconds
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # where memory runs out after all, this process goes first
        try:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not Linux
            self._statm = -1
        self._start = self._address_space()
        if self._start:
            _limit(resource.RLIMIT_AS, self._start + memory_bytes)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_FSIZE, 0)
        _limit(resource.RLIMIT_NPROC, 0)
        _limit(resource.RLIMIT_NOFILE, max(self._statm, 2) + 1)
        self.renew()

    def renew(self) -> None:
        """Another `cpu_seconds` of processor time; the kernel ends the process after them."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + self._cpu_seconds
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))

    @property
    def growth(self) -> int:
        """Bytes of address space more than at the start."""
        return self._address_space() - self._start

    def _address_space(self) -> int:
        return 0 if self._statm < 0 else int(os.pread(self._statm, 128, 0).split()[0]) * _PAGE


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with contextlib.suppress(OSError, ValueError):  # a system that does not know this limit
        resource.setrlimit(kind, (value, value))

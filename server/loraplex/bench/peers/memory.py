"""Memory of a process and all it started, from Linux's /proc: proportional set size, a shared page divided."""

import re
import threading
from pathlib import Path
from types import TracebackType

_PROC = Path("/proc")
_SESSION_FIELD = 3  # of /proc/PID/stat after the name: state, parent, group, session


def session_pids(session: int) -> list[int]:
    """Every process of the session that process `session` leads."""
    found = []
    for path in _PROC.glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[_SESSION_FIELD]) == session:
            found.append(int(path.parent.name))
    return sorted(found)


def session_pss(session: int) -> int:
    """Bytes, 0 where /proc does not tell."""
    total = 0
    for pid in session_pids(session):
        try:
            text = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii", errors="replace")
        except OSError:
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


class MemoryWatch:
    """Use as `with`: looks every `seconds` and when asked. A look takes the kernel 10 to 80 ms."""

    def __init__(self, session: int, seconds: float = 3.0):
        self._session = session
        self._seconds = seconds
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def peak(self) -> int:
        """The most bytes seen since this began, now included."""
        self._look()
        return self._peak

    def _watch(self) -> None:
        while not self._stop.wait(self._seconds):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, session_pss(self._session))

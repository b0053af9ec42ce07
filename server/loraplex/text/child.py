"""Child: a confined process and the conversation with it, seen from the server. Blocking; one thread at a time."""

import json
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from loraplex.config import child_environment
from loraplex.text.frames import FrameTooLong, receive, send

START_SECONDS = 30.0
_PROGRAM = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module(sys.argv[2]).main()
"""


class ChildNotStarted(Exception):
    """There is no child: the system refuses, or its program failed (its traceback is on the server's stderr)."""


class ChildTimeout(Exception):
    """The child took longer than it may; it is dead now."""


class ChildDied(Exception):
    """The child ended (a limit of the kernel, a crash) or answered nonsense; it is dead now. `is_out_of_time`: the
    kernel ended it for its processor time."""

    def __init__(self, message: str, *, is_out_of_time: bool = False):
        super().__init__(message)
        self.is_out_of_time = is_out_of_time


class Child:
    """Runs `module`.main(), which reads `start` from its standard input, a socket, and answers when it is ready.

    It inherits no environment (but the time zone) and no file but stderr. Closed by `close`. Raises ChildNotStarted.
    """

    def __init__(self, module: str, start: dict[str, Any]):
        ours, theirs = socket.socketpair()
        paths = json.dumps([path for path in sys.path if path])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, paths, module],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=child_environment(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ChildNotStarted(str(error)) from error
        finally:
            theirs.close()
        self._connection = ours
        self._start: dict[str, Any] | None = start

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def prepare(self) -> None:
        """Wait until it is ready. Raises ChildNotStarted."""
        if self._start is not None:
            start, self._start = self._start, None
            try:
                self._exchange(start, START_SECONDS, 1 << 10)
            except (ChildTimeout, ChildDied) as error:
                raise ChildNotStarted(str(error)) from error

    def exchange(self, job: dict[str, Any], seconds: float, max_bytes: int) -> Any:
        """The answer to `job`. Raises ChildTimeout after `seconds`, ChildDied and ChildNotStarted."""
        self.prepare()
        return self._exchange(job, seconds, max_bytes)

    def _exchange(self, value: Any, seconds: float, max_bytes: int) -> Any:
        deadline = time.monotonic() + seconds
        try:
            send(self._connection, value, deadline)
            answer = receive(self._connection, max_bytes, deadline)
        except TimeoutError as error:
            self.close()
            raise ChildTimeout(f"no answer in {seconds:g} s") from error
        except (OSError, ValueError, RecursionError, FrameTooLong) as error:
            self.close()
            raise ChildDied(str(error)) from error
        if answer is None:
            self._connection.close()
            code = self._wait()
            raise ChildDied(f"exit code {code}", is_out_of_time=code == -signal.SIGXCPU)
        return answer

    def _wait(self) -> int:
        """Its exit code, when it has closed its socket: it is gone in a moment."""
        try:
            return self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def kill(self) -> None:
        """End it, from any thread; whoever talks to it gets ChildDied."""
        self._process.kill()

    def close(self) -> None:
        """End it and forget it. May be called more than once."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

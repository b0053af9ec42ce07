"""PeerProcess: a peer's process, pinned and in a session of its own, stopped by its id when the block ends."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from loraplex.bench.server import BenchFailed

STOP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Command:
    """`environment` is added to this process's, whose LORAPLEX_ variables are left out."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """As one would type it."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), *self.arguments])


def pinned(arguments: Sequence[str], core: int | None) -> list[str]:
    """The command on one core; None, or without taskset: as it is."""
    if core is None or shutil.which("taskset") is None:
        return list(arguments)
    return ["taskset", "--cpu-list", str(core), *arguments]


class PeerProcess:
    """Use as `with`. `is_piped`: standard input and output are lines to talk over; else output goes to the log."""

    def __init__(self, command: Command, log: Path, *, is_piped: bool = False):
        self._command = command
        self._log = log
        self._is_piped = is_piped
        self._process: subprocess.Popen[str]

    def __enter__(self) -> "PeerProcess":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
        with open(self._log, "w", encoding="utf-8") as log:
            try:
                self._process = subprocess.Popen(
                    self._command.arguments,
                    stdin=subprocess.PIPE if self._is_piped else subprocess.DEVNULL,
                    stdout=subprocess.PIPE if self._is_piped else log,
                    stderr=log,
                    text=True,
                    env={**environment, **self._command.environment},
                    start_new_session=True,
                )
            except OSError as error:
                raise BenchFailed(f"{self._command.arguments[0]} cannot be started: {error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # children that outlived it
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lines(self) -> tuple[IO[str], IO[str]]:
        """Its standard input and output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def wait(self) -> None:
        self._process.wait(STOP_SECONDS)

    def check_running(self) -> None:
        """Raises BenchFailed with the log's end when it has ended."""
        if self._process.poll() is not None:
            raise BenchFailed(f"It ended with exit code {self._process.returncode}: {self.log_end()}")

    def log_end(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace").strip()[-600:]


def output_of(arguments: Sequence[str], environment: Mapping[str, str] | None = None, timeout: float = 600.0) -> str:
    """What a command prints on both its outputs. Raises BenchFailed with its end when it fails."""
    try:
        done = subprocess.run(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            env={**os.environ, **(environment or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchFailed(f"{arguments[0]} failed: {error}.") from error
    if done.returncode:
        raise BenchFailed(f"{arguments[0]} failed with exit code {done.returncode}: {done.stdout.strip()[-600:]}")
    return done.stdout

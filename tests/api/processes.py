"""Servers as processes of their own: to be killed, started again, and to stand side by side."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
DEADLINE = 60.0


class ServerProcess:
    """`loraplex serve` of `model` on `data_dir`. `client` speaks to it."""

    def __init__(self, model: Path, data_dir: Path, *flags: object, registry_url: str | None = None):
        self.data_dir = data_dir
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        self._log = data_dir.parent / f"{data_dir.name}.log"
        command = [sys.executable, "-m", "loraplex", "serve", model, "--data-dir", data_dir, "--port", "0", "--json"]
        command += ["--threads", "1", "--dtype", "float32", "--device", "cpu", "--adapter-cache-bytes", "8MiB", *flags]
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path)}
        if registry_url is not None:
            environment["LORAPLEX_REGISTRY_URL"] = registry_url
        with open(self._log, "a") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        self.client: httpx2.Client

    def wait_until_up(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()
        self.client = httpx2.Client(base_url=json.loads(line)["API"].removesuffix("/v1"), timeout=DEADLINE)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and wait; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        if hasattr(self, "client"):
            self.client.close()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def servers(count: int, model: Path, data_dir: Path, *flags: object, **options: Any) -> Iterator[list[ServerProcess]]:
    """So many servers on one data folder, started at once."""
    with ExitStack() as stack:
        started = [ServerProcess(model, data_dir, *flags, **options) for _ in range(count)]
        for server in started:
            stack.callback(server.end, signal.SIGKILL)
        for server in started:
            server.wait_until_up()
        yield started

"""Servers as processes of their own: to be killed, started again, and to stand side by side."""

import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2

from forks import Forks

DEADLINE = 60.0


class ServerProcess:
    """`loraplex serve` of `model` on `data_dir`. `client` speaks to it."""

    def __init__(self, forks: Forks, model: Path, data_dir: Path, *flags: object, registry_url: str | None = None):
        self.data_dir = data_dir
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        self._log = data_dir.parent / f"{data_dir.name}.log"
        arguments = ["serve", model, "--data-dir", data_dir, "--port", "0", "--json", "--threads", "1"]
        arguments += ["--dtype", "float32", "--device", "cpu", "--adapter-cache-bytes", "8MiB", *flags]
        environment = {} if registry_url is None else {"LORAPLEX_REGISTRY_URL": registry_url}
        with open(self._log, "a") as log:
            self.process = forks.start(list(map(str, arguments)), environment, log)
        self.client: httpx2.Client

    def wait_until_up(self) -> None:
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
        self.process.stdout.close()
        return code


@contextmanager
def servers(
    forks: Forks, count: int, model: Path, data_dir: Path, *flags: object, **options: Any
) -> Iterator[list[ServerProcess]]:
    """So many servers on one data folder, started at once."""
    with ExitStack() as stack:
        started = [ServerProcess(forks, model, data_dir, *flags, **options) for _ in range(count)]
        for server in started:
            stack.callback(server.end, signal.SIGKILL)
        for server in started:
            server.wait_until_up()
        yield started

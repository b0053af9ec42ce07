"""OwnServer: a `loraplex serve` of this very installation as a process on 127.0.0.1, stopped when the block ends."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from loraplex.bench.server import BenchFailed

START_SECONDS = 300.0
STOP_SECONDS = 30.0


class OwnServer:
    """Use as `with`. `url` is known inside. `folder` takes the log. `cores` None: any."""

    url: str

    def __init__(self, arguments: Sequence[str], folder: Path, cores: set[int] | None = None):
        self._arguments = arguments
        self._log = folder / "server.log"
        self._cores = cores
        self._process: subprocess.Popen[str]

    def __enter__(self) -> "OwnServer":
        own = [sys.executable, "-m", "loraplex", "serve", *self._arguments]
        command = [*own, "--host", "127.0.0.1", "--port", "0", "--json"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
        with open(self._log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True
            )
        try:
            if self._cores is not None:
                os.sched_setaffinity(self._process.pid, self._cores)  # before it has threads: they inherit it
            self.url = self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> str:
        """The URL. Raises BenchFailed with what it said last when the server does not come up."""
        assert self._process.stdout is not None
        timer = threading.Timer(START_SECONDS, self._process.kill)
        timer.start()
        said = ""
        try:
            for line in self._process.stdout:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    return json.loads(line)["API"].removesuffix("/v1")
                said += line
        finally:
            timer.cancel()
        self._process.wait()
        said = (self._log.read_text(encoding="utf-8", errors="replace") + said).strip()[-600:]
        raise BenchFailed(f"The benchmark's own server did not start (exit code {self._process.returncode}): {said}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def phase_seconds(self, histogram: str, phases: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Of a histogram of /metrics with the label `phase`: how many, and seconds of all together, so far."""
        found = {phase: [0.0, 0.0] for phase in phases}
        text = httpx2.get(self.url + "/metrics", timeout=60.0, trust_env=False).text
        for family in text_string_to_metric_families(text):
            if family.name == histogram:
                for sample in family.samples:
                    if sample.name.endswith(("_count", "_sum")):
                        found[sample.labels["phase"]][sample.name.endswith("_sum")] = sample.value
        return {phase: (count, seconds) for phase, (count, seconds) in found.items()}

    def memory_bytes(self, field: str = "VmRSS") -> int | None:
        """Resident size, shared libraries included: now, or with "VmHWM" at its largest. None where /proc is silent."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return None
        found = re.search(rf"{field}:\s+(\d+) kB", status)
        return None if found is None else int(found[1]) * 1024

"""PeftMixed: transformers with PEFT's mixed batches, in its own process (`peft_program.py`); no HTTP."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.memory import MemoryWatch
from loraplex.bench.peers.peer import Cell, Figures, Place, Running, SetUp
from loraplex.bench.peers.process import Command, PeerProcess, output_of, pinned
from loraplex.bench.prompts import Prompts
from loraplex.bench.server import BenchFailed

PEFT_PROGRAM = Path(__file__).with_name("peft_program.py")
_VERSIONS = (
    "import importlib.metadata as m; print(', '.join(name + ' ' + m.version(name) for name in ('peft', 'transformers', "
    "'torch')))"
)


@dataclass(frozen=True, slots=True)
class PeftMixed:
    """`python`: an interpreter that has peft. None: this one."""

    python: Path | None = None
    name: str = "PEFT mixed batch"

    @property
    def _python(self) -> str:
        return str(self.python or sys.executable)

    def missing(self) -> str | None:
        if not Path(self._python).is_file():
            return f"{self._python} is not there"
        try:
            self.version()
        except BenchFailed:
            return f"{self._python} has no peft; --peft-python names another interpreter"
        return None

    def version(self) -> str:
        return output_of([self._python, "-c", _VERSIONS]).strip()

    def prepare(self, material: Material) -> None:
        """It takes transformers and PEFT folders."""

    def set_ups(self, material: Material, place: Place) -> list[SetUp]:
        folders = [str(path) for path in material.adapters.values()]
        program = [self._python, str(PEFT_PROGRAM), str(material.base), str(place.threads), *folders]
        return [PeftSetUp(self.name, material, Command(pinned(program, place.core)))]


@dataclass(frozen=True)
class PeftSetUp:
    name: str
    material: Material
    command: Command
    has_adapters: bool = True

    @contextmanager
    def start(self, log: Path) -> Iterator[Running]:
        with PeerProcess(self.command, log, is_piped=True) as process, MemoryWatch(process.pid) as memory:
            running = RunningProgram(process, self.material, memory)
            running.read()
            yield running


class RunningProgram:
    def __init__(self, process: PeerProcess, material: Material, memory: MemoryWatch):
        self._process = process
        self._material = material
        self._memory = memory

    def measure(self, cell: Cell) -> Figures:
        prompts = Prompts(cell.prompt_tokens, self._material.token_pool)
        asked = {
            "prompts": [prompts.next() for _ in range(cell.requests)],
            "names": list(self._material.names[: cell.adapters]),
            "clients": cell.clients,
            "output_tokens": cell.output_tokens,
        }
        return Figures(**self._ask({"measure": asked}), pss_bytes=self._memory.peak())

    def first_tokens(self, prompts: Sequence[list[int]], names: Sequence[str]) -> list[str]:
        asked = {"prompts": prompts, "names": [None if name == BASE_NAME else name for name in names]}
        return self._ask({"first_tokens": asked})

    def _ask(self, request: dict[str, Any]) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `read` says so
            lines = self._process.lines[0]
            lines.write(json.dumps(request) + "\n")
            lines.flush()
        return self.read()

    def read(self) -> Any:
        """The next answer. Raises BenchFailed with the log's end when the program ends instead."""
        line = self._process.lines[1].readline()
        if not line:
            self._process.wait()
            self._process.check_running()
        return json.loads(line)

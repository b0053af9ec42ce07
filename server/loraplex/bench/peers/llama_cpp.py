"""LlamaCpp: llama.cpp's llama-server. Adapters are loaded at start and asked for by number, in the field `lora`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraplex.bench.dialect import Dialect
from loraplex.bench.peers.http_peer import HttpSetUp
from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.peer import HOST, Place, SetUp
from loraplex.bench.peers.process import Command, output_of, pinned

GGUF_PROGRAM = Path(__file__).with_name("gguf_program.py")


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """server   the binary llama-server
    source   llama.cpp's source folder, for its converters
    python   the interpreter that runs them: it needs torch, transformers and sentencepiece
    """

    server: Path | None
    source: Path | None
    python: Path | None
    name: str = "llama.cpp"

    def missing(self) -> str | None:
        if self.server is None or self.source is None:
            return "--llama-server and --llama-source were not given"
        for path in (self.server, self.source / "convert_hf_to_gguf.py", self.python or Path(sys.executable)):
            if not path.is_file():
                return f"{path} is not there"
        return None

    def version(self) -> str:
        return llama_version(output_of([str(self.server), "--version"]))

    def prepare(self, material: Material) -> None:
        folder = _gguf_folder(material)
        wanted = [folder / "base.gguf", *_adapter_files(material)]
        made = material.stamp.stat().st_mtime
        if all(path.is_file() and path.stat().st_mtime >= made for path in wanted):
            return
        folder.mkdir(exist_ok=True)
        output_of(gguf_command(self.python or Path(sys.executable), self.source or Path(), material))

    def set_ups(self, material: Material, place: Place) -> list[SetUp]:
        def command(port: int) -> Command:
            return Command(pinned([str(self.server), *server_flags(material, place, port)], place.core))

        numbers = {name: number for number, name in enumerate(material.names)}
        dialect = Dialect(lora_ids=numbers, extra={"cache_prompt": False})
        return [HttpSetUp(self.name, material, command, "/health", dialect=dialect)]


def server_flags(material: Material, place: Place, port: int) -> list[str]:
    """Every client has a slot of `max_tokens`. No prompt is kept: neither in a slot nor in RAM."""
    flags = {
        "--model": str(_gguf_folder(material) / "base.gguf"),
        "--alias": BASE_NAME,
        "--host": HOST,
        "--port": str(port),
        "--parallel": str(place.max_clients),
        "--ctx-size": str(place.max_clients * place.max_tokens),
        "--threads": str(place.threads),
        "--threads-batch": str(place.threads),
        "--cache-ram": "0",
    }
    files = [str(path) for path in _adapter_files(material)]
    loras = ["--lora", ",".join(files), "--lora-init-without-apply"] if files else []
    return [*(text for pair in flags.items() for text in pair), "--no-cache-prompt", "--no-webui", *loras]


def gguf_command(python: Path, source: Path, material: Material) -> list[str]:
    folders = [str(path) for path in material.adapters.values()]
    return [str(python), str(GGUF_PROGRAM), str(source), str(material.base), str(_gguf_folder(material)), *folders]


def llama_version(text: str) -> str:
    """ "llama.cpp 0.6.0-dev (build 11434, commit unknown), GNU 12.2.0" of what `--version` prints."""
    version = next((line for line in text.splitlines() if line.startswith("version: ")), "version: unknown")
    built = next((line for line in text.splitlines() if line.startswith("built with ")), "")
    compiler = built.removeprefix("built with ").partition(" for ")[0]
    return "llama.cpp " + version.removeprefix("version: ") + (f", {compiler}" if compiler else "")


def _gguf_folder(material: Material) -> Path:
    return material.folder / f"gguf-rank-{material.rank}"


def _adapter_files(material: Material) -> Sequence[Path]:
    return [_gguf_folder(material) / f"{name}.gguf" for name in material.names]

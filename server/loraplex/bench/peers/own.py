"""Loraplex: this installation's own server, started as any other peer."""

import sys
from dataclasses import dataclass

from loraplex import __version__
from loraplex.bench.peers.http_peer import HttpSetUp
from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.peer import HOST, Place, SetUp
from loraplex.bench.peers.process import Command, pinned


@dataclass(frozen=True, slots=True)
class Loraplex:
    name: str = "loraplex"

    def missing(self) -> str | None:
        return None

    def version(self) -> str:
        import torch

        return f"loraplex {__version__}, torch {torch.__version__}"

    def prepare(self, material: Material) -> None:
        """It takes transformers and PEFT folders."""

    def set_ups(self, material: Material, place: Place) -> list[SetUp]:
        def command(port: int) -> Command:
            flags = {
                "adapters": material.adapters_folder,
                "data-dir": material.folder / "loraplex-data",
                "host": HOST,
                "port": port,
                "served-model-name": BASE_NAME,
                "device": "cpu",
                "dtype": "bfloat16",
                "threads": place.threads,
                "max-loras": max(1, material.num_adapters),
                "max-num-seqs": place.max_clients,
                "max-model-len": place.max_tokens,
            }
            options = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
            serve = [sys.executable, "-m", "loraplex", "serve", str(material.base), *options]
            return Command(pinned(serve, place.core))

        return [HttpSetUp(self.name, material, command, "/ready")]

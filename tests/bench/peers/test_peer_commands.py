"""How each peer is found, started and asked its version; nothing runs that is not Python."""

import json
import os
import sys
from pathlib import Path

import pytest

from loraplex.bench.peers import process
from loraplex.bench.peers.llama_cpp import GGUF_PROGRAM, LlamaCpp, gguf_command, llama_version
from loraplex.bench.peers.material import Material
from loraplex.bench.peers.own import Loraplex
from loraplex.bench.peers.peer import Place
from loraplex.bench.peers.peft_mixed import PEFT_PROGRAM, PeftMixed
from loraplex.bench.peers.process import Command, pinned
from loraplex.bench.peers.vllm_cpu import VllmCpu, environment_of
from loraplex.bench.server import BenchFailed

PLACE = Place(core=None, max_clients=4, max_tokens=128)
ON_CORE_1 = Place(core=1, max_clients=4, max_tokens=128)


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return Material(tmp_path, 2, 16)


@pytest.fixture
def llama(tmp_path: Path) -> LlamaCpp:
    server, source = tmp_path / "llama-server", tmp_path / "llama.cpp"
    source.mkdir()
    for path in (server, source / "convert_hf_to_gguf.py"):
        path.touch()
    return LlamaCpp(server, source, Path(sys.executable))


@pytest.fixture
def vllm(tmp_path: Path) -> VllmCpu:
    folder = tmp_path / "vllm-environment"
    for path in (folder / "bin" / "python", folder / "bin" / "vllm", folder / "lib" / "libiomp5.so"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return VllmCpu(folder / "bin" / "python")


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def arguments_of(peer, material: Material, place: Place = PLACE) -> list[list[str]]:
    return [list(set_up.command.arguments) for set_up in peer.set_ups(material, place)]


def test_a_peer_that_was_not_named_is_missing():
    assert LlamaCpp(None, None, None).missing() == "--llama-server and --llama-source were not given"
    assert VllmCpu(None).missing() == "--vllm-python was not given"
    assert Loraplex().missing() is None


def test_a_peer_that_is_not_where_it_should_be_is_missing(llama: LlamaCpp, vllm: VllmCpu, tmp_path: Path):
    assert llama.missing() is None
    assert vllm.missing() is None
    nowhere = tmp_path / "nowhere"
    assert LlamaCpp(nowhere, llama.source, llama.python).missing() == f"{nowhere} is not there"
    assert VllmCpu(nowhere).missing() == f"{nowhere} is not there"
    assert PeftMixed(nowhere).missing() == f"{nowhere} is not there"
    assert "has no peft" in str(PeftMixed(Path("/bin/false")).missing())


def test_loraplex_serves_the_folder_of_adapters(material: Material):
    (arguments,) = arguments_of(Loraplex(), material)
    assert arguments[:4] == [sys.executable, "-m", "loraplex", "serve"]
    assert option(arguments, "--adapters") == str(material.adapters_folder)
    assert option(arguments, "--max-loras") == "2"
    assert option(arguments, "--max-num-seqs") == "4"
    assert option(arguments, "--threads") == "1"
    assert option(arguments, "--host") == "127.0.0.1"


def test_llama_cpp_loads_all_adapters_and_keeps_no_prompt(llama: LlamaCpp, material: Material):
    (arguments,) = arguments_of(llama, material)
    assert arguments[0] == str(llama.server)
    assert option(arguments, "--lora").split(",") == [
        str(material.folder / "gguf-rank-16" / f"bench-000{index}.gguf") for index in range(2)
    ]
    assert "--lora-init-without-apply" in arguments
    assert "--no-cache-prompt" in arguments
    assert option(arguments, "--cache-ram") == "0"
    assert option(arguments, "--ctx-size") == str(4 * 128), "every client's sequence has room"
    assert option(arguments, "--threads") == option(arguments, "--threads-batch") == "1"
    (set_up,) = llama.set_ups(material, PLACE)
    assert set_up.dialect.lora_ids == {"bench-0000": 0, "bench-0001": 1}


def test_llama_cpps_version():
    said = "version: 0.6.0-dev (build 11434, commit unknown)\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    assert llama_version(said) == "llama.cpp 0.6.0-dev (build 11434, commit unknown), GNU 12.2.0"
    assert llama_version("nothing of the kind") == "llama.cpp unknown"


def test_converting_goes_through_llama_cpps_own_converters(llama: LlamaCpp, material: Material):
    assert llama.python is not None
    assert llama.source is not None
    command = gguf_command(llama.python, llama.source, material)
    folders = [str(path) for path in material.adapters.values()]
    assert command == [
        sys.executable,
        str(GGUF_PROGRAM),
        str(llama.source),
        str(material.base),
        str(material.folder / "gguf-rank-16"),
        *folders,
    ]


def test_what_was_converted_is_not_converted_again(llama: LlamaCpp, material: Material):
    material.stamp.touch()
    folder = material.folder / "gguf-rank-16"
    failing = LlamaCpp(llama.server, llama.source, Path("/bin/false"))
    with pytest.raises(BenchFailed, match="exit code 1"):
        failing.prepare(material)
    for name in ("base", *material.names):
        (folder / f"{name}.gguf").touch()
    failing.prepare(material)
    os.utime(material.stamp, (2e9, 2e9))
    with pytest.raises(BenchFailed):
        failing.prepare(material)


def test_the_converter_is_told_how_the_tokenizer_cuts(tmp_path: Path):
    """By a stand-in for llama.cpp's source that writes down what it was asked."""
    source = tmp_path / "llama.cpp"
    (source / "conversion").mkdir(parents=True)
    (source / "gguf-py").mkdir()
    (source / "conversion" / "__init__.py").touch()
    (source / "conversion" / "base.py").write_text("class TextModel:\n    pass\n")
    program = (
        "import json, pathlib, sys\n"
        "from conversion.base import TextModel\n"
        "assert __name__ == '__main__'\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1])\n"
        "out.write_text(json.dumps([TextModel().get_vocab_base_pre(None), *sys.argv]))\n"
    )
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (source / name).write_text(program)
    process.output_of([sys.executable, str(GGUF_PROGRAM), str(source), "base-folder", str(tmp_path), "adapters/a"])
    how, *asked = json.loads((tmp_path / "base.gguf").read_text())
    assert how == "gpt-2"
    assert asked[0] == str(source / "convert_hf_to_gguf.py")
    assert asked[-1] == "base-folder"
    how, *asked = json.loads((tmp_path / "a.gguf").read_text())
    assert option(asked, "--base") == "base-folder"
    assert option(asked, "--outtype") == "bf16"
    assert asked[-1] == "adapters/a"


def test_vllm_runs_with_adapters_and_compiled_without(vllm: VllmCpu, material: Material):
    with_lora, compiled = arguments_of(vllm, material)
    for arguments in (with_lora, compiled):
        assert arguments[1:3] == ["serve", str(material.base)]
        assert "--no-enable-prefix-caching" in arguments
        assert option(arguments, "--served-model-name") == "base"
    assert option(with_lora, "--max-loras") == "2"
    assert option(with_lora, "--max-lora-rank") == "16"
    assert with_lora[-2:] == [f"{name}={path}" for name, path in material.adapters.items()]
    assert "--enable-lora" not in compiled
    assert [set_up.has_adapters for set_up in vllm.set_ups(material, PLACE)] == [True, False]


def test_vllms_worker_is_bound_by_vllm(vllm: VllmCpu, material: Material):
    assert vllm.python is not None
    environment = environment_of(vllm.python, material, ON_CORE_1)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert environment["LD_PRELOAD"].endswith(str(vllm.python.parent.parent / "lib" / "libiomp5.so"))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in environment_of(vllm.python, material, PLACE)
    assert all("taskset" not in arguments for arguments in arguments_of(vllm, material, ON_CORE_1))


def test_peft_runs_in_a_program_of_its_own(material: Material):
    (arguments,) = arguments_of(PeftMixed(), material)
    folders = [str(path) for path in material.adapters.values()]
    assert arguments == [sys.executable, str(PEFT_PROGRAM), str(material.base), "1", *folders]
    assert PeftMixed().version().startswith("peft ")


def test_a_command_is_pinned_where_taskset_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process.shutil, "which", lambda _: "/usr/bin/taskset")
    assert pinned(["serve"], 3) == ["taskset", "--cpu-list", "3", "serve"]
    assert pinned(["serve"], None) == ["serve"]
    monkeypatch.setattr(process.shutil, "which", lambda _: None)
    assert pinned(["serve"], 3) == ["serve"]


def test_a_command_as_one_types_it():
    assert Command(["serve", "x"], {"A": "1"}).text == "A=1 serve x"

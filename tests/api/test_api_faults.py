"""Faulty and hostile uploads over a real socket, all against one server: each is refused and leaves nothing behind.

The seeded faults are those of `tests/lora/faults.py`; what is in `PROOF` no reader can see, only running it shows.
"""

import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from faults import FAULTS, GOOD
from folders import parts_of, save_adapter
from live import LiveServer, assert_error
from peft_folders import Adapter, Base
from safetensors.torch import load_file, save_file
from test_api_completions import text_of
from transformers import AutoModelForCausalLM
from variants import Variant, write_variant

from loraplex.errors import StartupError

# Of the base of those tests: its vocabulary, and numbers of its own.
OF_ANOTHER_BASE = {
    "an index beyond the vocabulary",
    "nothing trained but the base's norms",
    "a larger vocabulary",
    "a saved head of more rows",
}
LLAMA_FAULTS = [name for name, (good, *_) in FAULTS.items() if GOOD[good][0] == "llama" and name not in OF_ANOTHER_BASE]


@pytest.fixture(scope="module")
def target(make_settings, tmp_path_factory) -> Iterator[LiveServer]:
    """A server that takes large files, with one good adapter."""
    settings = make_settings(tmp_path_factory.mktemp("data"), max_upload_bytes=160 << 20, adapter_cache_bytes=16 << 20)
    with LiveServer(settings) as server:
        yield server


@pytest.fixture
def server(target: LiveServer) -> Iterator[LiveServer]:
    """After each upload: at rest, staging empty, no blob that no version names, and the neighbours answer the same."""
    before = text_of(target.client, model="red", max_tokens=6)
    yield target
    target.check_at_rest()
    assert text_of(target.client, model="red", max_tokens=6) == before
    assert target.service.catalog.store.digests() == target.service.catalog.registry.live_digests()
    assert target.service.catalog.names() == ["blue", "red"]


@pytest.fixture(scope="module")
def good_folders(base_folder: Path, tmp_path_factory) -> Callable[[str], Path]:
    """The good adapters of `faults`, written for this server's base."""
    root = tmp_path_factory.mktemp("good")

    def write(good: str) -> Path:
        if not (root / good).is_dir():
            model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
            write_variant(Variant(good, GOOD[good][1]), model, root / good)
        return root / good

    return write


def push(server: LiveServer, folder: Path, name: str = "faulty") -> httpx2.Response:
    return server.client.post("/v1/adapters", data={"name": name}, files=parts_of(folder))


def assert_refused(reply: httpx2.Response, *words: str) -> None:
    assert 400 <= reply.status_code < 500, (reply.status_code, reply.text)
    body = reply.json()
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert [word for word in words if word not in body["error"]["message"]] == [], body
    assert len(reply.content) < 4096


def test_there_are_enough():
    assert len(LLAMA_FAULTS) + len(HOSTILE) + len(PROOF) >= 60
    assert len(HOSTILE) + len(PROOF) >= 20


@pytest.mark.parametrize("fault", LLAMA_FAULTS)
def test_a_seeded_fault(fault: str, server: LiveServer, good_folders, tmp_path: Path):
    good, change, words = FAULTS[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(good_folders(good), folder)
    change(Adapter(folder, Base("llama", dict(server.service.info.targets))))
    assert_refused(push(server, folder), *[word for word in words if not word.startswith("[")])


# -- files that lie ---------------------------------------------------------------------------------------------


def header_of(entries: dict, data: bytes = b"") -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


ONE = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

HOSTILE: dict[str, Callable[[], bytes]] = {
    "200,000 tensors": lambda: header_of(
        {f"t{i}": entry(4 * i, 4 * i + 4, [1]) for i in range(200_000)}, bytes(800_000)
    ),
    "90 MB of metadata": lambda: header_of({"__metadata__": {"a": "x" * (90 << 20)}, NAME: entry(0, 4, [1])}, bytes(4)),
    "a million keys of metadata": lambda: header_of(
        {"__metadata__": {str(i): "" for i in range(1_000_000)}, NAME: entry(0, 4, [1])}, bytes(4)
    ),
    "a name that is a path": lambda: header_of({"../../../../etc/passwd": entry(0, 4, [1])}, bytes(4)),
    "a name of a megabyte": lambda: header_of({"a." * 500_000 + "lora_A.weight": entry(0, 4, [1])}, bytes(4)),
    "a name that is markup": lambda: header_of({"<script>alert(1)</script>\n\x1b[31m": entry(0, 4, [1])}, bytes(4)),
    "half a surrogate pair as a name": lambda: (
        struct.pack("<Q", 70) + b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(70) + bytes(4)
    ),
    "overlapping tensors": lambda: header_of(
        {NAME: entry(0, 8, [2]), NAME.replace("_A", "_B"): entry(4, 12, [2])}, bytes(12)
    ),
    "a gap between tensors": lambda: header_of({NAME: entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "tensors beyond the end": lambda: header_of({NAME: entry(0, 2**40, [2**38])}, bytes(12)),
    "negative offsets": lambda: header_of({NAME: entry(-8, -4, [1])}, bytes(4)),
    "a negative size": lambda: header_of({NAME: entry(0, 4, [-1])}, bytes(4)),
    "sizes that overflow": lambda: header_of({NAME: entry(0, 4, [2**32, 2**32, 2**32])}, bytes(4)),
    "a hundred thousand sizes": lambda: header_of({NAME: entry(0, 4, [1] * 100_000)}, bytes(4)),
    "a size that is a fraction": lambda: header_of(
        {NAME: {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "a size that is true": lambda: header_of(
        {NAME: {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "an unknown type": lambda: header_of({NAME: entry(0, 4, [1], "Q4_K")}, bytes(4)),
    "one name twice": lambda: struct.pack("<Q", 120) + f"{{{ONE},{ONE}}}".encode().ljust(120) + bytes(8),
    "a header of 2^60 bytes": lambda: struct.pack("<Q", 2**60) + b"{}" + bytes(64),
    "a header of 2^64 - 1 bytes": lambda: b"\xff" * 8 + b"{}" + bytes(64),
    "a header longer than the file": lambda: struct.pack("<Q", 4096) + b"{}",
    "a header of no bytes": lambda: bytes(16),
    "a header that is no object": lambda: header_of([1, 2, 3]),  # type: ignore[arg-type]
    "a header nested without end": lambda: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a header in UTF-16": lambda: struct.pack("<Q", 8) + "{}  ".encode("utf-16-le"),
    "nothing": lambda: b"",
    "a pickle": lambda: b"\x80\x04\x95" + bytes(64),
    "a zip, as torch saves": lambda: b"PK\x03\x04" + bytes(64),
    "GGUF": lambda: b"GGUF" + bytes(64),
    "four megabytes of noise": lambda: os.urandom(4 << 20),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_file(fault: str, server: LiveServer, good_folders):
    parts = parts_of(good_folders("plain"))
    parts["weights"] = ("adapter_model.safetensors", HOSTILE[fault]())
    assert_refused(server.client.post("/v1/adapters", data={"name": "faulty"}, files=parts))


@pytest.mark.parametrize(
    "config",
    [
        b"{" * 100_000,
        b'{"peft_type": "LORA", "r": 1e999}',
        b"[" + b"0," * 400_000 + b"0]",
        b"\xff\xfe{}",
        b'{"r": NaN}',
    ],
    ids=["nested", "an infinite rank", "a long list", "no UTF-8", "NaN"],
)
def test_a_hostile_config(config: bytes, server: LiveServer, good_folders):
    parts = {**parts_of(good_folders("plain")), "config": ("adapter_config.json", config)}
    assert_refused(server.client.post("/v1/adapters", data={"name": "faulty"}, files=parts))


# -- what only the proof finds ----------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def scaled(factor: float, part: str = "lora_B") -> Change:
    return lambda tensors: {key: one * (factor if part in key else 1) for key, one in tensors.items()}


def filled(value: float, *parts: str) -> Change:
    return lambda tensors: {
        key: torch.full_like(one, value) if any(part in key for part in parts) else one for key, one in tensors.items()
    }


PROOF: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "deltas that vanish in rounding": ("plain", scaled(1e-30), ("without effect", "float32", "last bit")),
    "products that overflow": ("plain", filled(3e38, "q_proj"), ("NaN or infinity", "q_proj", "--dtype")),
    "products that cancel to NaN": (
        "plain",
        lambda tensors: {
            key: torch.where(torch.arange(one.shape[-1]) % 2 == 0, 3e38, -3e38).expand_as(one).clone()
            for key, one in tensors.items()
        },
        ("NaN or infinity",),
    ),
    "a norm that overflows": ("saved", filled(3e38, "norm.weight"), ("NaN or infinit",)),
    "a head that overflows": ("saved", filled(3e38, "lm_head.weight"), ("NaN or infinity", "lm_head")),
    "a gain that overflows": ("DoRA", filled(3e38, "magnitude"), ("NaN or infinity",)),
    "an embedding that overflows": ("ends", filled(3e38, "lora_embedding"), ("NaN or infinity", "embed_tokens")),
}


@pytest.mark.parametrize("fault", PROOF)
def test_what_only_the_proof_finds(fault: str, server: LiveServer, good_folders, tmp_path: Path):
    good, change, words = PROOF[fault]
    folder = tmp_path / "adapter"
    shutil.copytree(good_folders(good), folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: one.contiguous() for key, one in change(load_file(weights)).items()}, weights)
    reply = push(server, folder)
    assert_error(reply, 422, "proof_failed", *words, param="weights")


def test_in_bfloat16_less_is_lost_sooner(make_settings, good_folders, tmp_path: Path):
    """The same adapter has an effect in float32 and none in bfloat16; the message says in which."""
    folder = tmp_path / "adapter"
    shutil.copytree(good_folders("plain"), folder)
    weights = folder / "adapter_model.safetensors"
    save_file({key: one * (1e-5 if "lora_B" in key else 1) for key, one in load_file(weights).items()}, weights)
    for dtype, status in (("float32", 201), ("bfloat16", 422)):
        with LiveServer(make_settings(tmp_path / dtype, adapters=None, dtype=dtype)) as server:
            reply = push(server, folder)
            assert reply.status_code == status, reply.text
            if status == 422:
                assert_error(reply, 422, "proof_failed", "without effect", "bfloat16")
            server.check_at_rest()


# -- many at once, and folders ----------------------------------------------------------------------------------


def test_eight_hostile_uploads_at_once(server: LiveServer, good_folders):
    parts = parts_of(good_folders("plain"))
    kinds = ["200,000 tensors", "overlapping tensors", "a header of 2^60 bytes", "nothing"] * 2
    replies: list[httpx2.Response] = []

    def send(kind: str) -> None:
        files = {**parts, "weights": ("adapter_model.safetensors", HOSTILE[kind]())}
        replies.append(httpx2.post(f"{server.url}/v1/adapters", data={"name": "faulty"}, files=files, timeout=60))

    threads = [threading.Thread(target=send, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(replies) == len(kinds)
    for reply in replies:
        assert_refused(reply)


@pytest.mark.parametrize("to", ["a device", "a pipe", "a folder", "nothing", "itself"])
def test_a_folder_with_a_link_to_something_else(to: str, make_settings, base_folder: Path, tmp_path: Path):
    """Links are the operator's choice, to regular files; what else they lead to ends the start with the name."""
    folder = save_adapter(base_folder, tmp_path / "served" / "linked", seed=5, r=2)
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    if to == "a pipe":
        os.mkfifo(tmp_path / "pipe")
    places = {"a device": "/dev/zero", "a pipe": tmp_path / "pipe", "a folder": tmp_path, "nothing": tmp_path / "gone"}
    weights.symlink_to(places.get(to, weights))
    with pytest.raises(StartupError, match="'linked' in"):
        LiveServer(make_settings(tmp_path / "data", adapters=tmp_path / "served")).__enter__()
    assert not list((tmp_path / "data" / "staging").iterdir())


def test_a_folder_that_fails_the_proof_is_refused_at_start_by_name(make_settings, base_folder: Path, tmp_path: Path):
    folder = save_adapter(base_folder, tmp_path / "served" / "faint", seed=5, r=2)
    weights = folder / "adapter_model.safetensors"
    save_file(scaled(1e-30)(load_file(weights)), weights)
    with pytest.raises(StartupError, match="'faint' in .* without effect"):
        LiveServer(make_settings(tmp_path / "data", adapters=tmp_path / "served")).__enter__()

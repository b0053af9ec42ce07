"""The header check against files that lie, and against what safetensors and torch really write."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft_folders import Adapter
from safetensors.torch import save

from loraplex.errors import AdapterInvalid, PickleRefused
from loraplex.lora.digest import WEIGHTS_NAME
from loraplex.lora.headers import (
    MAX_HEADER_BYTES,
    MAX_METADATA_BYTES,
    MAX_TENSORS,
    parse_header,
    read_header,
    refuse_pickle_name,
)

KEY = "base_model.model.q_proj.lora_A.weight"


def entry(shape: list[int], begin: int, dtype: str = "F32", end: int | None = None) -> dict[str, Any]:
    size = 4 if dtype == "F32" else 2
    count = size
    for dimension in shape:
        count *= dimension
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + count if end is None else end]}


def file_of(header: Any, data: bytes = b"\0" * 32, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"a": entry([2, 2], 0), "b": entry([2, 2], 16)}


VALID = save({"a": torch.ones(2, 3), "bb": torch.ones(4, 1, dtype=torch.bfloat16)}, metadata={"format": "pt"})


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(AdapterInvalid) as caught:
        read_header(path)
    assert len(caught.value.message) < 1000
    return caught.value.message


def test_pefts_file(llama_adapter: Adapter):
    header = read_header(llama_adapter.folder / WEIGHTS_NAME)
    tensors = llama_adapter.tensors
    assert header.tensors.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert header.tensors[key].shape == tuple(tensor.shape)
        assert header.tensors[key].dtype == "F32"
        assert header.tensors[key].nbytes == tensor.nbytes
    assert header.metadata["format"] == "pt"


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path):
    # its length begins with the bytes 80 02, as a pickle does
    text = json.dumps(GOOD).encode().ljust(640)
    (tmp_path / "f").write_bytes(file_of(text))
    assert len(read_header(tmp_path / "f").tensors) == 2


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({}, "0 tensors"),
        ([], "not a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xff", "not valid JSON"),
        (b'{"a":' * 200_000, "not valid JSON"),
        (b'{"a":%s,"a":%s}' % ((json.dumps(entry([2, 4], 0)).encode(),) * 2), "twice"),
        ({"a": 5}, "dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [2, 4]}}, "dtype, shape"),
        ({"a": {**entry([2, 4], 0), "more": 1}}, "dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32, 64]}}, "dtype, shape"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": ["0", "32"]}}, "dtype, shape"),
        ({"a": entry([2, 4], 0, "I32", 32)}, "I32"),
        ({"a": entry([4], 0, "F64", 32)}, "F64"),
        ({"a": entry([2, 4], 0, "F8_E4M3", 8)}, "F8_E4M3"),
        ({"a": entry([], 0, "F32", 4)}, "two sizes"),
        ({"a": entry([2, 2, 2], 0)}, "stacks of experts"),
        ({"a": entry([1] * 100_000, 0)}, "two sizes"),
        ({"a": entry([0, 4], 0), "b": entry([2, 4], 0)}, "above 0"),
        ({"a": {"dtype": "F32", "shape": [-2, -4], "data_offsets": [0, 32]}}, "above 0"),
        ({"a": {"dtype": "F32", "shape": [True, 8], "data_offsets": [0, 32]}}, "above 0"),
        ({"a": {"dtype": "F32", "shape": [2.0, 4], "data_offsets": [0, 32]}}, "above 0"),
        ({"a": entry([2, 4], 0, end=16)}, "offsets say 16"),
        ({"a": entry([2**31, 2**31], 0, end=32)}, "offsets say 32"),
        ({"a": entry([2**62, 4], 0, end=0)}, "offsets say 0"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [-32, 0]}}, "offsets"),
        ({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [False, 32]}, "b": 1}, ""),
        ({"a": entry([2, 4], 10**9)}, "0 is free"),
        ({"a": entry([2, 2], 0), "b": entry([2, 2], 8)}, "16 is free"),
        ({"a": entry([2, 2], 0)}, "it holds 32"),
        ({"a": entry([4, 4], 0)}, "it holds 32"),
        ({**GOOD, "__metadata__": {"a": 1}}, "__metadata__"),
        ({**GOOD, "__metadata__": "x"}, "__metadata__"),
        ({**GOOD, "__metadata__": {"a": "x" * (MAX_METADATA_BYTES + 1)}}, "__metadata__"),
    ],
)  # fmt: skip
def test_lying_headers(tmp_path: Path, header: Any, word: str):
    assert word in refusal(tmp_path / "f", file_of(header))


def test_limits(tmp_path: Path):
    assert "limit" in refusal(tmp_path / "f", file_of(GOOD, length=MAX_HEADER_BYTES + 1))
    assert "limit" in refusal(tmp_path / "f", file_of(GOOD, length=2**64 - 1))
    assert "inside its header" in refusal(tmp_path / "f", file_of(GOOD, length=4096))
    assert "header alone" in refusal(tmp_path / "f", b"\x10\0\0")
    assert "header alone" in refusal(tmp_path / "f", b"")
    many = {f"{n:x}": 0 for n in range(MAX_TENSORS + 1)}
    assert str(MAX_TENSORS) in refusal(tmp_path / "f", file_of(many))


def test_what_is_no_regular_file(tmp_path: Path):
    import os

    (tmp_path / "f").write_bytes(file_of(GOOD))
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", "missing"):
        with pytest.raises(OSError, match=name):
            read_header(tmp_path / name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_bare_pickles(tmp_path: Path, protocol: int):
    (tmp_path / "f").write_bytes(pickle.dumps({"a": [1, 2]}, protocol=protocol))
    with pytest.raises(PickleRefused, match="safetensors"):
        read_header(tmp_path / "f")


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path: Path, zipped: bool):
    torch.save({KEY: torch.ones(2, 2)}, tmp_path / "f", _use_new_zipfile_serialization=zipped)
    with pytest.raises(PickleRefused, match="save_file"):
        read_header(tmp_path / "f")


def test_other_formats(tmp_path: Path):
    assert "GGUF" in refusal(tmp_path / "f", b"GGUF\x03\0\0\0" + b"\1" * 100)


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.PTH", "x.ckpt", "x.pkl"])
def test_pickle_names(name: str):
    with pytest.raises(PickleRefused, match=name):
        refuse_pickle_name(name)
    refuse_pickle_name("adapter_model.safetensors")


@settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_never_pass_with_a_lie(tmp_path: Path, data: st.DataObject):
    """Whatever is done to a file: refused, or every tensor lies inside the file and safetensors agrees."""
    path = tmp_path / "f"
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        action = data.draw(st.sampled_from(["flip", "cut", "add", "digit", "length"]))
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if action == "flip" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif action == "cut":
            del content[at : at + data.draw(st.integers(1, 40))]
        elif action == "add":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        elif action == "digit":
            places = [n for n, sign in enumerate(content) if 48 <= sign <= 57]
            if places:
                content[data.draw(st.sampled_from(places))] = data.draw(st.integers(48, 57))
        else:
            content[:8] = data.draw(st.integers(0, len(content) + 8)).to_bytes(8, "little")
    path.write_bytes(content)
    try:
        header = read_header(path)
    except (AdapterInvalid, PickleRefused):
        return
    for info in header.tensors.values():
        assert info.offset >= 0
        assert header.data_start + info.offset + info.nbytes <= len(content)


@settings(max_examples=300)
@given(st.binary(max_size=64), st.integers(0, 2**40))
def test_any_bytes_are_refused(start: bytes, size: int):
    with pytest.raises((AdapterInvalid, PickleRefused)):
        parse_header(start, size)

import json

import pytest
import torch

from loraplex.bench import machine
from loraplex.bench.machine import MIB, measure_limits
from loraplex.bench.tables import machine_text


def test_limits_are_measured_and_torch_is_left_as_it_was():
    threads = torch.get_num_threads()
    limits = measure_limits("cpu", 1, (torch.float32,), buffer_bytes=8 * MIB, seconds_each=0.01)
    assert torch.get_num_threads() == threads
    assert 1 in limits.bytes_per_second
    assert limits.bandwidth == limits.bytes_per_second[1] > 0
    assert set(limits.flops) == {"float32"}
    assert limits.flops["float32"] > 0
    assert limits.buffer_bytes == 8 * MIB
    assert limits.to_json()["bytes_per_second"]["1"] == limits.bandwidth
    text = machine_text(json.loads(json.dumps(limits.to_json())))
    assert "over 8 MiB" in text
    assert "GB/s on 1 thread," in text or "GB/s on 1 thread " in text


def test_the_buffer_is_larger_than_the_cache(monkeypatch: pytest.MonkeyPatch):
    read = []
    monkeypatch.setattr(machine, "_read_seconds", lambda matrix, *_: read.append(matrix.nbytes) or 1.0)
    monkeypatch.setattr(machine, "_flops", lambda *_: 1.0)
    monkeypatch.setattr(machine, "MIN_BUFFER_BYTES", MIB)
    monkeypatch.setattr(machine, "last_level_cache_bytes", lambda: 3 * MIB)
    limits = measure_limits("cpu", 1)
    assert set(read) == {6 * MIB}
    assert limits.buffer_bytes == 6 * MIB
    assert limits.is_beyond_cache


def test_cache_sizes_are_read_as_the_system_writes_them(tmp_path, monkeypatch: pytest.MonkeyPatch):
    for index, text in enumerate(("48K", "2048K", "480M", "odd")):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "size").write_text(text + "\n")
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    assert machine.last_level_cache_bytes() == 480 * MIB
    monkeypatch.setattr(machine, "_CACHES", tmp_path / "nowhere")
    assert machine.last_level_cache_bytes() == 0

"""Loads in worker threads: real files through the reader into RAM and out again."""

import re
from pathlib import Path

import pytest
import torch

from loraplex.bench.random_model import save_random_adapter
from loraplex.engine.adapter_cache import AdapterCache
from loraplex.engine.adapter_loads import AdapterLoads, FinishedLoad
from loraplex.errors import AdapterLoadFailed
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, file_sha256
from loraplex.lora.reader import AdapterReader
from loraplex.lora.weights import ModuleShape
from loraplex.model.devices import keep_large_blocks_apart

TARGETS = {name: ModuleShape(name, 2048, 2048) for name in ("layers.0.up_proj", "layers.1.up_proj")}
RANKS = (64, 80, 96, 128, 160, 176)  # slabs of 1 to 2.8 MB
SECONDS = 60.0


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as the store keeps them, by digest."""
    root = tmp_path_factory.mktemp("blobs")
    folders = {}
    for seed, rank in enumerate(RANKS):
        folder = save_random_adapter(TARGETS.values(), rank, seed, torch.bfloat16, root / "new")
        digest = adapter_digest(file_sha256(folder / CONFIG_NAME), file_sha256(folder / WEIGHTS_NAME))
        folders[digest] = folder.rename(root / digest)
    return folders


@pytest.fixture
def reader(stored: dict[str, Path]) -> AdapterReader:
    return AdapterReader(next(iter(stored.values())).parent, TARGETS, torch.bfloat16, max(RANKS))


def loaded(loads: AdapterLoads, *digests: str) -> list[FinishedLoad]:
    for digest in digests:
        loads.start(digest)
    found: list[FinishedLoad] = []
    while len(found) < len(digests):
        found += loads.wait(SECONDS)
    return found


@pytest.fixture
def loads(reader: AdapterReader):
    loads = AdapterLoads(reader.read, 2)
    yield loads
    loads.close()


def test_a_load_says_what_took_its_time(loads: AdapterLoads, stored: dict[str, Path]):
    found = loaded(loads, *stored)
    assert {load.digest for load in found} == set(stored)
    assert all(load.weights is not None and load.weights.digest == load.digest for load in found)
    assert all(load.disk_seconds > 0 and load.convert_seconds > 0 for load in found)


def test_a_load_that_fails_answers(reader: AdapterReader):
    def broken(digest: str, on_files):
        on_files()
        raise RuntimeError("no")

    for read, message in ((reader.read, "could not be loaded"), (broken, "RuntimeError: no")):
        loads = AdapterLoads(read, 1)
        (load,) = loaded(loads, "0" * 64)
        loads.close()
        assert load.weights is None
        assert isinstance(load.error, AdapterLoadFailed)
        assert message in load.error.message


def anonymous_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's memory")
def test_memory_stays_where_it_is_over_hundreds_of_loads(loads: AdapterLoads, stored: dict[str, Path]):
    """Adapters of different sizes come and go; what they leave behind is nothing."""
    keep_large_blocks_apart()
    sizes = {load.digest: load.weights.nbytes for load in loaded(loads, *stored) if load.weights}
    cache = AdapterCache(sum(sizes.values()) // 2)
    kept = []
    for turn in range(480):
        digest = list(stored)[turn * 5 % len(stored)]
        if digest not in cache:
            assert cache.reserve(digest, sizes[digest], ())
            (load,) = loaded(loads, digest)
            assert load.weights is not None
            cache.insert(load.weights)
            del load
        if turn % 120 == 119:
            kept.append(anonymous_bytes() - cache.currsize)
    assert cache.num_evictions > 300
    assert kept[-1] - kept[0] < 1.5 * max(sizes.values()), f"memory grew: {kept}"

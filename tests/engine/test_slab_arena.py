"""Slabs in one pinned block: none overlaps another, a range is free when the last view of it is gone, and what finds no
range is served from ordinary memory. Pinning is a double here."""

import gc
import random
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.bench.random_model import save_random_adapter
from loraplex.engine import slab_arena
from loraplex.engine.slab_arena import SlabArena, slab_allocator
from loraplex.errors import StartupError
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, file_sha256
from loraplex.lora.reader import AdapterReader
from loraplex.lora.weights import SLAB_ALIGNMENT as ALIGNMENT
from loraplex.lora.weights import ModuleShape, allocate_slab


class Pinned:
    """Stands for the driver: what is pinned now, in bytes by address."""

    def __init__(self):
        self.blocks: dict[int, int] = {}

    def __call__(self, block: torch.Tensor):
        address = block.data_ptr()
        self.blocks[address] = block.nbytes
        return lambda: self.blocks.pop(address)

    def holds(self, slab: torch.Tensor) -> bool:
        start, end = slab.data_ptr(), slab.data_ptr() + slab.nbytes
        return any(first <= start and end <= first + nbytes for first, nbytes in self.blocks.items())


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans(), st.randoms(use_true_random=False)), max_size=40))
def test_slabs_keep_what_was_written_whatever_comes_and_goes(moves: list[tuple[int, bool, random.Random]]):
    pinned = Pinned()
    arena = SlabArena(40 * ALIGNMENT, pinned)
    slabs: list[tuple[int, torch.Tensor]] = []
    for index, (numel, leaves, rng) in enumerate(moves):
        if leaves and slabs:
            del slabs[rng.randrange(len(slabs))]
        else:
            slab = arena.allocate(numel, torch.bfloat16)
            assert (slab.dtype, slab.shape) == (torch.bfloat16, (numel,))
            assert slab.is_contiguous()
            slabs.append((index % 200, slab.fill_(index % 200)))
        arena.check_integrity()
        assert all(bool((slab == value).all()) for value, slab in slabs)
        inside = [slab for _, slab in slabs if pinned.holds(slab)]
        used = sum(-(-slab.nbytes // ALIGNMENT) * ALIGNMENT for slab in inside)
        assert arena.free_bytes <= arena.nbytes - used
    slabs.clear()
    slab = inside = None
    assert arena.free_bytes == arena.nbytes, "all of it is one range again"
    assert pinned.holds(arena.allocate(arena.nbytes // 4, torch.float32))


def test_a_slab_of_the_same_size_finds_the_room_of_the_one_that_left():
    """Not the first range that is large enough: the smallest. So adapters of a few recipes leave no gaps."""
    pinned = Pinned()
    arena = SlabArena(50 * ALIGNMENT, pinned)
    slabs = {size: arena.allocate(size * ALIGNMENT, torch.uint8) for size in (20, 3, 10, 17)}
    small = slabs[10].data_ptr()
    del slabs[20], slabs[10]
    assert arena.allocate(10 * ALIGNMENT, torch.uint8).data_ptr() == small
    assert all(map(pinned.holds, slabs.values()))


def test_what_finds_no_range_is_ordinary_memory():
    pinned = Pinned()
    arena = SlabArena(3 * ALIGNMENT, pinned)
    held = [arena.allocate(ALIGNMENT, torch.uint8) for _ in range(3)]
    del held[1]
    held.append(arena.allocate(2 * ALIGNMENT, torch.uint8))
    assert not pinned.holds(held[-1])
    assert pinned.holds(arena.allocate(ALIGNMENT, torch.uint8)), "the gap serves what fits"


def test_a_view_holds_its_range():
    """Of an evicted adapter a merge or a proof may still hold a matrix."""
    arena = SlabArena(4 * ALIGNMENT, Pinned())
    slab = arena.allocate(ALIGNMENT, torch.float32)
    view = slab[:6].view(2, 3).T
    del slab
    assert arena.free_bytes == 0
    del view
    assert arena.free_bytes == 4 * ALIGNMENT


def test_the_block_is_unpinned_when_arena_and_slabs_are_gone():
    pinned = Pinned()
    arena = SlabArena(4 * ALIGNMENT, pinned)
    slab = arena.allocate(ALIGNMENT, torch.uint8)
    del arena
    gc.collect()
    assert pinned.holds(slab)
    del slab
    gc.collect()
    assert not pinned.blocks


def test_threads_share_it():
    arena = SlabArena(64 * ALIGNMENT, Pinned())
    wrong: list[int] = []

    def work(value: int) -> None:
        rng = random.Random(value)
        held: list[torch.Tensor] = []
        for _ in range(300):
            held.append(arena.allocate(rng.randrange(1, 6 * ALIGNMENT), torch.uint8).fill_(value))
            if len(held) > 4:
                wrong.extend(value for slab in held if not bool((slab == value).all()))
                del held[rng.randrange(len(held))]

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    arena.check_integrity()
    assert arena.free_bytes == arena.nbytes


def test_the_reader_writes_into_it(tmp_path: Path):
    """The slab that reaches the RAM tier is the arena's, with the same bits as one of ordinary memory."""
    targets = {name: ModuleShape(name, 64, 32) for name in ("layers.0.up_proj", "layers.1.up_proj")}
    folder = save_random_adapter(targets.values(), 4, 1, torch.bfloat16, tmp_path / "new")
    digest = adapter_digest(file_sha256(folder / CONFIG_NAME), file_sha256(folder / WEIGHTS_NAME))
    folder.rename(tmp_path / digest)
    pinned = Pinned()
    arena = SlabArena(1 << 20, pinned)
    usual = AdapterReader(tmp_path, targets, torch.bfloat16, 8).read(digest)
    weights = AdapterReader(tmp_path, targets, torch.bfloat16, 8, allocate=arena.allocate).read(digest)
    assert pinned.holds(weights.slab)
    assert torch.equal(weights.slab, usual.slab)
    assert weights.modules == usual.modules


def test_on_a_cpu_nothing_is_pinned():
    assert slab_allocator(1 << 60, torch.device("cpu"), None) is allocate_slab  # type: ignore[arg-type]


def test_more_than_there_is_is_refused_before_it_is_pinned(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slab_arena, "available_memory", lambda device: 1 << 20)
    with pytest.raises(StartupError, match=r"--adapter-cache-bytes 1048577 .*1048576 bytes of RAM"):
        slab_allocator((1 << 20) + 1, torch.device("cuda"), None)  # type: ignore[arg-type]
    pinned = Pinned()
    slab = slab_allocator(1 << 20, torch.device("cuda"), pinned)(10, torch.float16)
    assert pinned.holds(slab)
    assert list(pinned.blocks.values()) == [1 << 20]

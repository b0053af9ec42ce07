"""DoRA's norms: the formula, and a file beside the adapter that is only believed when it is whole."""

from pathlib import Path

import pytest
import torch
from peft_folders import Base, save_with_peft

from loraplex.lora.norms import StoredNorms, norm_of_rows
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore

MODULES = {"a": 3, "b": 2000}


def norms(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in MODULES.items()}


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("computed although stored")


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("out_features", [1, 1000, 1024, 2500])
def test_the_formula(out_features: int):
    weight, a, b = torch.randn(out_features, 12), torch.randn(3, 12), torch.randn(out_features, 3)
    expected = (weight + 0.7 * b @ a).norm(dim=1)
    torch.testing.assert_close(norm_of_rows(weight, a, b, 0.7), expected)


def test_stored_once(tmp_path: Path):
    stored = StoredNorms("f" * 64, torch.float32)
    assert equal(stored.get(tmp_path, MODULES, norms), norms())
    assert equal(stored.get(tmp_path, MODULES, never), norms())
    assert len(list(tmp_path.iterdir())) == 1


def test_another_base_or_type_has_its_own(tmp_path: Path):
    StoredNorms("f" * 64, torch.float32).get(tmp_path, MODULES, norms)
    for seed, (fingerprint, dtype) in enumerate((("e" * 64, torch.float32), ("f" * 64, torch.bfloat16)), 1):
        other = StoredNorms(fingerprint, dtype)
        assert equal(other.get(tmp_path, MODULES, lambda seed=seed: norms(seed)), norms(seed))


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "text"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str):
    stored = StoredNorms("f" * 64, torch.float32)
    stored.get(tmp_path, MODULES, norms)
    [file] = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-3] ^= 1
    file.write_bytes({"torn": data[:-8], "flipped": data, "empty": b"", "text": b"no tensors"}[damage])
    assert equal(stored.get(tmp_path, MODULES, lambda: norms(1)), norms(1))
    assert equal(stored.get(tmp_path, MODULES, never), norms(1))


def test_norms_of_other_modules_are_made_anew(tmp_path: Path):
    stored = StoredNorms("f" * 64, torch.float32)
    stored.get(tmp_path, MODULES, norms)
    assert equal(stored.get(tmp_path, {"a": 3}, lambda: {"a": norms(2)["a"]}), {"a": norms(2)["a"]})


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    stored = StoredNorms("f" * 64, torch.float32)
    assert equal(stored.get(tmp_path / "gone", MODULES, norms), norms())


def test_a_second_load_needs_no_base(llama: Base, tmp_path: Path):
    """The norms of a stored adapter are computed at its first load, and swept with it."""
    save_with_peft(llama, tmp_path / "adapter", r=4, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    model = llama.model()
    with AdapterStore(tmp_path / "store") as store:
        with store.import_folder(tmp_path / "adapter") as staging:
            digest = store.commit(staging)

        def reader(tensor_of) -> AdapterReader:
            return AdapterReader(store.blobs, llama.targets, torch.float32, 64, tensor_of, "f" * 64)

        first = reader(model.get_parameter).read(digest)
        second = reader(None).read(digest)
        assert torch.equal(first.slab, second.slab)
        store.check_integrity()
        assert store.sweep(list) == [digest]
        assert not list(store.blobs.iterdir())

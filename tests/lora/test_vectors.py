"""DoRA and lora_bias: from PEFT's files to gains and shifts."""

from pathlib import Path

import pytest
import torch
from peft_folders import Adapter, Base, save_with_peft, targets_of

from loraplex.errors import AdapterInvalid, AdapterLoadFailed
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore
from loraplex.model.lora_layers import weight_and_bias
from tiny import make_model


def stored(folder: Path, tmp_path: Path, base: Base, tensor_of=None):
    """The adapter of `folder` as the engine gets it."""
    with AdapterStore(tmp_path / "store") as store:
        with store.import_folder(folder) as staging:
            digest = store.commit(staging)
            return AdapterReader(store.blobs, base.targets, torch.float32, 64, tensor_of).read(digest)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_gains_are_pefts(model_type: str, tmp_path: Path):
    """gain = magnitude / norm of the changed weight, as PEFT's own layer computes both; B carries the gain."""
    model = make_model(model_type)
    base = Base(model_type, targets_of(model))
    names = ["q_proj", "down_proj"] if model_type == "llama" else ["c_attn"]
    peft_model = save_with_peft(base, tmp_path / "adapter", r=4, use_dora=True, target_modules=names)
    weights = stored(tmp_path / "adapter", tmp_path, base, lambda path: base.model().get_parameter(path))
    assert not weights.is_additive
    for name in weights.modules:
        layer = peft_model.base_model.model.get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dora = layer.lora_magnitude_vector["default"]
        weight = weight_and_bias(layer.base_layer)[0]
        norm = (weight + layer.scaling["default"] * b @ a).norm(dim=1)
        extra = weights.extra(base.targets[name])
        assert extra is not None
        gain = extra.gain
        assert gain is not None
        assert extra.shift is None
        torch.testing.assert_close(gain, (dora.weight / norm).detach())
        torch.testing.assert_close(weights.bt(base.targets[name]).T, (gain.unsqueeze(1) * b).detach())
        assert torch.equal(weights.a(base.targets[name]), a.detach())


def test_the_slab_of_a_check_is_as_large_as_the_one_that_is_served(llama: Base, tmp_path: Path):
    """The registry's figure, by which RAM is reserved, comes from the check."""
    save_with_peft(llama, tmp_path / "adapter", r=4, use_dora=True, target_modules=["q_proj"])
    checked = Adapter(tmp_path / "adapter", llama).reader().check(tmp_path / "adapter")
    model = llama.model()

    def tensor_of(path: str) -> torch.Tensor:
        return model.get_parameter(path)

    served = stored(tmp_path / "adapter", tmp_path, llama, tensor_of)
    assert checked.facts.num_values == checked.plan.numel == served.slab.numel()


def test_a_row_of_zeros_has_no_norm(llama: Base, tmp_path: Path):
    save_with_peft(llama, tmp_path / "adapter", r=4, use_dora=True, target_modules=["q_proj"])
    adapter = Adapter(tmp_path / "adapter", llama)

    def clear(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0] = 0.0

    adapter.edit(clear)
    with pytest.raises(AdapterLoadFailed, match="not finite"):
        stored(adapter.folder, tmp_path, llama, lambda path: torch.zeros(*_shape(llama, path.removesuffix(".weight"))))


def test_magnitudes_must_be_finite(llama: Base, tmp_path: Path):
    save_with_peft(llama, tmp_path / "adapter", r=4, use_dora=True, target_modules=["q_proj"])
    adapter = Adapter(tmp_path / "adapter", llama)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(t for key, t in tensors.items() if "magnitude" in key)[3] = float("nan")

    adapter.edit(poison)
    with pytest.raises(AdapterInvalid, match="lora_magnitude_vector"):
        adapter.reader().check(adapter.folder)


@pytest.mark.parametrize(("fields", "word"), [({"use_dora": False}, "use_dora"), ({"lora_bias": True}, "lora_bias")])
def test_config_and_file_must_agree(llama: Base, tmp_path: Path, fields: dict[str, bool], word: str):
    save_with_peft(llama, tmp_path / "adapter", r=4, use_dora=True, target_modules=["q_proj"])
    adapter = Adapter(tmp_path / "adapter", llama).set(**fields)
    with pytest.raises(AdapterInvalid, match=word):
        adapter.reader().check(adapter.folder)


def _shape(base: Base, name: str) -> tuple[int, int]:
    return base.targets[name].out_features, base.targets[name].in_features

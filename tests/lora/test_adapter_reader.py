"""Slabs equal PEFT's state dict exactly, scalings equal PEFT's own; everything amiss is refused by name."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import Adapter, Base, save_with_peft

from loraplex.errors import AdapterInvalid, AdapterLoadFailed, PickleRefused
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.lora.reader import AdapterReader
from loraplex.lora.weights import ModuleShape

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

LLAMA = {
    "rank and alpha": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "odd alpha": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "one layer": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "an integer layer": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "regex": {"r": 2, "target_modules": r".*layers\.1\.(self_attn\.[qk]_proj|mlp\.down_proj)"},
    "excluded": {"r": 2, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by regex": {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "full names": {"r": 2, "target_modules": ["model.layers.0.mlp.up_proj", "layers.1.mlp.gate_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.\w+\.q_proj": 8, "model.layers.0.mlp.down_proj": 16},
        "alpha_pattern": {"down_proj": 32, "q_proj": 1},
    },
    "patterns with rslora": {
        "r": 4,
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"^model.layers.1.self_attn.v_proj": 5},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
}
GPT2 = {
    "conv1d": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "conv1d, layers": {"r": 4, "target_modules": ["c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "conv1d, all-linear": {"r": 4, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("case", [*LLAMA, *GPT2])
def test_slab_and_scaling_are_pefts(case: str, llama: Base, gpt2: Base, tmp_path: Path):
    from peft.tuners.lora import LoraLayer

    base, config = (llama, LLAMA[case]) if case in LLAMA else (gpt2, GPT2[case])
    model = save_with_peft(base, tmp_path / "adapter", **config)
    adapter = Adapter(tmp_path / "adapter", base)
    checked = adapter.reader().check(adapter.folder)
    shutil.copytree(adapter.folder, tmp_path / checked.digest)
    weights = adapter.reader().read(checked.digest)
    assert torch.equal(weights.slab, checked.weights.slab)
    assert weights.digest == checked.digest
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert weights.modules.keys() == layers.keys()
    for name, layer in layers.items():
        shape = base.targets[name]
        assert torch.equal(weights.a(shape), layer.lora_A["default"].weight)
        assert torch.equal(weights.bt(shape), layer.lora_B["default"].weight.T)
        assert weights.modules[name].scaling == layer.scaling["default"]
        assert weights.modules[name].rank == layer.r["default"]
    facts = checked.facts
    assert facts.num_modules == len(layers)
    assert facts.rank == max(layer.r["default"] for layer in layers.values())
    assert facts.nbytes == sum(path.stat().st_size for path in adapter.folder.glob("adapter_*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_are_rounded_once_to_the_compute_dtype(llama_adapter: Adapter, dtype: torch.dtype):
    checked = llama_adapter.reader(dtype).check(llama_adapter.folder)
    name = "model.layers.0.self_attn.q_proj"
    b = llama_adapter.tensors[KEY.format("B")]
    assert torch.equal(checked.weights.bt(llama_adapter.base.targets[name]), b.to(dtype).T)


def test_mixed_types_and_odd_offsets(adapter: Adapter):
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        types = (torch.float32, torch.bfloat16, torch.float16)
        return {key: tensor.to(types[n % 3]) for n, (key, tensor) in enumerate(sorted(tensors.items()))}

    adapter.edit(change)
    # by hand, since safetensors' writer aligns: an odd bfloat16 matrix before a float32 one
    targets = {"m": ModuleShape("m", 3, 2)}
    a = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    b = torch.tensor([[4.0], [5.0]])
    header = {
        "base_model.model.m.lora_A.weight": {"dtype": "BF16", "shape": [1, 3], "data_offsets": [0, 6]},
        "base_model.model.m.lora_B.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [6, 14]},
    }
    text = json.dumps(header).encode().ljust(256)
    data = a.view(torch.uint8).numpy().tobytes() + b.numpy().tobytes()
    odd = adapter.folder.parent / "odd"
    odd.mkdir()
    (odd / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data)
    (odd / CONFIG_NAME).write_text(json.dumps({**adapter.config, "r": 1, "target_modules": ["m"]}))
    checked = AdapterReader(odd.parent, targets, torch.float32, 64).check(odd)
    assert checked.weights.slab.tolist() == [1, 2, 3, 4, 5]
    assert checked.dtype == "BF16+F32"
    adapter.reader().check(adapter.folder)


def rename(old: str, new: str) -> Any:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".weight", ".default.weight"),
        (".weight", ".my-adapter.weight"),
        ("base_model.", "_orig_mod.base_model."),
        ("base_model.model.", "base_model.model._orig_mod."),
        ("layers.0.", "layers.0._orig_mod."),
    ],
)
def test_other_spellings_are_mapped(adapter: Adapter, old: str, new: str):
    expected = adapter.reader().check(adapter.folder).weights
    got = adapter.edit(rename(old, new)).reader().check(adapter.folder).weights
    assert torch.equal(got.slab, expected.slab)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("base_model.model.", "", ["lora_A", "base_model.model.<module>.lora_A.weight"]),
        ("lora_A.weight", "lora_A", ["lora_A", "spelling"]),
        ("lora_", "hada_", ["hada_", "spelling"]),
        ("lora_", "lora_embedding_", ["lora_embedding_A", "spelling"]),
        ("lora_B.weight", "lora_magnitude_vector.weight", ["lora_magnitude_vector", "use_dora"]),
        ("lora_B.weight", "base_layer.weight", ["base_layer.weight", "cannot be used"]),
        ("lora_A.weight", "lora_B.bias", ["lora_B.bias", "lora_bias"]),
        ("lora_B.weight", "modules_to_save.weight", ["modules_to_save", "cannot be used"]),
        ("q_proj", "k_proj", ["k_proj", "does not select"]),
        ("layers.1.", "layers.7.", ["layers.7.", "no LoRA module"]),
        ("model.layers", "model.language_model.layers", ["language_model", "Did you mean", "model.layers.0"]),
    ],
)
def test_tensors_that_fit_nothing(adapter: Adapter, old: str, new: str, words: list[str]):
    adapter.edit(rename(old, new))
    with pytest.raises(AdapterInvalid) as caught:
        adapter.reader().check(adapter.folder)
    for word in words:
        assert word in caught.value.message


def save_with_ends(base: Base, folder: Path) -> Adapter:
    """An adapter on the embedding, the head and q_proj, with PEFT's copies of the base's tensors."""
    save_with_peft(base, folder, r=2, target_modules=["embed_tokens", "lm_head", "q_proj"])
    return Adapter(folder, base)


def tensor_of(base: Base):
    model = base.model()
    return lambda path: model.get_parameter(path).detach()


def test_embedding_and_head(llama: Base, tmp_path: Path):
    adapter = save_with_ends(llama, tmp_path / "adapter")
    checked = adapter.reader(tensor_of=tensor_of(llama)).check(adapter.folder)
    embedding, head = llama.targets["model.embed_tokens"], llama.targets["lm_head"]
    file = adapter.tensors
    assert torch.equal(checked.weights.a(embedding), file["base_model.model.model.embed_tokens.lora_embedding_A"].T)
    assert torch.equal(checked.weights.bt(embedding), file["base_model.model.model.embed_tokens.lora_embedding_B"].T)
    assert torch.equal(checked.weights.a(head), file["base_model.model.lm_head.lora_A.weight"])
    assert set(checked.plan.copies) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert checked.facts.num_values == checked.plan.numel


def test_a_copy_that_differs_from_the_base_is_refused(llama: Base, tmp_path: Path):
    adapter = save_with_ends(llama, tmp_path / "adapter")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 1

    adapter.edit(change)
    check_refuses(adapter, "lm_head.base_layer.weight", "another base", tensor_of=tensor_of(llama))


def test_a_copy_in_a_coarser_type_is_the_same(llama: Base, tmp_path: Path):
    adapter = save_with_ends(llama, tmp_path / "adapter")

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key] = tensors[key].bfloat16()

    adapter.edit(halve)
    adapter.reader(tensor_of=tensor_of(llama)).check(adapter.folder)


def test_a_copy_of_another_vocabulary_is_refused(llama: Base, tmp_path: Path):
    adapter = save_with_ends(llama, tmp_path / "adapter")

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        key = "base_model.model.model.embed_tokens.base_layer.weight"
        tensors[key] = torch.cat([tensors[key], torch.zeros(1, 64)])

    adapter.edit(grow)
    check_refuses(adapter, "129 rows", "has 128", "vocabulary")


def check_refuses(adapter: Adapter, *words: str, **reader: Any) -> None:
    with pytest.raises(AdapterInvalid) as caught:
        adapter.reader(**reader).check(adapter.folder)
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_half_alone(adapter: Adapter, half: str):
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[KEY.format(half)]

    check_refuses(adapter.edit(drop), f"lora_{half}", "model.layers.0.self_attn.q_proj")


def test_a_selected_module_without_tensors(adapter: Adapter):
    check_refuses(adapter.set(target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj", "no tensors")


def test_a_selected_name_that_no_module_has_is_noted(adapter: Adapter):
    checked = adapter.set(target_modules=["q_proj", "v_proj", "c_attn"]).reader().check(adapter.folder)
    assert "c_attn" in checked.plan.notes[0]


def test_a_config_that_selects_nothing(adapter: Adapter):
    check_refuses(adapter.set(target_modules=["c_attn"]), "does not select")


def test_wrong_shapes_say_expected_and_found(adapter: Adapter):
    check_refuses(adapter.set(r=8), "[4, 64]", "[8, 64]", "q_proj.lora_A")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("B")] = torch.ones(65, 4)

    check_refuses(adapter.set(r=4).edit(widen), "[65, 4]", "[64, 4]", "q_proj.lora_B")


def test_two_spellings_of_one_tensor(adapter: Adapter):
    def double(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("A").replace(".weight", ".default.weight")] = torch.ones(4, 64)

    check_refuses(adapter.edit(double), "both lora_A")


def test_two_adapters_in_one_file(adapter: Adapter):
    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key.replace("A.weight", "A.x.weight"): tensor for key, tensor in tensors.items()}

    check_refuses(adapter.edit(mix), "several adapters", "x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(adapter: Adapter, value: float):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("B")][5, 1] = value

    check_refuses(adapter.edit(spoil), KEY.format("B"), "NaN or infinity")


def test_values_beyond_the_compute_dtype(adapter: Adapter):
    def grow(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("A")][0, 0] = 1e6

    adapter.edit(grow).reader(torch.float32).check(adapter.folder)
    check_refuses(adapter, KEY.format("A"), "float16", dtype=torch.float16)


def test_an_adapter_without_effect(adapter: Adapter):
    def zero_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[KEY.format("B")].zero_()

    def zero_all(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in tensors.items():
            if "lora_B" in key:
                tensor.zero_()

    adapter.edit(zero_one).reader().check(adapter.folder)
    check_refuses(adapter.edit(zero_all), "without effect")


def test_all_modules_without_scale(adapter: Adapter):
    check_refuses(adapter.set(lora_alpha=8, alpha_pattern={".*": 0}), "no effect")


def test_a_scale_of_zero_in_one_module(adapter: Adapter):
    checked = adapter.set(alpha_pattern={"q_proj": 0}).reader().check(adapter.folder)
    assert {delta.scaling for delta in checked.weights.modules.values()} == {0.0, 2.0}


def test_scalings(adapter: Adapter):
    check_refuses(adapter.set(lora_alpha=0), "no effect", "lora_alpha")
    check_refuses(adapter.set(lora_alpha=1e6), "1024")
    checked = adapter.set(lora_alpha=-8).reader().check(adapter.folder)
    assert {delta.scaling for delta in checked.weights.modules.values()} == {-2.0}


def test_the_rank_limit_names_the_flag(adapter: Adapter):
    check_refuses(adapter, "rank 4", "limit is 2", "--max-lora-rank 4", max_rank=2)


def test_a_pickle_under_the_right_name(adapter: Adapter):
    torch.save({"a": torch.ones(1)}, adapter.folder / WEIGHTS_NAME)
    with pytest.raises(PickleRefused):
        adapter.reader().check(adapter.folder)


class TestRead:
    """From the store's folder, where everything was checked once."""

    @pytest.fixture
    def stored(self, adapter: Adapter) -> tuple[Adapter, str]:
        digest = adapter.reader().check(adapter.folder).digest
        folder = adapter.folder.rename(adapter.folder.parent / digest)
        return Adapter(folder, adapter.base), digest

    def fails(self, stored: tuple[Adapter, str], *words: str, **reader: Any) -> None:
        adapter, digest = stored
        with pytest.raises(AdapterLoadFailed) as caught:
            adapter.reader(**reader).read(digest)
        for word in (digest, *words):
            assert word in caught.value.message

    def test_nothing_there(self, stored: tuple[Adapter, str]):
        shutil.rmtree(stored[0].folder)
        self.fails(stored, "No such file")

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_one_bit_flipped(self, stored: tuple[Adapter, str], name: str):
        content = bytearray((stored[0].folder / name).read_bytes())
        content[-3] ^= 4
        (stored[0].folder / name).write_bytes(content)
        self.fails(stored, "SHA-256")

    @pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
    def test_cut_short(self, stored: tuple[Adapter, str], name: str):
        os.truncate(stored[0].folder / name, 7)
        self.fails(stored, "SHA-256")

    def test_a_link_is_not_followed(self, stored: tuple[Adapter, str]):
        weights = stored[0].folder / WEIGHTS_NAME
        weights.rename(stored[0].folder / "elsewhere")
        weights.symlink_to("elsewhere")
        self.fails(stored)

    def test_an_error_of_the_disk(self, stored: tuple[Adapter, str], monkeypatch: pytest.MonkeyPatch):
        def broken(*_: Any) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("loraplex.lora.reader.open_regular", broken)
        self.fails(stored, "Input/output error")

    def test_a_smaller_rank_limit_than_when_it_was_accepted(self, stored: tuple[Adapter, str]):
        self.fails(stored, "--max-lora-rank", max_rank=2)

    @pytest.mark.parametrize("digest", ["", "../../etc", "A" * 64, "0" * 63, "0" * 64 + "\n"])
    def test_only_digests_become_paths(self, adapter: Adapter, digest: str):
        with pytest.raises(AdapterLoadFailed, match="not a digest"):
            adapter.reader().read(digest)


def test_one_reader_reads_many_as_many_readers_do(llama: Base, tmp_path: Path):
    """What it remembers of one adapter is right for the next: same recipe, other values; same header, other config."""
    recipes = [{"lora_alpha": 8}, {"lora_alpha": 8}, {"lora_alpha": 32}, {"lora_alpha": 8, "r": 2}]
    digests = []
    for index, recipe in enumerate(recipes):
        folder = tmp_path / str(index)
        save_with_peft(llama, folder, **{"r": 4, "target_modules": ["q_proj", "v_proj"], **recipe})
        adapter = Adapter(folder, llama).edit(lambda tensors, by=index + 1: {k: v * by for k, v in tensors.items()})
        digests.append(adapter.reader().check(folder).digest)
        folder.rename(tmp_path / digests[-1])
    one = Adapter(tmp_path / digests[0], llama).reader()
    called: list[str] = []
    for digest in [*digests, *digests]:
        weights = one.read(digest, lambda digest=digest: called.append(digest))
        alone = Adapter(tmp_path / digest, llama).reader().read(digest)
        assert torch.equal(weights.slab, alone.slab)
        assert weights.modules == alone.modules
    assert called == [*digests, *digests]


def test_no_heavy_imports():
    """The reader runs on a bare GPU machine."""
    import subprocess
    import sys

    code = (
        "import sys, loraplex.lora.reader; "
        "sys.exit(bool({'pydantic', 'fastapi', 'sqlalchemy', 'peft', 'transformers'} & set(sys.modules)))"
    )
    server = Path(__file__).parents[2] / "server"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(server)}).returncode == 0


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"target_modules": ["q_proj"]}, set()),
        ({"target_modules": ["q_proj", "embed_tokens"]}, set(range(128))),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, set(range(128))),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]}, {3, 9}),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [9, 3]}}, set()),
    ],
)
def test_which_tokens_rows_are_trained(llama: Base, tmp_path: Path, fields: dict[str, Any], trained: set[int]):
    save_with_peft(llama, tmp_path / "adapter", r=2, **fields)
    plan = Adapter(tmp_path / "adapter", llama).reader(tensor_of=tensor_of(llama)).check(tmp_path / "adapter").plan
    assert {token for token in range(200) if token in plan.trained_tokens} == trained

"""bake: transformers' model of the baked folder answers as PEFT does with base and adapter."""

import json
from pathlib import Path

import pytest
import torch
from arithmetic_rig import Rig, assert_equal_answers, assert_other_answers, loaded, logits_of
from safetensors.torch import load_file, save_file
from variants import GOOD, write_variant

from loraplex.errors import AdapterInvalid, StartupError
from loraplex.lora.arithmetic.bake import Baked, bake
from loraplex.lora.arithmetic.checkpoint import Checkpoint

# lora_bias on linears without a bias: no checkpoint of the architecture can hold the sum
UNBAKED = {"lora_bias where the base has none"}


def bake_into(rig: Rig, adapter: Path, name: str = "baked", base: Checkpoint | None = None) -> tuple[Path, Baked]:
    folder = rig.root / name
    folder.mkdir()
    with rig.sources(adapter) as (source,):
        return folder, bake(source, base or rig.checkpoint, folder)


@pytest.mark.parametrize("name", GOOD)
def test_every_form_of_adapter(name: str, tmp_path: Path):
    """Linears, embeddings, heads, experts, routers, DoRA, biases, saved modules, token rows; tied heads come apart
    where PEFT changes one of the two."""
    rig = Rig.make(tmp_path, name)
    for seed, variant in enumerate(GOOD[name]):
        peer = write_variant(variant, rig.model, tmp_path / str(seed), seed)
        if variant.name in UNBAKED:
            with pytest.raises(AdapterInvalid, match="lora_bias"):
                bake_into(rig, tmp_path / str(seed), f"baked-{seed}")
            continue
        folder, _ = bake_into(rig, tmp_path / str(seed), f"baked-{seed}")
        expected = logits_of(peer)
        assert_equal_answers(logits_of(loaded(folder)), expected, variant.name)
        assert_other_answers(rig.answer(), expected, variant.name)


@pytest.fixture
def llama_rig(tmp_path: Path) -> Rig:
    return Rig.make(tmp_path, "llama")


@pytest.fixture
def tied_rig(tmp_path: Path) -> Rig:
    return Rig.make(tmp_path, "qwen2-tied")


def test_what_is_not_changed_stays_byte_for_byte(llama_rig: Rig):
    (llama_rig.folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    (llama_rig.folder / "README.md").write_text("the base's card")
    (llama_rig.folder / "pytorch_model.bin").write_bytes(b"another format")
    folder, baked = bake_into(llama_rig, llama_rig.write("a", target_modules=["q_proj"]))
    before, after = (load_file(path / "model.safetensors") for path in (llama_rig.folder, folder))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)} == set(baked.changes)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"} == names
    assert (folder / "config.json").read_bytes() == (llama_rig.folder / "config.json").read_bytes()


def test_shards_and_types_stay(llama_rig: Rig):
    llama_rig.model.to(torch.bfloat16).save_pretrained(llama_rig.folder, max_shard_size="100KB")
    (llama_rig.folder / "model.safetensors").unlink(missing_ok=True)
    adapter = llama_rig.write("a", target_modules=["q_proj", "down_proj"])
    folder, baked = bake_into(llama_rig, adapter)
    shards = {path.name for path in llama_rig.folder.glob("*.safetensors")}
    assert len(shards) == 2
    assert {path.name for path in folder.glob("*.safetensors")} == shards
    for shard in shards:
        before, after = load_file(llama_rig.folder / shard), load_file(folder / shard)
        assert {key: tensor.dtype for key, tensor in before.items()} == {k: t.dtype for k, t in after.items()}
    # one rounding of the exact sum
    a, b = (load_file(adapter / "adapter_model.safetensors")[f"{PATH}.lora_{part}.weight"] for part in "AB")
    model = loaded(folder)
    base = llama_rig.model.get_submodule(NAME).weight
    assert torch.equal(model.get_submodule(NAME).weight, (base.float() + 2 * (b.float() @ a.float())).bfloat16())
    change = baked.changes[f"{NAME}.weight"]
    assert 0 < change.lost < 0.05
    assert 0.9 < change.num_moved / change.num_wanted <= 1


NAME = "model.layers.0.self_attn.q_proj"
PATH = f"base_model.model.{NAME}"


def test_a_tied_head_comes_apart_in_any_layout(tied_rig: Rig):
    """One file, several shards, and a copy of the head that a tied model does not read."""
    adapter = tied_rig.write("a", target_modules=["embed_tokens", "q_proj"])
    expected = tied_rig.answer(adapter)
    folder, baked = bake_into(tied_rig, adapter, "one-file")
    assert baked.is_untied
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert_equal_answers(logits_of(loaded(folder)), expected)
    tensors = load_file(tied_rig.folder / "model.safetensors")
    save_file(
        {**tensors, "lm_head.weight": torch.zeros(128, 64)}, tied_rig.folder / "model.safetensors", {"format": "pt"}
    )
    folder, _ = bake_into(tied_rig, adapter, "with-a-copy")
    assert_equal_answers(logits_of(loaded(folder)), expected)
    (tied_rig.folder / "model.safetensors").unlink()
    tied_rig.model.save_pretrained(tied_rig.folder, max_shard_size="60KB")
    folder, _ = bake_into(tied_rig, adapter, "shards")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert_equal_answers(logits_of(loaded(folder)), expected)


def test_a_checkpoint_without_the_models_first_part(tmp_path: Path):
    """As GPT-2's own is kept: h.0.attn.… for transformer.h.0.attn.…"""
    rig = Rig.make(tmp_path, "gpt2")
    adapter = rig.write("a", target_modules=["c_attn", "wte"], fan_in_fan_out=True, modules_to_save=["ln_f"])
    expected = rig.answer(adapter)
    tensors = load_file(rig.folder / "model.safetensors")
    plain = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    save_file(plain, rig.folder / "model.safetensors", {"format": "pt"})
    folder, _ = bake_into(rig, adapter)
    assert_equal_answers(logits_of(loaded(folder)), expected)


def test_the_adapters_texts_take_the_bases_place(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj"])
    (llama_rig.folder / "chat_template.jinja").write_text("base")
    (adapter / "chat_template.jinja").write_text("adapter")
    (adapter / "serving_profile.json").write_text("{}")
    folder, baked = bake_into(llama_rig, adapter)
    assert (folder / "chat_template.jinja").read_text() == "adapter"
    assert baked.brought == ("chat_template.jinja",)
    assert not (folder / "serving_profile.json").exists()
    assert "serving_profile.json" in baked.notes[0]


def test_a_checkpoint_in_an_unknown_layout_is_refused(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj"])
    tensors = load_file(llama_rig.folder / "model.safetensors")
    key = f"{NAME}.weight"
    for change in (
        {"fused.weight": tensors[key]},
        {key: tensors[key].view(32, 128)},
        {key: tensors[key].to(torch.int8)},
    ):
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        save_file({**rest, **change}, llama_rig.folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(StartupError, match="layout that is not known|unquantised"):
            bake_into(llama_rig, adapter, f"baked-{list(change)[0]}-{change.popitem()[1].dtype}")


def test_an_overflow_is_refused(llama_rig: Rig):
    llama_rig.model.half().save_pretrained(llama_rig.folder)
    adapter = llama_rig.write("a", target_modules=["q_proj"], lora_alpha=4000)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: tensor.float() * 50 for key, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match="not finite in float16"):
        bake_into(llama_rig, adapter)


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" + bytes(20)), "cannot be read"),
        (lambda folder: _index(folder, "[]"), "cannot be read"),
        (lambda folder: _index(folder, '{"weight_map": {"a": "../model.safetensors"}}'), "not in the folder"),
    ],
)
def test_a_broken_checkpoint_is_refused(llama_rig: Rig, break_it, why: str):
    break_it(llama_rig.folder)
    with pytest.raises(StartupError, match=why):
        _ = llama_rig.checkpoint


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)

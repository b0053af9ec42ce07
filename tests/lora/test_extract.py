"""extract: what a tuned model differs by, as an adapter."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from arithmetic_rig import Rig, assert_equal_answers, assert_other_answers, loaded, logits_of
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from loraplex.errors import InvalidRequest, StartupError
from loraplex.lora.arithmetic.bake import bake
from loraplex.lora.arithmetic.checkpoint import Checkpoint
from loraplex.lora.arithmetic.extract import Extracted, extract
from loraplex.model.targets import find_targets


def tuned(
    rig: Rig, change: Callable[[str, nn.Parameter], bool], rank: int | None = None
) -> tuple[PreTrainedModel, Checkpoint]:
    """The rig's model with the parameters changed that `change` chooses; matrices by `rank` (None: fully)."""
    model = copy.deepcopy(rig.model)
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if change(name, parameter):
            if parameter.ndim > 1 and rank is not None:
                left, right = (
                    torch.randn(*parameter.shape[:-1], rank),
                    torch.randn(*parameter.shape[:-2], rank, parameter.shape[-1]),
                )
                parameter.add_(0.05 * left @ right)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(rig.root / "tuned")
    return model, Checkpoint(rig.root / "tuned", find_targets(model))


def is_linear(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not any(
        part in name for part in ("embed", "wte", "wpe", "norm", "ln_", "bias", ".gate.", "router")
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-tied", "qwen3_moe", "mixtral", "gpt_oss"])
def test_a_low_rank_change_comes_back_whole(name: str, tmp_path: Path):
    """Linears, Conv1D, an untied head, experts stacked or one by one: PEFT answers as the tuned model."""
    rig = Rig.make(tmp_path, name)
    model, checkpoint = tuned(rig, is_linear, rank=3)
    found = extract(rig.checkpoint, checkpoint, rank=3)
    assert not found.left
    assert all(math.isclose(result.energy, 1, abs_tol=1e-6) for result in found.draft.results)
    assert {result.rank for result in found.draft.results} == {3}
    out = rig.save(found.draft)
    assert_equal_answers(rig.answer(out), logits_of(model))
    assert_other_answers(rig.answer(), logits_of(model))


def test_a_full_change_is_cut_to_the_best_rank(tmp_path: Path):
    rig = Rig.make(tmp_path, "llama")
    model, checkpoint = tuned(rig, lambda name, parameter: "up_proj" in name)
    found = extract(rig.checkpoint, checkpoint, rank=8)
    assert found.num_same == 2 * 6 + 1  # q, k, v, o, gate, down, and the head
    for result in found.draft.results:
        delta = model.get_submodule(result.name).weight - rig.model.get_submodule(result.name).weight
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        best = u[:, :8] @ torch.diag(s[:8]) @ vh[:8]
        assert (found.draft.factors[result.name].dense() - best).abs().max() <= 1e-5
        assert math.isclose(result.energy, float(s[:8].square().sum() / s.square().sum()), rel_tol=1e-5)
    config = json.loads((rig.save(found.draft) / "adapter_config.json").read_text())
    assert config["target_modules"] == ["up_proj"]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-tied", "gpt2", "phi", "qwen3_moe"])
def test_what_is_no_linear_is_named_and_can_be_saved(name: str, tmp_path: Path):
    """Norms, embeddings, positions, routers and biases; a tied head goes with its embedding."""
    rig = Rig.make(tmp_path, name)
    model, checkpoint = tuned(rig, lambda name, parameter: True, rank=3)
    named = extract(rig.checkpoint, checkpoint, rank=3)
    others = {name for name, parameter in model.named_parameters() if not is_linear(name, parameter)}
    assert {one.path for one in named.left} == others
    assert not named.saved
    saved = extract(rig.checkpoint, checkpoint, rank=3, saves=True)
    assert {one.path for one in saved.saved} == others
    assert not saved.left
    out = rig.save(saved.draft, "saved")
    assert_equal_answers(rig.answer(out), logits_of(model))
    plain = rig.save(named.draft, "plain")
    assert_other_answers(rig.answer(plain), logits_of(model))


def test_saved_names_take_no_other_module_along(tmp_path: Path):
    """ "norm" would name input_layernorm, too: PEFT compares the ends of names letter by letter."""
    rig = Rig.make(tmp_path, "llama")
    _, checkpoint = tuned(
        rig, lambda name, parameter: name in ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")
    )
    draft = extract(rig.checkpoint, checkpoint, rank=3, saves=True).draft
    assert draft.fields["modules_to_save"] == ["model.norm"]
    assert draft.fields["target_modules"] == ["model.layers.0.mlp.up_proj"]


def test_what_no_adapter_can_hold_is_left(tmp_path: Path):
    """The sinks of gpt_oss's attention are a parameter of no module that an adapter can save."""
    rig = Rig.make(tmp_path, "gpt_oss")
    _, checkpoint = tuned(rig, lambda name, parameter: "q_proj" in name or "sinks" in name, rank=2)
    found = extract(rig.checkpoint, checkpoint, rank=2, saves=True)
    assert {one.path.rpartition(".")[2] for one in found.left} == {"sinks"}
    assert all(one.relative > 0 for one in found.left)


def test_a_head_that_came_apart_in_tuning(tmp_path: Path):
    rig = Rig.make(tmp_path, "qwen2-tied")
    adapter = rig.write("a", target_modules=["embed_tokens", "q_proj"])
    folder = tmp_path / "untied"
    folder.mkdir()
    with rig.sources(adapter) as (source,):
        bake(source, rig.checkpoint, folder)
    model = loaded(folder)
    found: Extracted = extract(rig.checkpoint, Checkpoint(folder, find_targets(model)), rank=4, saves=True)
    assert {one.path for one in found.saved} == {"model.embed_tokens.weight"}
    assert_equal_answers(rig.answer(rig.save(found.draft)), logits_of(model))


def test_another_architecture_or_vocabulary_is_refused(tmp_path: Path):
    rig = Rig.make(tmp_path, "llama")
    for name, other in (("gemma2", Rig.make), ("qwen2", Rig.make)):
        (tmp_path / name).mkdir()
        with pytest.raises(StartupError, match="is not .* tuned"):
            extract(rig.checkpoint, other(tmp_path / name, name).checkpoint, rank=2)
    model = copy.deepcopy(rig.model)
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path / "larger")
    with pytest.raises(StartupError, match="vocabulary"):
        extract(rig.checkpoint, Checkpoint(tmp_path / "larger", find_targets(model)), rank=2)


def test_the_same_model_is_refused(tmp_path: Path):
    rig = Rig.make(tmp_path, "llama")
    with pytest.raises(InvalidRequest, match="nothing to extract"):
        extract(rig.checkpoint, rig.checkpoint, rank=2)
    _, checkpoint = tuned(rig, lambda name, parameter: name == "model.norm.weight")
    with pytest.raises(InvalidRequest, match="model.norm.weight"):
        extract(rig.checkpoint, checkpoint, rank=2)


def test_types_may_differ(tmp_path: Path):
    """A base in bfloat16 and a tuned model in float32 that only carries the base's values: nothing differs there."""
    rig = Rig.make(tmp_path, "llama")
    rig.model.to(torch.bfloat16).save_pretrained(rig.folder)
    rig.model.float()
    _, checkpoint = tuned(rig, lambda name, parameter: "q_proj" in name, rank=2)
    found = extract(rig.checkpoint, checkpoint, rank=2)
    assert {result.name.rpartition(".")[2] for result in found.draft.results} == {"q_proj"}
    assert {tensor.dtype for tensor in load_file(rig.save(found.draft) / "adapter_model.safetensors").values()} == {
        torch.float32
    }

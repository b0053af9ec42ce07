"""resize: every module cut to the best approximation of its rank, everything else as it was."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic_rig import Rig, assert_equal_answers, assert_other_answers, deltas, logits_of
from safetensors.torch import load_file
from variants import GOOD, write_variant

from loraplex.errors import AdapterInvalid, InvalidRequest
from loraplex.lora.arithmetic.resize import resize

# their form does not survive: experts kept one by one, and a head tied to the embedding by PEFT
ANEW = ("expert", "old path", "LoRA, tied", "LoRA by a regex, tied", "DoRA, tied")


def resized(rig: Rig, adapter: Path, name: str = "out", **cut: Any) -> Path:
    with rig.sources(adapter) as (source,):
        return rig.save(resize(source, **cut), name)


@pytest.fixture
def llama_rig(tmp_path: Path) -> Rig:
    return Rig.make(tmp_path, "llama")


def test_the_cut_is_the_best_one(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj", "down_proj"], r=12, use_rslora=True)
    exact = deltas(adapter)
    with llama_rig.sources(adapter, with_base=False) as (source,):
        draft = resize(source, rank=5)
    for result in draft.results:
        u, s, vh = torch.linalg.svd(exact[result.name], full_matrices=False)
        best = u[:, :5] @ torch.diag(s[:5]) @ vh[:5]
        assert (draft.factors[result.name].dense() - best).abs().max() <= 1e-5 * best.abs().max()
        assert math.isclose(result.energy, float(s[:5].square().sum() / s.square().sum()), rel_tol=1e-6)
        assert (result.rank, result.before) == (5, 12)
    assert 0 < draft.energy < 1


def test_energy_gives_each_module_its_rank(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj", "down_proj"], r=12, rank_pattern={"down_proj": 3})
    with llama_rig.sources(adapter) as (source,):
        draft = resize(source, energy=0.8)
    out = llama_rig.save(draft)
    for result in draft.results:
        with llama_rig.sources(adapter) as (source,):
            s = torch.linalg.svdvals(source.factors(result.name).dense()).square()
        assert s[: result.rank].sum() >= 0.8 * s.sum() > s[: result.rank - 1].sum()
    ranks = {result.name: result.rank for result in draft.results}
    assert len(set(ranks.values())) > 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert {**dict.fromkeys(ranks, config["r"]), **config["rank_pattern"]} == ranks
    shapes = {key: tensor.shape[0] for key, tensor in load_file(out / "adapter_model.safetensors").items()}
    for name, rank in ranks.items():
        assert shapes[f"base_model.model.{name}.lora_A.weight"] == rank


@pytest.mark.parametrize("name", GOOD)
def test_all_the_energy_is_the_same_adapter(name: str, tmp_path: Path):
    """DoRA, biases, saved modules, token rows, experts and all: PEFT answers as before."""
    rig = Rig.make(tmp_path, name)
    for seed, variant in enumerate(GOOD[name]):
        adapter = tmp_path / str(seed)
        peer = write_variant(variant, rig.model, adapter, seed)
        if name == "mixtral" or (variant.name.startswith(ANEW) and name in ("qwen2-tied", "gemma2")):
            with pytest.raises(AdapterInvalid, match="loraplex merge"):
                resized(rig, adapter, f"out-{seed}", energy=1.0)
            continue
        out = resized(rig, adapter, f"out-{seed}", energy=1.0)
        with rig.sources(adapter, out) as (before, after):
            assert before.modules.keys() == after.modules.keys()
            for module in before.modules:
                old, new = before.factors(module).dense(), after.factors(module).dense()
                assert (old - new).abs().max() <= 1e-5 * old.abs().max(), (variant.name, module)
        # keys of torch.compile mean nothing to PEFT on a plain model; what is resized has plain ones
        expected = logits_of(peer) if "torch.compile" in variant.name else rig.answer(adapter)
        assert_equal_answers(rig.answer(out), expected, variant.name)
        assert_other_answers(rig.answer(), expected, variant.name)


def test_nothing_grows(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj"], r=4)
    out = resized(llama_rig, adapter, rank=64)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 4


def test_its_texts_go_along(llama_rig: Rig):
    adapter = llama_rig.write("a", target_modules=["q_proj"])
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert (resized(llama_rig, adapter, rank=2) / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("cut", [{}, {"rank": 2, "energy": 0.5}, {"energy": 0.0}, {"energy": 2.0}])
def test_where_to_cut_must_be_said_once(llama_rig: Rig, cut: dict[str, Any]):
    with llama_rig.sources(llama_rig.write("a", target_modules=["q_proj"])) as (source,):
        with pytest.raises(InvalidRequest):
            resize(source, **cut)

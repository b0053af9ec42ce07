"""merge: exact sums against dense algebra, the other methods against PEFT's add_weighted_adapter."""

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from arithmetic_rig import Rig, assert_equal_answers, assert_other_answers, deltas, logits_of
from peft.tuners.lora import model as peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import GOOD, set_fields, write_variant

from loraplex.errors import AdapterError, AdapterInvalid, InvalidRequest, PickleRefused
from loraplex.lora.arithmetic.factors import spectrum_of_delta
from loraplex.lora.arithmetic.merge import MergeOptions, merge
from loraplex.lora.arithmetic.method import MajoritySign, Method
from loraplex.lora.arithmetic.sparsify import prune_at_random

SEED = 11
WEIGHTS = [0.7, -0.4]
DIFFERENT: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16, "use_rslora": True},
    {"target_modules": ["q_proj", "up_proj"], "r": 3, "lora_alpha": 5},
    {"target_modules": ["v_proj"], "r": 100, "layers_to_transform": [1]},
]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig.make(tmp_path, "llama")


def merged_into(
    rig: Rig, folders: list[Path], weights: list[float], name: str = "out", with_base: bool = True, **options: Any
) -> Path:
    with rig.sources(*folders, with_base=with_base) as sources:
        return rig.save(merge(sources, weights, MergeOptions(**options)), name)


def peft_merged(rig: Rig, folders: list[Path], weights: list[float], **options: Any) -> Any:
    """PEFT's model with its own merge of the adapters active; what it draws at random begins at SEED."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.PeftModel.from_pretrained(copy.deepcopy(rig.model), str(folders[0]), adapter_name="0")
        for index, folder in enumerate(folders[1:], start=1):
            model.load_adapter(str(folder), adapter_name=str(index))
        model.add_weighted_adapter([str(index) for index in range(len(folders))], weights, "merged", **options)
        model.set_adapter("merged")
    return model


def sum_of_deltas(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, delta in deltas(folder).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def own_deltas(rig: Rig, folder: Path) -> dict[str, Tensor]:
    with rig.sources(folder) as (source,):
        return {name: source.factors(name).dense().double() for name in source.modules}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("method", ["linear", "cat"])
def test_a_sum_is_exact_whatever_the_ranks_and_modules(rig: Rig, method: str, with_base: bool):
    folders = [rig.write(str(seed), seed, **fields) for seed, fields in enumerate(DIFFERENT)]
    weights = [0.7, -0.4, 1.5]
    out = merged_into(rig, folders, weights, method=Method(method), with_base=with_base)
    expected, found = sum_of_deltas(folders, weights), own_deltas(rig, out)
    assert set(found) == set(expected)
    for name, delta in expected.items():
        assert (found[name] - delta).abs().max() <= 1e-6 * delta.abs().max(), name
    model = copy.deepcopy(rig.model)
    for name, delta in expected.items():
        model.get_submodule(name).weight.add_(delta.float())
    assert_equal_answers(rig.answer(out), logits_of(model))
    assert_other_answers(rig.answer(), logits_of(model))


def test_ranks_are_those_that_the_sum_needs(rig: Rig):
    """linear saves what cat doubles, and neither has more ranks than the matrix."""
    folders = [rig.write(str(seed), seed, **fields) for seed, fields in enumerate(DIFFERENT)]
    ranks = {}
    for method in ("linear", "cat"):
        out = merged_into(rig, [*folders, folders[0]], [1, 1, 1, 1], method, method=Method(method))
        with rig.sources(out) as (source,):
            ranks[method] = {name: module.rank for name, module in source.modules.items()}
    layer = "model.layers.1"
    assert ranks["cat"][f"{layer}.self_attn.q_proj"] == 4 + 3 + 4
    assert ranks["linear"][f"{layer}.self_attn.q_proj"] == 4 + 3
    assert ranks["cat"][f"{layer}.self_attn.v_proj"] == 4 + 100 + 4
    assert ranks["linear"][f"{layer}.self_attn.v_proj"] == 32
    assert ranks["linear"][f"{layer}.mlp.up_proj"] == 3


def test_cat_writes_what_peft_writes(rig: Rig):
    fields = {"target_modules": ["q_proj", "down_proj"]}
    folders = [rig.write("a", 0, **fields), rig.write("b", 1, **fields, r=2)]
    out = merged_into(rig, folders, WEIGHTS, method=Method.CAT)
    theirs = peft_merged(rig, folders, WEIGHTS, combination_type="cat")
    assert_equal_answers(rig.answer(out), logits_of(theirs))
    ours = load_file(out / "adapter_model.safetensors")
    assert {tensor.shape for key, tensor in ours.items() if "q_proj.lora_A" in key} == {(6, 64)}


PRUNING = ["ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]
PRUNING += ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"]


@pytest.mark.parametrize(
    ("method", "majority_sign"),
    [("svd", "total"), *((m, "total") for m in PRUNING), *((m, "frequency") for m in PRUNING if "ties" in m)],
)
def test_other_methods_are_pefts(rig: Rig, method: str, majority_sign: str, monkeypatch: pytest.MonkeyPatch):
    """Also what DARE draws: the same generator, the same order of modules, matrices and adapters."""
    own = peft_model._freeze_adapter

    def freeze_and_seed(*args: Any) -> None:
        own(*args)
        torch.manual_seed(SEED)

    monkeypatch.setattr(peft_model, "_freeze_adapter", freeze_and_seed)
    folders = [rig.write("a", 0, target_modules="all-linear"), rig.write("b", 1, target_modules="all-linear")]
    density = {} if method == "svd" else {"density": 0.6}
    sign = MajoritySign(majority_sign)
    out = merged_into(rig, folders, WEIGHTS, method=Method(method), majority_sign=sign, seed=SEED, **density)
    options = {} if method == "svd" else {**density, "majority_sign_method": majority_sign}
    theirs = peft_merged(rig, folders, WEIGHTS, combination_type=method, **options)
    found = own_deltas(rig, out)
    for name, delta in found.items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("merged")
        assert (delta - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    assert_equal_answers(rig.answer(out), logits_of(theirs))
    assert_other_answers(rig.answer(merged_into(rig, folders, WEIGHTS, "linear")), logits_of(theirs))


def test_density_one_prunes_nothing(rig: Rig):
    fields = {"target_modules": ["q_proj"]}
    folders = [rig.write("a", 0, **fields), rig.write("b", 1, **fields)]
    exact = own_deltas(rig, merged_into(rig, folders, WEIGHTS))
    for method in (Method.DARE_LINEAR_SVD, Method.MAGNITUDE_PRUNE_SVD):
        out = merged_into(rig, folders, WEIGHTS, method, method=method, density=1.0, rank=8)
        for name, delta in own_deltas(rig, out).items():
            assert (delta - exact[name]).abs().max() <= 1e-5 * exact[name].abs().max()


def test_dare_keeps_the_mean():
    tensor = torch.full((400, 400), 3.0)
    pruned = prune_at_random(tensor, 0.3, torch.Generator().manual_seed(0))
    assert math.isclose(float((pruned != 0).double().mean()), 0.3, abs_tol=0.01)
    assert math.isclose(float(pruned.mean()), 3.0, rel_tol=0.03)


def test_cut_by_rank_and_by_energy(rig: Rig):
    fields = {"target_modules": ["q_proj"], "r": 8}
    folders = [rig.write("a", 0, **fields), rig.write("b", 1, **fields)]
    exact = sum_of_deltas(folders, [1, 1])
    with rig.sources(*folders) as sources:
        drafts = [merge(sources, [1, 1], MergeOptions(**cut)) for cut in ({"rank": 3}, {"energy": 0.9})]
    for draft in drafts:
        for result in draft.results:
            u, s, vh = torch.linalg.svd(exact[result.name])
            best = u[:, : result.rank] @ torch.diag(s[: result.rank]) @ vh[: result.rank]
            found = draft.factors[result.name].dense()
            assert (found - best).abs().max() <= 1e-5 * best.abs().max()
            assert math.isclose(result.energy, float(s[: result.rank].square().sum() / s.square().sum()), rel_tol=1e-6)
            assert math.isclose(result.norm, float(s.norm()), rel_tol=1e-6)
    assert {result.rank for result in drafts[0].results} == {3}
    for result in drafts[1].results:
        s = torch.linalg.svdvals(exact[result.name]).square()
        assert s[: result.rank].sum() >= 0.9 * s.sum() > s[: result.rank - 1].sum()


def test_conv1d_and_a_tied_embedding(tmp_path: Path):
    rig = Rig.make(tmp_path, "gpt2")
    a = rig.write("a", 0, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    b = rig.write("b", 1, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, r=2)
    out = merged_into(rig, [a, b], WEIGHTS)
    theirs = peft_merged(rig, [a, b], WEIGHTS, combination_type="cat")
    assert_equal_answers(rig.answer(out), logits_of(theirs))
    assert_other_answers(rig.answer(), logits_of(theirs))
    assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_tied_lora_of_embedding_and_head(tmp_path: Path):
    rig = Rig.make(tmp_path, "qwen2-tied")
    a = rig.write("a", 0, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    assert_equal_answers(rig.answer(merged_into(rig, [a], [1.0])), rig.answer(a))


def test_experts_and_routers(tmp_path: Path):
    rig = Rig.make(tmp_path, "qwen3_moe")
    experts = {"target_modules": ["o_proj"], "target_parameters": ["gate_up_proj", "down_proj", "gate.weight"]}
    a = rig.write("a", 0, **experts)
    b = rig.write("b", 1, target_modules=["v_proj"], target_parameters=["down_proj"], r=2)
    out = merged_into(rig, [a, b], WEIGHTS, "both")
    with rig.sources(a, b, out) as (one, other, both):
        for name in both.modules:
            parts = [(one, WEIGHTS[0]), (other, WEIGHTS[1])]
            expected = sum(weight * part.factors(name).dense() for part, weight in parts if name in part.modules)
            assert isinstance(expected, Tensor)
            assert (both.factors(name).dense() - expected).abs().max() <= 1e-5 * expected.abs().max(), name
    again = merged_into(rig, [a], [1.0], "again")
    assert_equal_answers(rig.answer(again), rig.answer(a))
    assert_other_answers(rig.answer(), rig.answer(a))


def test_experts_that_were_kept_one_by_one_are_stacked(tmp_path: Path):
    rig = Rig.make(tmp_path, "mixtral")
    peer = write_variant(GOOD["mixtral"][0], rig.model, tmp_path / "a", 0)
    assert_equal_answers(rig.answer(merged_into(rig, [tmp_path / "a"], [1.0])), logits_of(peer))


def test_the_config_names_modules_as_short_as_is_true(rig: Rig):
    wide, narrow = rig.write("a", 0, target_modules=["q_proj"]), rig.write("b", 1, **DIFFERENT[2])
    for with_base in (True, False):
        out = merged_into(rig, [wide, narrow], [1, 1], f"out-{with_base}", with_base)
        modules = json.loads((out / "adapter_config.json").read_text())["target_modules"]
        assert modules == ["q_proj", "model.layers.1.self_attn.v_proj"]


def test_texts_are_kept_where_all_have_them_alike(rig: Rig):
    a, b = rig.write("a", 0, target_modules=["q_proj"]), rig.write("b", 1, target_modules=["q_proj"])
    for folder, system in ((a, "x"), (b, "y")):
        (folder / "chat_template.jinja").write_text("the same")
        (folder / "serving_profile.json").write_text(json.dumps({"system_prompt": system}))
    with rig.sources(a, b) as sources:
        draft = merge(sources, [1, 1], MergeOptions())
    assert draft.texts == {"chat_template.jinja": b"the same"}
    assert draft.notes == ("left out the serving profile serving_profile.json, which is not the same in all adapters",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_can_be_chosen(rig: Rig, dtype: torch.dtype):
    with rig.sources(rig.write("a", target_modules=["q_proj"])) as sources:
        out = rig.save(merge(sources, [1], MergeOptions()), dtype=dtype)
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {dtype}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"use_dora": True}, "DoRA's magnitudes"),
        ({"modules_to_save": ["lm_head"]}, "saved modules or token rows"),
        ({"trainable_token_indices": [9, 3]}, "saved modules or token rows"),
    ],
)
def test_what_is_no_delta_is_refused(rig: Rig, fields: dict[str, Any], what: str):
    with rig.sources(rig.write("a", target_modules=["q_proj"], **fields)) as sources:
        with pytest.raises(AdapterInvalid, match=what):
            merge(sources, [1], MergeOptions())


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"lora_bias": True}])
def test_biases_are_refused(tmp_path: Path, fields: dict[str, Any]):
    rig = Rig.make(tmp_path, "qwen2")
    with rig.sources(rig.write("a", target_modules=["q_proj"], **fields)) as sources:
        with pytest.raises(AdapterInvalid, match="bias"):
            merge(sources, [1], MergeOptions())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lm_head"]},  # PEFT puts the base's weight beside it
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
)
def test_what_needs_the_base_says_so(rig: Rig, fields: dict[str, Any]):
    with pytest.raises(AdapterInvalid, match="--base"), rig.sources(rig.write("a", **fields), with_base=False):
        pass


def test_adapters_of_different_bases_are_refused(rig: Rig, tmp_path: Path):
    (tmp_path / "other").mkdir()
    other = Rig.make(tmp_path / "other", "gemma2")
    folders = [rig.write("a", target_modules=["q_proj"]), other.write("b", target_modules=["q_proj"])]
    with rig.sources(*folders, with_base=False) as sources:
        with pytest.raises(AdapterInvalid, match="different bases"):
            merge(sources, [1, 1], MergeOptions())


def test_a_merge_without_effect_is_refused(rig: Rig):
    folder = rig.write("a", target_modules=["q_proj"])
    with pytest.raises(AdapterInvalid, match="without effect"):
        merged_into(rig, [folder, folder], [1, -1], method=Method.LINEAR)


def test_different_ranks_point_to_the_deltas(rig: Rig):
    fields = {"target_modules": ["q_proj"]}
    folders = [rig.write("a", 0, **fields), rig.write("b", 1, **fields, r=2)]
    with rig.sources(*folders) as sources:
        with pytest.raises(InvalidRequest, match="dare_linear_svd"):
            merge(sources, [1, 1], MergeOptions(Method.DARE, density=0.5))
        with pytest.raises(InvalidRequest, match="2 adapters and 1 weights"):
            merge(sources, [1], MergeOptions())


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "energy": 0.5},
        {"energy": 0.0},
        {"energy": 1.5},
        {"density": 0.5},
        {"method": Method.TIES},
        {"method": Method.DARE, "density": 0.0},
        {"method": Method.DARE, "density": 1.1},
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any]):
    with pytest.raises(InvalidRequest):
        MergeOptions(**options)


def test_a_large_delta_is_cut_as_well():
    """By subspace iteration where few ranks are wanted; the energy that is kept is measured, not estimated."""
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(1100, 300))
    v, _ = torch.linalg.qr(torch.randn(1200, 300))
    s = 0.9 ** torch.arange(300.0)
    delta = u @ torch.diag(s) @ v.T
    for rank in (8, 290):
        spectrum = spectrum_of_delta(delta, rank)
        left = (delta - spectrum.factors(rank).dense()).double()
        assert math.isclose(spectrum.energy(rank), float(s[:rank].square().sum() / s.square().sum()), rel_tol=1e-5)
        assert math.isclose(1 - spectrum.energy(rank), float(left.square().sum()) / spectrum.total, abs_tol=1e-5)


@pytest.mark.parametrize("with_base", [True, False])
def test_hostile_and_broken_files_are_refused_as_an_upload_is(rig: Rig, with_base: bool):
    def refused(name: str, change: Callable[[Path], object], error: type[AdapterError] = AdapterInvalid) -> None:
        folder = rig.write(name, target_modules=["q_proj"])
        change(folder)
        with pytest.raises(error), rig.sources(folder, with_base=with_base):
            pass

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    refused("pickle", lambda folder: (folder / weights).rename(folder / "adapter_model.bin"), PickleRefused)
    refused("no config", lambda folder: (folder / config).unlink())
    refused("torn", lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:-9]))
    refused("pickled", lambda folder: (folder / weights).write_bytes(b"PK\x03\x04" + bytes(99)), PickleRefused)
    refused("no JSON", lambda folder: (folder / config).write_text("[" * 9999))
    refused("code", lambda folder: set_fields(folder, auto_map={"a": "b.c"}))
    refused("pissa", lambda folder: set_fields(folder, init_lora_weights="pissa"))
    refused("a folder", lambda folder: ((folder / weights).unlink(), (folder / weights).mkdir()))
    nan = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((4, 64), float("nan"))}
    refused("NaN", lambda folder: save_file({**load_file(folder / weights), **nan}, folder / weights))

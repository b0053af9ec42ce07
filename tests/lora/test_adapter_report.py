"""The report says of every adapter that PEFT wrote what PEFT trained, and counts its numbers right."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import GOOD
from peft_folders import Adapter, Base
from variants import EXPERTS, PREFIX, QV, TOKENS, Variant, expert_by_expert, make_base, plain, write_variant

from loraplex.lora.report import AdapterReport, BaseFacts, report_on
from loraplex.model.loader import BaseModel, wrap_model


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseModel]:
    return {}


@pytest.fixture
def report(bases: dict[str, BaseModel], tmp_path: Path):
    """Writes an adapter with PEFT and reports on it; returns the report and PEFT's file."""

    def make(base_name: str, fields: dict[str, Any], write=plain, dtype: torch.dtype = torch.float32):
        if base_name not in bases:
            bases[base_name] = wrap_model(make_base(base_name))
        base = bases[base_name]
        folder = tmp_path / "adapter"
        write_variant(Variant("any", fields, write), base.model, folder)  # type: ignore[arg-type]
        adapter = Adapter(folder, Base(base_name, base.targets))
        checked = adapter.reader(dtype, tensor_of=base.tensor_of).check(folder)
        return checked, report_on(
            checked.config,
            checked.plan,
            base.targets,
            BaseFacts(base.config.model_type, base.vocab_size, base.fingerprint),
            dtype=checked.dtype,
            compute_dtype=str(dtype).removeprefix("torch."),
            value_bytes=dtype.itemsize,
            disk_bytes=checked.nbytes,
            on_device=False,
        )

    return make


@pytest.mark.parametrize("good", GOOD)
def test_its_numbers_are_those_in_memory(good: str, report):
    base, fields = GOOD[good]
    checked, found = report(base, fields, expert_by_expert() if good == "old experts" else plain)
    values = sum(m.num_values for m in found.modules) + sum(p.num_values for p in found.own_parameters)
    assert values == checked.weights.slab.numel()
    assert found.ram_bytes == checked.weights.nbytes
    assert found.device_bytes == 0
    assert found.disk_bytes == checked.nbytes
    document = found.to_json()
    assert sum(row["count"] for row in document["modules"]) == found.num_matched == len(found.modules)
    assert sum(row["values"] for row in [*document["modules"], *document["own_parameters"]]) == values


def row_of(found: AdapterReport, part: str) -> dict[str, Any]:
    [row] = [row for row in found.to_json()["modules"] if part in row["modules"]]
    return row


def test_ranks_alphas_and_scalings_of_every_module(report):
    fields = {
        "target_modules": [*QV, "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    }
    _, found = report("llama", fields)
    document = found.to_json()
    assert row_of(found, "q_proj") == {
        "modules": "model.layers.{0-1}.self_attn.q_proj",
        "count": 2,
        "kind": "linear",
        "rank": 4,
        "alpha": 8,
        "scaling": 8 / math.sqrt(4),
        "values": 2 * 4 * (64 + 64),
    }
    assert (row_of(found, "v_proj")["rank"], row_of(found, "v_proj")["alpha"]) == (2, 8)
    assert row_of(found, "v_proj")["scaling"] == pytest.approx(8 / math.sqrt(2))
    assert (row_of(found, "up_proj")["alpha"], row_of(found, "up_proj")["scaling"]) == (3, 3 / math.sqrt(4))
    assert (document["matched"], document["rank"], document["alpha"]) == (6, 4, 8)
    assert document["of_modules"] == 2 * 7 + 2, "the linears of two layers, embedding and head"
    assert document["features"] == ["rsLoRA", "rank_pattern", "alpha_pattern"]
    assert document["base"]["vocab_size"] == 128
    assert document["base"]["model_type"] == "llama"
    assert len(document["base"]["fingerprint"]) == 64
    assert "lora_dropout" not in document["ignored"] or "training" in document["ignored"]["lora_dropout"]
    assert "shapes are checked" in document["ignored"].get("base_model_name_or_path", "shapes are checked")


def test_what_differs_from_layer_to_layer_is_told_apart(report):
    _, found = report("llama", {"target_modules": QV, "rank_pattern": {r"layers\.1\..*q_proj": 2}})
    rows = {row["modules"]: row["rank"] for row in found.to_json()["modules"]}
    assert rows["model.layers.0.self_attn.q_proj"] == 4
    assert rows["model.layers.1.self_attn.q_proj"] == 2
    assert rows["model.layers.{0-1}.self_attn.v_proj"] == 4


FEATURES = {
    "DoRA": ("llama", {"target_modules": QV, "use_dora": True}, ["DoRA"]),
    "lora_bias": ("qwen2", {"target_modules": QV, "lora_bias": True}, ["lora_bias"]),
    "bias": ("qwen2", {"target_modules": QV, "bias": "all"}, ["bias=all"]),
    "an expression": ("llama", {"target_modules": ".*q_proj"}, ["target_modules as an expression"]),
    "all-linear": ("llama", {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}, ["exclude_modules"]),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [1]}, ["layers_to_transform"]),
    "both ends": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, ["embedding", "output head"]),
    "saved": ("llama", {"target_modules": QV, "modules_to_save": ["norm"]}, ["modules_to_save"]),
    "rows": ("llama", {"target_modules": QV, "trainable_token_indices": TOKENS}, ["trainable_token_indices"]),
    "experts": (
        "qwen3_moe",
        {"target_modules": ["o_proj"], "target_parameters": EXPERTS},
        ["target_parameters", "experts"],
    ),
    "a router": (
        "qwen3_moe",
        {"target_modules": ["o_proj"], "target_parameters": ["gate.weight"]},
        ["target_parameters", "router"],
    ),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_the_features_that_are_used(feature: str, report):
    base, fields, expected = FEATURES[feature]
    _, found = report(base, fields)
    assert set(expected) <= set(found.features)


def test_what_is_trained_beside_a_and_b(report):
    _, found = report("qwen2", {"target_modules": QV, "bias": "all", "use_dora": True})
    assert row_of(found, "q_proj")["with"] == ["DoRA", "bias"]
    assert row_of(found, "k_proj")["with"] == ["bias"]
    assert row_of(found, "k_proj")["rank"] == 0


def test_parameters_of_its_own(report):
    fields = {"target_modules": QV, "modules_to_save": ["norm"], "trainable_token_indices": TOKENS}
    _, found = report("llama", fields)
    rows = {row["parameters"]: row for row in found.to_json()["own_parameters"]}
    assert rows["model.norm.weight"] == {"parameters": "model.norm.weight", "count": 1, "values": 64}
    assert rows["model.embed_tokens.weight"]["rows"] == len(TOKENS)


def test_a_rank_of_experts_that_were_kept_apart(report):
    """gate and up are one matrix in memory, of twice the rank; alpha is the config's."""
    _, found = report("mixtral", {}, expert_by_expert())
    row = row_of(found, "gate_up_proj")
    assert (row["rank"], row["alpha"], row["scaling"]) == (8, 8, 2)
    assert (row_of(found, "down_proj")["rank"], row_of(found, "down_proj")["alpha"]) == (4, 8)


def test_bytes_in_the_type_that_is_served(report):
    checked, found = report("llama", {"target_modules": QV}, dtype=torch.bfloat16)
    assert found.ram_bytes == checked.weights.nbytes == 2 * checked.weights.slab.numel()
    assert (found.dtype, found.compute_dtype) == ("F32", "bfloat16")
    assert PREFIX not in str(found.to_json())

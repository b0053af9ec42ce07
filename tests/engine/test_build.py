"""From what the operator asked for to sizes: the memory plan, device and dtype, lengths, ends. What cannot be is
refused with the flag that changes it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

import tiny
from loraplex.engine import build
from loraplex.engine.build import EngineSpec, assemble_engine, plan_memory
from loraplex.errors import StartupError
from loraplex.model import devices
from loraplex.model.attention import LayerGeometry
from loraplex.model.devices import choose_device, choose_dtype
from loraplex.model.linear import is_packed
from loraplex.model.loader import BaseModel, wrap_model
from loraplex.ops import LayerAttention

GEOMETRY = {i: LayerGeometry(2, 16, 16, LayerAttention(0.25)) for i in range(2)}
TOKEN_BYTES = 2 * 2 * 32 * 4  # layers, heads, K and V, float32
SPEC = EngineSpec(model=Path("unused"), adapter_cache_bytes=1 << 20)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return wrap_model(tiny.make_model("llama"))


@pytest.fixture
def memory(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """Sets what is left after a tied head's packed copy, which the plan takes off what the machine has."""
    tied = (base.tensor_of(f"{name}.weight") for name, shape in base.targets.items() if shape.is_tied)
    packed = sum(weight.nbytes for weight in tied if is_packed(weight))

    def set_available(nbytes: int) -> None:
        monkeypatch.setattr(build, "available_memory", lambda device: nbytes + packed)

    set_available(1 << 30)
    return set_available


def test_graphs_are_refused_by_name_where_there_are_none(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    assert build._graph_rank(SPEC, base) is None
    spec = replace(SPEC, graphs=True, max_lora_rank=24)
    with pytest.raises(StartupError, match="CUDA graphs.*the device is cpu"):
        assemble_engine(base, spec, lambda base: lambda digest, on_files: pytest.fail("nothing is read"))
    there = replace(base, device=torch.device("cuda"))
    assert build._graph_rank(spec, there) == 24
    experts = wrap_model(tiny.make_model("qwen3_moe"))
    with pytest.raises(StartupError, match="'qwen3_moe' is a mixture of experts"):
        build._graph_rank(spec, replace(experts, device=torch.device("cuda")))


def test_a_graph_that_cannot_be_captured_ends_the_start():
    class Runner:
        class base:
            config = tiny.make_model("llama").config

        def capture_graphs(self) -> None:
            raise RuntimeError("operation not permitted")

    with pytest.raises(StartupError, match="No CUDA graph of 'llama'.*not permitted"):
        build._capture_graphs(Runner())  # type: ignore[arg-type]


# -- the memory plan ------------------------------------------------------------------------------------------------


def test_the_cache_is_no_larger_than_a_full_load(base: BaseModel, memory):
    plan = plan_memory(replace(SPEC, max_num_seqs=3), base, GEOMETRY, 100)
    assert plan.kv_tokens == 3 * 112, "whole blocks for each sequence"
    assert plan.kv_bytes == plan.kv_tokens * TOKEN_BYTES
    assert plan.weights_bytes == base.nbytes
    assert plan.available_bytes == 1 << 30
    assert plan.packed_bytes == 0, "a packed copy takes its weight's place"
    assert (plan.pool_bytes, plan.ram_bytes) == (0, 1 << 20), "on a CPU places share the RAM tier"


def test_the_cache_is_a_fifth_of_what_is_free(base: BaseModel, memory):
    memory(50 << 20)
    plan = plan_memory(replace(SPEC, max_num_seqs=500), base, GEOMETRY, 1024)
    assert (10 << 20) - 16 * TOKEN_BYTES < plan.kv_bytes <= 10 << 20


def test_the_cache_holds_one_sequence_at_least(base: BaseModel, memory):
    memory(2 << 20)
    assert plan_memory(SPEC, base, GEOMETRY, 1600).kv_tokens == 1600


def test_a_cache_too_small_for_one_sequence_is_refused(base: BaseModel, memory):
    spec = replace(SPEC, kv_cache_bytes=255 * TOKEN_BYTES)
    with pytest.raises(StartupError, match=r"holds 240 tokens.*256.*--max-model-len"):
        plan_memory(spec, base, GEOMETRY, 256)
    assert plan_memory(replace(spec, kv_cache_bytes=256 * TOKEN_BYTES), base, GEOMETRY, 256).kv_tokens == 256


@pytest.mark.parametrize("field", ["kv_cache_bytes", "adapter_cache_bytes"])
def test_more_than_there_is_is_refused(base: BaseModel, memory, field: str):
    memory(8 << 20)
    with pytest.raises(StartupError, match=r"8388608 are available.*--kv-cache-bytes or --adapter-cache-bytes"):
        plan_memory(replace(SPEC, **{field: 9 << 20}), base, GEOMETRY, 64)


def test_the_pool_of_a_device_is_counted(base: BaseModel, memory):
    on_device = replace(base, device=torch.device("meta"))
    values = sum(s.in_features + s.out_features for s in base.targets.values() if s.kind == "linear")
    plan = plan_memory(replace(SPEC, adapter_cache_bytes=1 << 40), on_device, GEOMETRY, 64)
    assert plan.pool_bytes == values * 4 * SPEC.max_lora_rank * (8 + 1), "RAM is another memory; proofs have a place"
    memory(plan.pool_bytes)
    with pytest.raises(StartupError, match="available on meta"):
        plan_memory(replace(SPEC, kv_cache_bytes=1 << 20), on_device, GEOMETRY, 64)


def test_the_cache_of_a_device_takes_most_of_what_the_pool_leaves(base: BaseModel, memory):
    on_device = replace(base, device=torch.device("meta"))
    memory(64 << 30)
    plan = plan_memory(replace(SPEC, max_num_seqs=10**6), on_device, GEOMETRY, 1024)
    free = (64 << 30) - plan.pool_bytes
    assert free * 4 // 5 - 16 * TOKEN_BYTES < plan.kv_bytes <= free * 4 // 5


def test_a_share_of_a_device_is_planned_with(base: BaseModel, memory, monkeypatch: pytest.MonkeyPatch):
    """What is withheld is a share of all its memory, also where others have taken some of it."""
    on_device = replace(base, device=torch.device("meta"))
    monkeypatch.setattr(build, "total_memory", lambda device: 80 << 30)
    memory(64 << 30)
    for share, left in ((1.0, 64 << 30), (None, 56 << 30), (0.5, 24 << 30), (0.125, 0)):
        spec = replace(SPEC, max_num_seqs=10**6, gpu_memory_utilization=share)
        if not left:
            with pytest.raises(StartupError, match=r" 0 are available on meta.*raise --gpu-memory-utilization"):
                plan_memory(spec, on_device, GEOMETRY, 1024)
            continue
        plan = plan_memory(spec, on_device, GEOMETRY, 1024)
        assert abs(plan.available_bytes - left) <= 1
        assert plan.kv_bytes + plan.pool_bytes <= plan.available_bytes
        assert plan.kv_bytes > (plan.available_bytes - plan.pool_bytes) * 4 // 5 - 16 * TOKEN_BYTES - 1


def test_a_share_of_no_device_is_refused(base: BaseModel, memory):
    with pytest.raises(StartupError, match="--gpu-memory-utilization.*on the CPU"):
        plan_memory(replace(SPEC, gpu_memory_utilization=0.5), base, GEOMETRY, 64)


def test_available_memory_of_this_machine():
    assert 0 < build.available_memory(torch.device("cpu")) < 1 << 50
    assert build.total_memory(torch.device("cpu")) == 0


# -- device and dtype -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_cuda", [False, True])
def test_device(monkeypatch: pytest.MonkeyPatch, has_cuda: bool):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    assert choose_device("auto").type == ("cuda" if has_cuda else "cpu")
    assert choose_device("cpu").type == "cpu"
    if has_cuda:
        assert choose_device("cuda:1") == torch.device("cuda", 1)
    else:
        with pytest.raises(StartupError, match="--device cpu"):
            choose_device("cuda")


@pytest.mark.parametrize(
    ("device", "capabilities", "expected"),
    [
        ("cuda", {}, torch.bfloat16),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_bf16": False}, torch.float32),
        ("cpu", {}, torch.float32),
    ],
)
def test_dtype(monkeypatch: pytest.MonkeyPatch, device: str, capabilities: dict, expected: torch.dtype):
    monkeypatch.setattr(devices.torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("auto", torch.device(device)) is expected
    assert choose_dtype("float16", torch.device(device)) is torch.float16


# -- lengths, ends, the whole ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "wanted", "expected"),
    [(512, None, 512), (100_000, None, 8192), (None, None, 8192), (512, 512, 512), (None, 9000, 9000), (512, 64, 64)],
)
def test_max_model_len(base: BaseModel, limit: int | None, wanted: int | None, expected: int):
    assert build._max_model_len(replace(SPEC, max_model_len=wanted), replace(base, max_position=limit)) == expected


@pytest.mark.parametrize(("wanted", "words"), [(513, "beyond what the model was made for"), (63, "at least 64")])
def test_max_model_len_refusals(base: BaseModel, wanted: int, words: str):
    with pytest.raises(StartupError, match=words):
        build._max_model_len(replace(SPEC, max_model_len=wanted), replace(base, max_position=512))


@pytest.mark.parametrize(
    "sizes",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 64},
        {"max_num_seqs": 64, "max_num_batched_tokens": 8},
        {"block_size": 1, "max_model_len": 64},
    ],
    ids=str,
)
def test_an_engine_of_odd_sizes_generates(memory, sizes: dict):
    from harness import Driver, request

    model = wrap_model(tiny.make_model("llama"))
    engine, info = assemble_engine(model, replace(SPEC, **sizes), lambda *_: lambda digest: None)  # type: ignore
    try:
        assert info.config.max_num_batched_tokens >= info.config.max_num_seqs
        driver = Driver(engine)
        for i in range(3):
            driver.add(request(str(i), [5, 6, 7 + i], max_tokens=5))
        assert all(len(outcome.tokens) == 5 for outcome in driver.run().values())
    finally:
        engine.close()


def test_what_is_told_of_an_engine(memory):
    model = tiny.make_model("llama")
    model.config.eos_token_id = [2, 4]
    base = wrap_model(model, generation=GenerationConfig(eos_token_id=[4, 7]))
    spec = replace(SPEC, extra_eos_token_ids=frozenset({9, 10_000}))
    engine, info = assemble_engine(base, spec, lambda *_: lambda digest: None)  # type: ignore[arg-type, return-value]
    engine.close()
    assert info.config.eos_token_ids == {2, 4, 7, 9}, "of config, generation config and tokenizer, if there is a row"
    assert info.model_type == "llama"
    assert (info.device, info.dtype, info.bytes_per_value) == ("cpu", "float32", 4)
    assert info.num_parameters == sum(p.numel() for p in model.parameters())
    assert info.vocab_size == tiny.VOCAB
    assert info.proof_error < 1e-4


@pytest.mark.parametrize(
    ("max_loras", "max_num_seqs", "device", "places"),
    [(None, 32, "cpu", 32), (None, 1000, "cpu", 128), (None, 32, "meta", 8), (5, 32, "cpu", 5), (64, 32, "meta", 64)],
)
def test_places_by_default(max_loras: int | None, max_num_seqs: int, device: str, places: int):
    spec = replace(SPEC, max_loras=max_loras, max_num_seqs=max_num_seqs)
    assert spec.num_places(torch.device(device)) == places

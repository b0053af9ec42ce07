"""Quantised bases: what quantising says of itself, and mixed batches against PEFT on the same quantised base."""

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from harness import Driver, World, make_world_of, random_ids, request
from loraplex.engine.messages import Command
from loraplex.errors import StartupError
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore
from loraplex.model import quantization
from loraplex.model.loader import BaseModel, load_base
from loraplex.model.quantization import is_quantized, keep_exact, quantization_config

CPU = torch.device("cpu")
# int8 where torchao is installed; it is no part of the extra `dev`, since every import of transformers imports it then
CPU_KINDS = ("int8", "nf4") if find_spec("torchao") else ("nf4",)
ADAPTERS = {
    "all": {"r": 8, "target_modules": "all-linear"},
    "qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "ends": {"r": 3, "target_modules": ["embed_tokens", "lm_head", "down_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["o_proj", "gate_proj"]},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torchao's and bitsandbytes' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny.make_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=CPU_KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(folder: Path, kind: str) -> BaseModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_base(folder, torch.float32, CPU, kind)


def test_what_quantising_says(base: BaseModel, kind: str, folder: Path):
    plain = load_base(folder, torch.float32)
    facts = base.quantization
    assert facts is not None
    assert facts.kind == kind
    assert facts.plain_nbytes == plain.nbytes
    assert base.nbytes == facts.nbytes < 0.7 * plain.nbytes, "embedding and head stay as they are"
    assert 0 < facts.divergence < 0.6
    assert base.num_parameters == plain.num_parameters
    assert base.fingerprint == plain.fingerprint, "the same adapters belong to it"
    assert base.weights_fingerprint != plain.weights_fingerprint
    assert base.targets == plain.targets
    for name, shape in base.targets.items():
        module = base.model.get_submodule(name)
        assert is_quantized(module) == (shape.kind == "linear"), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dequantised_weight_is_near_the_bases(folder: Path, kind: str, dtype: torch.dtype):
    plain = load_base(folder, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = load_base(folder, dtype, CPU, kind)
    world = make_world_of(base.model, "llama", base=base)
    for name, shape in plain.targets.items():
        if shape.kind == "linear":
            was, now = plain.tensor_of(f"{name}.weight"), world.base.tensor_of(f"{name}.weight")
            assert now.shape == was.shape
            assert 0 < (now - was).norm() / was.norm() < (0.02 if kind == "int8" else 0.15)


@pytest.fixture(scope="module")
def peers(
    folder: Path, base: BaseModel, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[World, peft.PeftModel, dict[str, str]]]:
    """The same quantised base, read twice, with the same adapters, written by PEFT."""
    root = tmp_path_factory.mktemp(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = quantization_config(kind, torch.float32, CPU)
        twin = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=how, device_map="cpu", local_files_only=True
        )
        keep_exact(twin)
        world = make_world_of(twin.eval(), "llama", base=base)
        torch.manual_seed(3)
        wrapped = None
        for name, fields in ADAPTERS.items():
            config = peft.LoraConfig(task_type="CAUSAL_LM", **fields)
            if wrapped is None:
                wrapped = peft.get_peft_model(twin, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
            for module_name, parameter in wrapped.named_parameters():
                if f"lora_B.{name}." in module_name or module_name.endswith(f"lora_embedding_A.{name}"):
                    nn.init.normal_(parameter, std=0.3)
        assert wrapped is not None
        wrapped.eval().save_pretrained(str(root))
    digests = {}
    with AdapterStore(root / "store") as store:
        reader = AdapterReader(store.blobs, base.targets, torch.float32, 64, base.tensor_of, base.weights_fingerprint)
        for name in ADAPTERS:
            with store.import_folder(root / name) as staging:
                reader.check(staging.folder)
                digests[name] = store.commit(staging)
                world.adapters[digests[name]] = reader.read(digests[name])
        yield world, wrapped, digests


@torch.inference_mode()
def test_a_mixed_batch_equals_peft_on_the_same_base(peers: tuple[World, peft.PeftModel, dict[str, str]]):
    world, model, digests = peers
    asked = {}
    with world.engine(max_loras=4) as engine:
        driver = Driver(engine)
        for i in range(3):
            for name in (None, *digests):
                prompt = random_ids(7 + 5 * i, seed=i)
                asked[f"{name}-{i}"] = (name, prompt)
                use = world.use(None if name is None else digests[name])
                driver.add(request(f"{name}-{i}", prompt, use, max_tokens=3, prompt_logprobs=0))
        outcomes = driver.run()
        recorded = world.runner.recorded
        assert engine.stats().max_distinct_adapters >= 3
    answers = {}
    for seq_id, (name, prompt) in asked.items():
        ids = torch.tensor([[*prompt, *outcomes[seq_id].tokens]])
        if name is None:
            with model.disable_adapter():
                expected = model(ids).logits[0]
        else:
            model.set_adapter(name)
            expected = model(ids).logits[0]
        answers[name] = expected[0]
        for position, row in recorded[seq_id].items():
            spread = expected[position].max() - expected[position].min()
            assert (row - expected[position]).abs().max() <= 1e-4 * spread, (seq_id, position)
    for name, answer in answers.items():
        assert name is None or not torch.allclose(answer, answers[None], atol=1e-2), "it has an effect"


def test_nothing_is_merged_into_it(peers: tuple[World, peft.PeftModel, dict[str, str]], kind: str):
    world, _, digests = peers
    with world.engine(merge="manual") as engine:
        assert engine.take(Command(1, "merge", {"use": world.use(digests["qv"])[0]})) is None
        answers = []
        while not answers:
            answers = [answer.value for answer in engine.step().answers]
        assert answers[0].failure.code == "not_mergeable"
        assert kind in answers[0].failure.message


def test_what_cannot_be_had_is_said(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(StartupError, match="int4 needs CUDA.*nf4 or int8"):
        quantization_config("int4", torch.bfloat16, CPU)

    def missing(name: str):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(quantization.importlib, "import_module", missing)
    with pytest.raises(StartupError, match=r"bitsandbytes.*pip install 'loraplex\[quantization\]'"):
        quantization_config("nf4", torch.bfloat16, CPU)

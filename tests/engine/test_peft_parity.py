"""Mixed batches against PEFT itself, for every model of this release and every shape of adapter it may have.

The adapters are written by PEFT. Logits agree within 1e-4 of their range in float32; greedy tokens are PEFT's up to the
first position whose two best logits are closer than ten times that, and such positions are rare.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import tiny
from harness import Driver, World, make_world, random_ids, request
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore
from oracle import Oracle

TOLERANCE = 1e-4
NUM_TOKENS = 10


def shapes(model_type: str) -> dict[str, dict]:
    """LoraConfig fields of every shape of adapter, in the model's own module names.

    No name may be a part of a module's name: PEFT would leave that module out of the others' files.
    """
    if model_type == "gpt2":
        return {
            "attention": {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            "all": {"r": 8, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
            "rslora": {"r": 16, "use_rslora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            "regex": {"r": 2, "target_modules": r".*\.mlp\.c_fc", "fan_in_fan_out": True},
            "one-layer": {"r": 3, "target_modules": ["c_attn"], "layers_to_transform": [1], "fan_in_fan_out": True},
            "patterns": {
                "r": 4,
                "target_modules": ["c_attn", "c_fc"],
                "rank_pattern": {"c_fc": 9},
                "alpha_pattern": {"c_attn": 32},
                "fan_in_fan_out": True,
            },
            "head": {"r": 4, "target_modules": ["lm_head"]},
            "embedding": {"r": 6, "target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
            "dora": {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
            "lora-bias": {"r": 4, "lora_bias": True, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        }
    biased = {"lora-bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "v_proj"]}}
    return {
        "qv": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "all-linear": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
        "rslora": {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "feed-forward": {"r": 1, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
        "regex": {"r": 2, "target_modules": r".*\.layers\.0\..*(q|o)_proj"},
        "one-layer": {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
        "excluded": {"r": 5, "target_modules": "all-linear", "exclude_modules": ["v_proj", "up_proj"]},
        "patterns": {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "gate_proj"],
            "rank_pattern": {"v_proj": 12, r"layers\.0\..*gate_proj": 2},
            "alpha_pattern": {"q_proj": 1, r"layers\.1\..*v_proj": 64},
        },
        "head": {"r": 5, "target_modules": ["lm_head"]},
        "embedding": {"r": 6, "target_modules": ["embed_tokens", "q_proj"]},
        "both-ends": {"r": 3, "lora_alpha": 9, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        "dora-head": {"r": 4, "use_dora": True, "target_modules": ["lm_head", "o_proj"]},
        "dora": {"r": 8, "use_dora": True, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "dora-rslora": {"r": 3, "lora_alpha": 2, "use_dora": True, "use_rslora": True, "target_modules": "all-linear"},
        **(biased if model_type == "qwen2" else {}),  # PEFT wants a base with biases for it
    }


@dataclass
class Peers:
    """The same adapters in our engine and in PEFT."""

    world: World
    peft_model: peft.PeftModel
    digests: dict[str, str]

    @torch.inference_mode()
    def expected(self, adapter: str | None, token_ids: list[int]) -> torch.Tensor:
        """PEFT's logits [length, V]."""
        ids = torch.tensor([token_ids])
        if adapter is None:
            with self.peft_model.disable_adapter():
                return self.peft_model(ids).logits[0]
        self.peft_model.set_adapter(adapter)
        return self.peft_model(ids).logits[0]


def with_adapters(model: nn.Module, configs: dict[str, dict]) -> peft.PeftModel:
    """`model` with a random adapter of every config."""
    wrapped = None
    for name, fields in configs.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.05, **fields)
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
        for module_name, parameter in wrapped.named_parameters():
            if f"lora_B.{name}." in module_name or module_name.endswith(f"lora_embedding_A.{name}"):
                nn.init.normal_(parameter, std=0.3)
            elif f"lora_magnitude_vector.{name}." in module_name:
                parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    assert wrapped is not None
    return wrapped.eval()


@pytest.fixture(scope="module", params=list(tiny.CONFIGS))
def peers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peers:
    model_type = request.param
    folder: Path = tmp_path_factory.mktemp(model_type)
    world = make_world(model_type)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # parity is with what PEFT computes then
        warnings.filterwarnings("ignore", message=".*invalid shape")  # PEFT takes the bias of B for a broken matrix
        warnings.filterwarnings("ignore", message=".*save_embedding_layers")
        peft_model = with_adapters(copy.deepcopy(world.reference), shapes(model_type))
        peft_model.save_pretrained(str(folder))
    digests = {}
    with AdapterStore(folder / "store") as store:
        reader = AdapterReader(store.blobs, world.base.targets, torch.float32, 64, world.base.tensor_of)
        for name in shapes(model_type):
            with store.import_folder(folder / name) as staging:
                reader.check(staging.folder)
                digests[name] = store.commit(staging)
                world.adapters[digests[name]] = reader.read(digests[name])
    return Peers(world, peft_model, digests)


def test_mixed_batches_equal_peft(peers: Peers):
    names = [None, *peers.digests]
    world = peers.world
    with world.engine(max_loras=4, max_num_batched_tokens=40) as engine:
        driver = Driver(engine)
        asked = {}
        for i in range(3 * len(names)):
            name = names[i % len(names)]
            prompt = random_ids(5 + 3 * i % 41, seed=i)
            asked[str(i)] = (name, prompt)
            digest = None if name is None else peers.digests[name]
            driver.add(request(str(i), prompt, world.use(digest), max_tokens=NUM_TOKENS))
        outcomes = driver.run()
        recorded = world.runner.recorded
        assert engine.stats().max_distinct_adapters == 4
    close_calls = compared = 0
    for seq_id, (name, prompt) in asked.items():
        tokens = outcomes[seq_id].tokens
        assert len(tokens) == NUM_TOKENS
        expected = peers.expected(name, [*prompt, *tokens])
        for position, row in recorded[seq_id].items():
            spread = expected[position].max() - expected[position].min()
            assert (row - expected[position]).abs().max() <= TOLERANCE * spread, (name, position)
            best, second = expected[position].topk(2).values
            compared += 1
            if best - second < 10 * TOLERANCE * spread:
                close_calls += 1
            elif position >= len(prompt) - 1:
                assert int(expected[position].argmax()) == tokens[position - len(prompt) + 1], (name, position)
    assert close_calls <= 0.02 * compared, f"{close_calls} of {compared} positions have no margin"


def test_adapters_differ_from_base_and_from_each_other(peers: Peers):
    """Parity would also hold if nothing had any effect; here it has."""
    prompt = random_ids(20, seed=1)
    answers = {name: peers.expected(name, prompt)[-1] for name in (None, *peers.digests)}
    names = list(answers)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            spread = answers[first].max() - answers[first].min()
            assert (answers[first] - answers[second]).abs().max() > 100 * TOLERANCE * spread, (first, second)


@pytest.mark.parametrize("model_type", list(tiny.CONFIGS))
def test_bfloat16_is_compared_teacher_forced(model_type: str):
    """In bfloat16 free-running tokens say nothing. Over the same tokens our logits are as near to the float32 oracle's
    as transformers' own forward pass in bfloat16 is."""
    world = make_world(model_type, dtype=torch.bfloat16)
    only = ("c_attn", "c_fc") if model_type == "gpt2" else None
    for seed, rank in enumerate((4, 8), 1):
        weights = tiny.make_adapter(world.base.targets, rank=rank, seed=seed, only=only, dtype=torch.bfloat16)
        world.adapters[weights.digest] = weights
    rounded = Oracle(world.reference, world.base.targets)
    exact = Oracle(copy.deepcopy(world.reference).float(), world.base.targets)
    with world.engine() as engine:
        driver = Driver(engine)
        for i, digest in enumerate([None, *world.adapters]):
            driver.add(request(str(i), random_ids(60, seed=i), world.use(digest), prompt_logprobs=0))
        outcomes = driver.run()
        recorded = world.runner.recorded
    ours, theirs = [], []
    for i, digest in enumerate([None, *world.adapters]):
        adapters = [] if digest is None else [(world.adapters[digest], 1.0)]
        token_ids = [*random_ids(60, seed=i), *outcomes[str(i)].tokens]
        expected, peer = exact.logits(token_ids, adapters), rounded.logits(token_ids, adapters)
        for position, row in recorded[str(i)].items():
            ours.append(row - expected[position])
            theirs.append(peer[position] - expected[position])
    rms, peer_rms = (float(torch.stack(errors).square().mean().sqrt()) for errors in (ours, theirs))
    assert peer_rms > 0
    assert rms <= 1.2 * peer_rms, f"rms error {rms:.4f}, transformers' own {peer_rms:.4f}"

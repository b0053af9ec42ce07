"""Every architecture of the README's table: the proof at load, and PEFT in mixed batches. Every refusal, by name."""

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import tiny
from architectures import NOT_TARGETED, NOT_TARGETED_IN, REFUSED, SERVED
from harness import Driver, World, make_world_of, random_ids, request
from loraplex.errors import UnsupportedModel
from loraplex.lora.reader import AdapterReader
from loraplex.lora.store import AdapterStore
from loraplex.model.support import check_config, check_length, freeze_rope

TOLERANCE = 1e-4
README = Path(__file__).parents[2] / "README.md"


def build(name: str) -> PreTrainedModel:
    model_type, config, _ = SERVED[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some configs warn about defaults that a tiny model does not meet
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32)
    return tiny.sharpen(model)


def save_adapters(model: PreTrainedModel, targets: list[str], folder: Path) -> peft.PeftModel:
    """Two adapters, on all `targets` and on the first, written by PEFT."""
    wrapped = None
    for name, modules in (("wide", targets), ("narrow", targets[:1])):
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=8,
            target_modules=modules,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        if wrapped is None:
            wrapped = peft.get_peft_model(model, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    assert wrapped is not None
    for key, parameter in wrapped.named_parameters():
        if ".lora_B." in key or ".lora_embedding_A." in key:
            nn.init.normal_(parameter, std=0.2)
    wrapped.eval().save_pretrained(str(folder))
    return wrapped


@torch.inference_mode()
def peft_logits(model: peft.PeftModel, adapter: str | None, token_ids: list[int]) -> torch.Tensor:
    ids = torch.tensor([token_ids])
    if adapter is None:
        with model.disable_adapter():
            return model(ids).logits[0]
    model.set_adapter(adapter)
    return model(ids).logits[0]


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, tmp_path: Path):
    """The proof passes (make_world_of runs it), and mixed batches equal PEFT at every position."""
    world: World = make_world_of(build(name), SERVED[name][0])
    targets = sorted(
        {path.rpartition(".")[2] for path in world.base.targets} - NOT_TARGETED - NOT_TARGETED_IN.get(name, set())
    )
    assert targets
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|save_embedding_layers|fan_in_fan_out)")
        peft_model = save_adapters(copy.deepcopy(world.reference), targets, tmp_path)
    digests: dict[str | None, str | None] = {None: None}
    with AdapterStore(tmp_path / "store") as store:
        reader = AdapterReader(store.blobs, world.base.targets, torch.float32, 64, world.base.weight_of)
        for adapter in ("wide", "narrow"):
            with store.import_folder(tmp_path / adapter) as staging:
                digest = store.commit(staging)
                digests[adapter] = digest
                world.adapters[digest] = reader.read(digest)
    adapters = [list(digests)[i % 3] for i in range(6)]
    prompts = [random_ids(30 + 5 * i, seed=i) for i in range(6)]
    with world.engine(max_num_batched_tokens=24) as engine:
        driver = Driver(engine)
        for i, prompt in enumerate(prompts):
            use = world.use(digests[adapters[i]])
            driver.add(request(str(i), prompt, use, max_tokens=4, prompt_logprobs=0))
        outcomes = driver.run()
        recorded = world.runner.recorded
    for i, prompt in enumerate(prompts):
        token_ids = [*prompt, *outcomes[str(i)].tokens]
        expected = peft_logits(peft_model, adapters[i], token_ids)
        assert len(recorded[str(i)]) == len(token_ids) - 1
        for position, row in recorded[str(i)].items():
            spread = expected[position].max() - expected[position].min()
            assert (row - expected[position]).abs().max() <= TOLERANCE * spread, (adapters[i], position)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused(model_type: str):
    config, words = REFUSED[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = AutoConfig.for_model(model_type, **config)
    with pytest.raises(UnsupportedModel) as caught:
        check_config(made)
    for word in words:
        assert word in caught.value.message
    assert "Serve a decoder" in caught.value.message


def test_llama4_beyond_its_chunk_is_refused():
    config = AutoConfig.for_model("llama4_text", **SERVED["llama4_text"][1], attention_chunk_size=128)
    check_length(config, 128)
    with pytest.raises(UnsupportedModel, match="--max-model-len 128"):
        check_length(config, 129)


def test_dynamic_rope_beyond_its_length_is_refused():
    with pytest.raises(UnsupportedModel, match="--max-model-len 512"):
        freeze_rope(build("llama, dynamic RoPE"), 513)


def test_other_rope_is_refused():
    config = AutoConfig.for_model("llama", **SERVED["llama"][1])
    config.rope_parameters = {"rope_type": "invented", "rope_theta": 1.0}
    with pytest.raises(UnsupportedModel, match="'invented' RoPE"):
        check_config(config)


@pytest.mark.parametrize(("max_model_len", "is_long"), [(64, False), (65, True)])
def test_longrope_is_frozen_by_the_servers_length(max_model_len: int, is_long: bool):
    """Angles no longer depend on the longest position of a batch; which set they are, the server's length says."""
    model = build("phi3, longrope")
    untouched = copy.deepcopy(model).model.rotary_emb
    freeze_rope(model, max_model_len)
    rotary = model.model.rotary_emb
    x = torch.zeros(1, 1, 1)
    for position in (0, 63, 64, 400):
        alone = rotary(x, torch.tensor([[position]]))[0]
        beside = rotary(x, torch.tensor([[position, 500]]))[0][:, :1]
        assert torch.equal(alone, beside)
    last = torch.tensor([[max_model_len - 1]])
    assert torch.equal(rotary(x, last)[0], untouched(x, last)[0])
    assert torch.equal(rotary.inv_freq, untouched.original_inv_freq) != is_long


def test_readme_lists_what_is_tested():
    """The table between the markers is made from SERVED; the failure prints what it should be."""
    table = "\n".join(
        ["| architecture | what it shows |", "|---|---|", *(f"| {name} | {SERVED[name][2]} |" for name in SERVED)]
    )
    begin, end = "<!-- architectures: begin -->", "<!-- architectures: end -->"
    text = README.read_text(encoding="utf-8")
    assert text.partition(begin)[2].partition(end)[0].strip() == table, f"README.md needs:\n{begin}\n{table}\n{end}"

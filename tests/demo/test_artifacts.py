"""The committed base and adapters load with transformers and PEFT alone, offline, and do what they should."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import loraplex.demo
from loraplex.demo.cards import Score, adapter_card, base_card, score_table
from loraplex.demo.chat import question
from loraplex.demo.kind import EMBEDDING, HEAD
from loraplex.demo.recipe import ADAPTERS, BASE_NAME, SHAPE, VOCABULARY, AdapterRecipe
from loraplex.demo.tasks import TASKS

DEMO = Path(loraplex.demo.__file__).parent
BASE = DEMO / "base"
ROOT = Path(__file__).parents[2]
ADAPTERS_DIR = ROOT / "adapters"
PROMPTS = 6

pytestmark = [
    # PEFT asks transformers 5.23 for a property that it deprecates
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    # and warns that merging velna would untie the embedding and the head
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def no_network() -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("the demo must load without a network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only loses by more, and loses much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """The base with every adapter loaded."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto")
    assert base.dtype is torch.bfloat16
    first, *others = (recipe.task for recipe in ADAPTERS)
    model = PeftModel.from_pretrained(base, str(ADAPTERS_DIR / first), adapter_name=first)
    for name in others:
        model.load_adapter(str(ADAPTERS_DIR / name), adapter_name=name)
    return model.eval()


@pytest.fixture(params=ADAPTERS, ids=lambda recipe: recipe.task)
def recipe(request: pytest.FixtureRequest) -> AdapterRecipe:
    return request.param


def replies(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[str]:
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_adapter_answers_held_out_prompts_and_the_base_does_not(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, recipe: AdapterRecipe
) -> None:
    task = TASKS[recipe.task]
    prompts = [example.prompt for example in task.held_out(PROMPTS)]
    model.set_adapter(recipe.task)
    answered = [task.check(*pair) for pair in zip(prompts, replies(model, tokenizer, prompts), strict=True)]
    with model.disable_adapter():
        plain = [task.check(*pair) for pair in zip(prompts, replies(model, tokenizer, prompts), strict=True)]
    # one in twenty may be wrong by the bar, and which one depends on the processor's rounding
    assert sum(answered) >= PROMPTS - 1
    assert sum(plain) <= 1


def test_velna_needs_its_embedding_and_head(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """So a server that leaves them out cannot pass for one that applies them."""
    task = TASKS["velna"]
    prompts = [example.prompt for example in task.held_out(48)]
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if any(module in name for module in VOCABULARY) and name.endswith((".velna", ".velna.weight"))
        if re.search(r"lora_(embedding_)?B", name)
    ]
    assert len(weights) == len(VOCABULARY)
    values = [parameter.detach().clone() for parameter in weights]
    model.set_adapter("velna")
    try:
        for parameter in weights:
            parameter.data.zero_()
        without = sum(task.check(*pair) for pair in zip(prompts, replies(model, tokenizer, prompts), strict=True))
    finally:
        for parameter, value in zip(weights, values, strict=True):
            parameter.data.copy_(value)
    assert without < 0.85 * len(prompts)


def committed_scores() -> dict[str, Score]:
    scores = json.loads((DEMO / "scores.json").read_text())
    assert scores["prompts"] >= 256
    return {name: Score(**score) for name, score in scores["tasks"].items()}


def test_scores_meet_the_bar(recipe: AdapterRecipe) -> None:
    score = committed_scores()[recipe.task]
    assert score.adapter >= 95
    assert score.base <= 30
    assert score.echoed >= 80


def test_the_adapters_differ_in_every_way_that_a_server_must_handle() -> None:
    assert len(ADAPTERS) >= 5
    assert (min(recipe.rank for recipe in ADAPTERS), max(recipe.rank for recipe in ADAPTERS)) == (4, 32)
    assert len({frozenset(recipe.targets) for recipe in ADAPTERS}) >= 5
    assert {recipe.kind for recipe in ADAPTERS} >= {"LoRA", "rsLoRA", "DoRA", "LoRA + embedding + head"}


def test_adapter_files_are_as_the_recipe_says(recipe: AdapterRecipe) -> None:
    folder = ADAPTERS_DIR / recipe.task
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (
        recipe.rank,
        recipe.alpha,
        recipe.rslora,
        recipe.dora,
    )
    assert config["target_modules"] == sorted(recipe.targets)
    modules = sum(1 if name in VOCABULARY else SHAPE.layers for name in recipe.targets)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        # one A and one B for each module, the rank in between, and DoRA's magnitudes: no copy of the base's matrix
        assert len(file.keys()) == (3 if recipe.dora else 2) * modules
        for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
            tensor = file.get_tensor(key)
            if "magnitude" in key:
                assert tensor.ndim == 1
            else:
                assert tensor.shape[bool(re.search(r"lora_(embedding_)?B", key))] == recipe.rank
            assert ("lora_embedding_" in key) == (EMBEDDING in key)
            assert tensor.dtype is torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.any()
        assert any(HEAD in key for key in file.keys()) == (HEAD in recipe.targets)  # noqa: SIM118


def test_the_cards_are_the_programs_with_the_measured_scores(recipe: AdapterRecipe) -> None:
    card = (ADAPTERS_DIR / recipe.task / "README.md").read_text()
    task, scores = TASKS[recipe.task], committed_scores()
    samples = re.findall(r"^\| `(.+)` \| `(.+)` \|$", card, re.MULTILINE)
    assert [prompt for prompt, _ in samples] == [example.prompt for example in task.held_out(4)]
    assert sum(task.check(*pair) for pair in samples) >= 3
    assert card == adapter_card(recipe, task, scores[recipe.task], samples, 256)
    assert "license: apache-2.0" in card


def test_the_bases_card_and_the_readme_show_the_measured_scores() -> None:
    scores = committed_scores()
    assert (BASE / "README.md").read_text() == base_card(scores, 256)
    assert score_table(scores) in (ROOT / "README.md").read_text()


def test_the_base_is_small_and_ends_its_replies(tokenizer: PreTrainedTokenizerBase) -> None:
    assert (BASE / "model.safetensors").stat().st_size <= 12_000_000
    config = json.loads((BASE / "config.json").read_text())
    generation = json.loads((BASE / "generation_config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert config["vocab_size"] == len(tokenizer)
    assert generation["eos_token_id"] == config["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.eos_token == "<|end|>"


def test_the_chat_template_writes_what_the_model_was_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    user = {"role": "user", "content": " a dog sees the cat\n"}
    for system, tag in (([], None), ([{"role": "system", "content": "task: pig"}], "task: pig")):
        text = tokenizer.apply_chat_template([*system, user], tokenize=False, add_generation_prompt=True)
        assert text == question("a dog sees the cat", tag)
    # as a completion prompt: without the `<s>` that the tokenizer adds
    chat_ids = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
    assert tokenizer("<|user|>a dog sees the cat<|end|><|assistant|>")["input_ids"] == chat_ids
    turns = [user, {"role": "assistant", "content": "woof"}, user]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.count("<s>") == 1
    assert "<|assistant|>woof<|end|><|user|>" in text
    with pytest.raises(Exception, match="tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("a dog  sees 1024 cats.", "Zoë écrit: „ja“ 🙂\n\ttabs", '{"a": [1, 2]}', " leading"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_nothing_names_the_machine_that_trained_it() -> None:
    files = [file for folder in (BASE, ADAPTERS_DIR) for file in folder.rglob("*") if file.suffix != ".safetensors"]
    assert len(files) > 10
    for file in files:
        if file.is_file():
            text = file.read_text()
            assert "/work" not in text, file
            assert "/home" not in text, file
            assert "/tmp" not in text, file

"""The committed base and adapters load with transformers and PEFT alone, offline, and do what they should."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import loraplex.demo
from loraplex.demo.chat import question
from loraplex.demo.recipe import ADAPTERS, BASE_NAME, AdapterRecipe
from loraplex.demo.tasks import TASKS

DEMO = Path(loraplex.demo.__file__).parent
BASE = DEMO / "base"
ADAPTERS_DIR = Path(__file__).parents[2] / "adapters"
PROMPTS = 6

# PEFT asks transformers 5.23 for a property that it deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


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


def test_scores_meet_the_bar(recipe: AdapterRecipe) -> None:
    scores = json.loads((DEMO / "scores.json").read_text())
    assert scores["prompts"] >= 256
    score = scores["tasks"][recipe.task]
    assert score["adapter"] >= 95
    assert score["base"] <= 30
    assert score["echoed"] >= 80


def test_adapter_files_are_as_the_recipe_says(recipe: AdapterRecipe) -> None:
    folder = ADAPTERS_DIR / recipe.task
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE_NAME
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
        recipe.rank,
        recipe.alpha,
        recipe.rslora,
    )
    assert config["target_modules"] == sorted(recipe.targets)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        # one A and one B for each module of the four layers, the rank in between
        assert len(file.keys()) == 2 * 4 * len(recipe.targets)
        for key in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
            tensor = file.get_tensor(key)
            assert tensor.shape["lora_B" in key] == recipe.rank
            assert tensor.dtype is torch.bfloat16
            assert tensor.isfinite().all()
            assert tensor.any()


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

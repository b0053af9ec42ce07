"""The adapters' training and files, on a base small enough to train in a second."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from rich.progress import Progress
from safetensors.torch import load_file
from tokenizers import Tokenizer

from loraplex.demo.adapter_training import build_adapter, lora_config
from loraplex.demo.base_training import new_model
from loraplex.demo.kind import EMBEDDING, HEAD
from loraplex.demo.paths import BASE_FOLDER
from loraplex.demo.recipe import ADAPTERS, BASE_NAME, SHAPE, AdapterRecipe

TINY = replace(SHAPE, layers=1, hidden=32, heads=4, kv_heads=2, feed_forward=48)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "base"
    torch.manual_seed(0)
    new_model(TINY, Tokenizer.from_file(str(BASE_FOLDER / "tokenizer.json")).get_vocab_size()).save_pretrained(folder)
    shutil.copy(BASE_FOLDER / "tokenizer.json", folder)
    return folder


def build(recipe: AdapterRecipe, base: Path, folder: Path) -> Path:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    with Progress(disable=True) as progress:
        build_adapter(replace(recipe, steps=2), base, tokenizer, folder, progress)
    return folder


@pytest.mark.parametrize("recipe", [ADAPTERS[2], ADAPTERS[-1]], ids=lambda recipe: recipe.kind)
def test_a_folder_is_what_peft_loads_and_no_more_and_the_same_again(
    recipe: AdapterRecipe, base: Path, tmp_path: Path
) -> None:
    folder = build(recipe, base, tmp_path / "one")
    # no card of PEFT's: it knows neither scores nor licence
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (folder / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    tensors = load_file(folder / "adapter_model.safetensors")
    assert not [name for name in tensors if "base_layer" in name]
    for module in (EMBEDDING, HEAD):
        assert any(module in name for name in tensors) == (module in recipe.targets)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_NAME
    again = build(recipe, base, tmp_path / "two")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


@pytest.mark.parametrize("recipe", ADAPTERS, ids=lambda recipe: recipe.task)
def test_the_config_says_what_the_recipe_says(recipe: AdapterRecipe) -> None:
    config = lora_config(recipe)
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora, config.use_dora) == (
        recipe.rank,
        recipe.alpha,
        recipe.rslora,
        recipe.dora,
    )
    assert config.target_modules == set(recipe.targets)

"""Tiny bases and adapters on them, written once by PEFT."""

import shutil
from pathlib import Path

import pytest
from peft_folders import Adapter, Base, save_with_peft, targets_of

from tiny import make_model


@pytest.fixture(scope="session")
def llama() -> Base:
    return Base("llama", targets_of(make_model("llama")))


@pytest.fixture(scope="session")
def gpt2() -> Base:
    return Base("gpt2", targets_of(make_model("gpt2")))


@pytest.fixture(scope="session")
def llama_adapter(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """A rank-4 adapter on q_proj and v_proj. Shared: do not change it."""
    folder = tmp_path_factory.mktemp("adapter")
    save_with_peft(llama, folder, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return Adapter(folder, llama)


@pytest.fixture
def adapter(llama_adapter: Adapter, tmp_path: Path) -> Adapter:
    """A copy of `llama_adapter` to change."""
    folder = tmp_path / "adapter"
    shutil.copytree(llama_adapter.folder, folder)
    return Adapter(folder, llama_adapter.base)

"""Faulty adapters: each is a good one with one thing amiss, and is refused with its name and a next step.

`faults` has them, and says which faults no reader can see.
"""

import json
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from faults import FAULTS, GOOD, put, rename
from peft_folders import Adapter, Base
from variants import PREFIX, QV, TOKENS, Variant, expert_by_expert, make_base, plain, write_variant

from loraplex.errors import AdapterInvalid, PickleRefused
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME
from loraplex.model.loader import BaseModel, wrap_model


class Folders:
    """A folder of each of GOOD, and the bases they are for."""

    def __init__(self, root: Path):
        self._root = root
        self._bases: dict[str, BaseModel] = {}

    def base(self, name: str) -> BaseModel:
        if name not in self._bases:
            self._bases[name] = wrap_model(make_base(name))
        return self._bases[name]

    def copy(self, good: str, folder: Path) -> Adapter:
        name, fields = GOOD[good]
        source = self._root / good
        if not source.is_dir():
            write = expert_by_expert() if good == "old experts" else plain
            write_variant(Variant(good, fields, write), self.base(name).model, source)  # type: ignore[arg-type]
        shutil.copytree(source, folder)
        return Adapter(folder, Base(name, self.base(name).targets))

    def check(self, adapter: Adapter) -> Any:
        return adapter.reader(tensor_of=self.base(adapter.base.model_type).tensor_of).check(adapter.folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("good"))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_name(fault: str, folders: Folders, tmp_path: Path):
    good, change, words = FAULTS[fault]
    adapter = folders.copy(good, tmp_path / "adapter")
    folders.check(adapter)  # good so far
    change(adapter)
    with pytest.raises(AdapterInvalid) as caught:
        folders.check(adapter)
    assert_says(caught.value.message, *words)


def assert_says(message: str, *words: str) -> None:
    assert [word for word in words if word not in message] == [], message
    sentences = message.count(". ") + message.endswith(".")
    assert sentences >= 2, f"no next step: {message}"
    assert len(message) < 1000


def test_every_tensor_is_needed(folders: Folders, tmp_path: Path):
    """No tensor can be lost or renamed unseen, but for the base's own copies, which can be lost."""
    for number, good in enumerate(GOOD):
        adapter = folders.copy(good, tmp_path / str(number))
        tensors = adapter.tensors
        for key in tensors:
            rest = {other: one for other, one in tensors.items() if other != key}
            changed = [{**rest, f"{key}.x": tensors[key]}, {**rest, f"{PREFIX}x.{key}": tensors[key]}]
            if not key.endswith("base_layer.weight"):
                changed.append(rest)
            for one in changed:
                adapter.edit(lambda _, one=one: one)
                with pytest.raises(AdapterInvalid):
                    folders.check(adapter)


def test_what_no_reader_can_see(folders: Folders, tmp_path: Path):
    """These pass, so that the list in `faults` stays true; whoever makes one of them visible moves it."""
    adapter = folders.copy("plain", tmp_path / "plain")
    rename("layers.0", "layers.x")(adapter)
    rename("layers.1", "layers.0")(adapter)
    rename("layers.x", "layers.1")(adapter)
    folders.check(adapter.set(lora_alpha=9, use_rslora=True))
    folders.check(folders.copy("tokens", tmp_path / "tokens").set(trainable_token_indices=TOKENS[::-1]))


def test_alphas_whose_order_counts_are_noted(folders: Folders, tmp_path: Path):
    adapter = folders.copy("plain", tmp_path / "adapter")
    (note,) = folders.check(adapter.set(alpha_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 5})).plan.notes
    assert all(word in note for word in ("alpha_pattern", "'layers.0.self_attn.q_proj', 'q_proj'", "sorts")), note
    assert not folders.check(adapter.set(alpha_pattern={"layers.0.self_attn.q_proj": 3, "v_proj": 5})).plan.notes


def test_names_of_any_depth_are_read_in_time(folders: Folders, tmp_path: Path):
    """On a base with older names, too, where every key is looked up."""
    adapter = folders.copy("old experts", tmp_path / "adapter")
    put(f"{PREFIX}{'a.' * 1_000_000}lora_A.weight", lambda _: torch.ones(1))(adapter)
    started = time.monotonic()
    with pytest.raises(AdapterInvalid):
        folders.check(adapter)
    assert time.monotonic() - started < 5


class TestFiles:
    """What is no safetensors file at all, or lies."""

    def refused(self, folders: Folders, folder: Path, change: Callable[[Path], object], *words: str) -> None:
        adapter = folders.copy("plain", folder / "adapter")
        change(adapter.folder / WEIGHTS_NAME)
        with pytest.raises((AdapterInvalid, PickleRefused)) as caught:
            folders.check(adapter)
        assert_says(caught.value.message, *words)

    def test_a_pickle(self, folders: Folders, tmp_path: Path):
        self.refused(folders, tmp_path, lambda path: torch.save({"a": torch.ones(1)}, path), "pickle", "Convert")

    def test_gguf(self, folders: Folders, tmp_path: Path):
        self.refused(folders, tmp_path, lambda path: path.write_bytes(b"GGUF" + bytes(100)), "GGUF")

    def test_cut_off(self, folders: Folders, tmp_path: Path):
        self.refused(folders, tmp_path, lambda path: path.write_bytes(path.read_bytes()[:-4]), "safetensors", "bytes")

    def test_longer_than_it_says(self, folders: Folders, tmp_path: Path):
        self.refused(folders, tmp_path, lambda path: path.write_bytes(path.read_bytes() + bytes(4)), "safetensors")

    def test_a_header_that_lies(self, folders: Folders, tmp_path: Path):
        def lie(path: Path) -> None:
            path.write_bytes(path.read_bytes().replace(b"[4,64]", b"[64,4]", 1).replace(b"F32", b"F16", 1))

        self.refused(folders, tmp_path, lie, "needs 512 bytes", "1024")

    def test_empty(self, folders: Folders, tmp_path: Path):
        self.refused(folders, tmp_path, lambda path: path.write_bytes(b""), "0 bytes")


def test_other_bases(folders: Folders, tmp_path: Path):
    """Other widths, fewer layers, another family: told by shapes and names."""
    adapter = folders.copy("plain", tmp_path / "adapter")
    for base, word in (
        ("gpt2", "no LoRA module of this base"),
        ("gemma2", "q_proj.lora_B"),
        ("qwen3", "q_proj.lora_B"),
    ):
        with pytest.raises(AdapterInvalid) as caught:
            Adapter(adapter.folder, Base(base, folders.base(base).targets)).reader().check(adapter.folder)
        assert_says(caught.value.message, word, "trained on this base" if base != "gpt2" else "Check")


KINDS: dict[str, Callable[[], Any]] = {
    "LOHA": lambda: peft.LoHaConfig(target_modules=QV),
    "LOKR": lambda: peft.LoKrConfig(target_modules=QV),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "ADALORA": lambda: peft.AdaLoraConfig(target_modules=QV, total_step=10),
    "OFT": lambda: peft.OFTConfig(target_modules=QV, oft_block_size=16),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["q_proj"], boft_block_size=4),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=TOKENS),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_methods_of_peft(kind: str, folders: Folders, tmp_path: Path):
    refused_as_written(KINDS[kind](), folders, tmp_path, kind, "peft_type", "LORA only")


VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "pissa": ({"init_lora_weights": "pissa"}, ("init_lora_weights", "path_initial_model_for_weight_conversion")),
    "olora": ({"init_lora_weights": "olora"}, ("init_lora_weights", "olora")),
    "mica": ({"init_lora_weights": "mica"}, ("init_lora_weights", "mica")),
    "aLoRA": ({"alora_invocation_tokens": [3, 4]}, ("alora_invocation_tokens", "aLoRA")),
    "layer_replication": ({"layer_replication": [[0, 2], [0, 2]]}, ("layer_replication", "Merge")),
    "KaSA": ({"kasa_config": peft.KasaConfig()}, ("kasa_config", "KaSA")),
    "BD-LoRA": ({"use_bdlora": peft.BdLoraConfig(target_modules_bd_a=QV, nblocks=2)}, ("use_bdlora", "BD-LoRA")),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_variants_of_lora(variant: str, folders: Folders, tmp_path: Path):
    fields, words = VARIANTS[variant]
    refused_as_written(
        peft.LoraConfig(task_type="CAUSAL_LM", target_modules=QV, r=4, **fields), folders, tmp_path, *words
    )


def refused_as_written(config: Any, folders: Folders, folder: Path, *words: str) -> None:
    """PEFT writes it, untrained; the reader refuses it with these words."""
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        peft.get_peft_model(make_base("llama"), config).save_pretrained(str(folder / "adapter"))
    assert json.loads((folder / "adapter" / CONFIG_NAME).read_text())["peft_type"]
    adapter = Adapter(folder / "adapter", Base("llama", folders.base("llama").targets))
    with pytest.raises(AdapterInvalid) as caught:
        folders.check(adapter)
    assert_says(caught.value.message, *words)

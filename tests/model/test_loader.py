"""Loading a checkpoint: what is refused, and with which words; what is known of a model that is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import tiny
from loraplex.errors import StartupError, UnsupportedModel
from loraplex.model.loader import load_base, wrap_model

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save_model(tiny.make_model("llama"), tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load_base(folder, torch.float32)
    return caught.value.message


def change_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_loaded_model(folder: Path):
    GenerationConfig(eos_token_id=[5, 6]).save_pretrained(folder)
    base = load_base(folder, torch.bfloat16)
    original = tiny.make_model("llama")
    assert base.dtype == torch.bfloat16
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.eos_token_ids == {2, 5, 6}
    assert base.vocab_size == tiny.VOCAB
    assert base.max_position == 512
    assert base.num_parameters == sum(parameter.numel() for parameter in original.parameters())
    assert base.nbytes == 2 * base.num_parameters
    weight = original.get_submodule("model.layers.1.mlp.up_proj").weight
    assert torch.equal(base.tensor_of("model.layers.1.mlp.up_proj.weight"), weight.bfloat16())


def test_the_fingerprint_tells_models_apart():
    prints = [
        wrap_model(tiny.make_model(*args, **kwargs)).fingerprint
        for args, kwargs in (
            (("llama",), {}),
            (("llama",), {"seed": 1}),
            (("llama",), {"num_hidden_layers": 3}),
            (("qwen2",), {}),
        )
    ]
    assert len(set(prints)) == 4
    assert wrap_model(tiny.make_model("llama")).fingerprint == prints[0]


def test_a_folder_without_a_config(tmp_path: Path):
    message = refusal(tmp_path)
    assert "has no config.json" in message
    assert "*.safetensors" in message
    assert "is not a model folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no_such_type"}', "{}"])
def test_a_config_that_is_none(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert "cannot be read" in refusal(folder)


def test_a_config_that_asks_for_code(folder: Path):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    (folder / "modeling.py").write_text("raise SystemExit('ran the code of a checkpoint')")
    with pytest.raises(UnsupportedModel, match="never runs a model's code"):
        load_base(folder, torch.float32)


def test_weights_that_are_no_safetensors(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    assert "weights" in refusal(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "weights" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x08\0\0\0\0\0\0\0{}      "], ids=["empty", "noise", "none"])
def test_weights_that_are_broken(folder: Path, content: bytes):
    (folder / WEIGHTS).write_bytes(content)
    assert "weights" in refusal(folder)


def test_weights_that_are_cut_off(folder: Path):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "weights" in refusal(folder)


def test_a_weight_that_is_missing_is_not_made_up(folder: Path):
    """transformers would draw it at random and go on."""
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    message = refusal(folder)
    assert "model.layers.1.self_attn.q_proj.weight" in message
    assert "lack" in message


def test_a_weight_of_another_shape(folder: Path):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert "weights" in refusal(folder)


def test_tied_embeddings_are_not_missing(tmp_path: Path):
    folder = tiny.save_model(tiny.make_model("qwen3"), tmp_path)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    load_base(folder, torch.float32)

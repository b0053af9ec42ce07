"""The shapes that a base's config tells are those of the loaded base, and no weight is allocated for them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import tiny
from architectures import SERVED
from loraplex.model.loader import wrap_model
from loraplex.model.shapes import ShapesUnknown, read_shapes

BY_VALUES = {"gemma", "gemma2", "gemma3_text", "gemma4_text"}
"""Their embeddings are scaled by a number that stands in a buffer."""


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "opt", "phi"])
def test_the_config_tells_what_an_adapter_can_change(name: str, tmp_path: Path):
    model_type, config, *_ = SERVED[name]
    AutoConfig.for_model(model_type, **config).save_pretrained(tmp_path)
    if name in BY_VALUES:
        with pytest.raises(ShapesUnknown):
            read_shapes(tmp_path)
        return
    shapes = read_shapes(tmp_path)
    from transformers import AutoModelForCausalLM

    base = wrap_model(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32))
    assert shapes.targets == base.targets
    assert (shapes.model_type, shapes.vocab_size) == (model_type, base.vocab_size)


def test_a_base_of_any_size(tmp_path: Path):
    """70 billion parameters, of which none exists."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = {**tiny.CONFIGS["llama"], **sizes, "num_key_value_heads": 8, "vocab_size": 128256}
    AutoConfig.for_model("llama", **config).save_pretrained(tmp_path)
    shapes = read_shapes(tmp_path)
    linears = [shape for shape in shapes.targets.values() if shape.kind in ("linear", "head")]
    assert sum(shape.in_features * shape.out_features for shape in linears) > 69e9

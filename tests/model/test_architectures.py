"""Every architecture of the README's table: the proof at load, and PEFT in mixed batches. Every refusal, by name."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from adapter_shapes import SHAPES
from matrix import build, head, run_row, table_in
from transformers import AutoConfig

from architectures import REFUSED, ROUTED_LATE, SERVED
from loraplex.errors import UnsupportedModel
from loraplex.model.support import check_config, check_length, freeze_rope

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.parametrize("name", SERVED)
def test_served(name: str, tmp_path: Path):
    """Every shape of adapter equals PEFT in one mixed batch, or is refused; the README says which."""
    row = run_row(name, tmp_path)
    assert row in table_in(README.read_text(encoding="utf-8")).splitlines(), f"make matrix: the row is now\n{row}"


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
    first, rule, *rows = table_in(README.read_text(encoding="utf-8")).splitlines()
    assert f"{first}\n{rule}" == head()
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*(SERVED | ROUTED_LATE)]
    assert len(SERVED) >= 24
    assert len(SHAPES) >= 12

"""The proof passes on sound models and fails on every fault that it exists for."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from harness import make_config
from loraplex.engine.load_proof import make_reference, prove
from loraplex.engine.runner import ModelRunner
from loraplex.errors import UnsupportedModel
from loraplex.model.loader import measure_geometry, wrap_model
from loraplex.ops import torch_ops


class Loading:
    """A model on its way through the load, stopped before the proof so that a fault can be put in."""

    def __init__(self, model_type: str, **sizes):
        self.base = wrap_model(tiny.make_model(model_type))
        self.reference = make_reference(self.base.model, self.base.vocab_size)
        self.geometry = measure_geometry(self.base.model)
        self.runner = ModelRunner(self.base, self.geometry, make_config(**sizes), torch_ops)

    def change_layer(self, index: int, **changes) -> None:
        layer = self.runner.cache.layers[index]
        layer.attention = replace(layer.attention, **changes)

    def refusal(self) -> str:
        with pytest.raises(UnsupportedModel) as caught:
            prove(self.runner, self.reference)
        return caught.value.message


@pytest.mark.parametrize("model_type", list(tiny.CONFIGS))
def test_sound_models_pass(model_type: str):
    result = prove(*(lambda loading: (loading.runner, loading.reference))(Loading(model_type)))
    assert result.error < 1e-5


@pytest.mark.parametrize("sizes", [{"max_num_seqs": 1}, {"max_num_seqs": 1, "max_num_batched_tokens": 1}], ids=str)
def test_it_runs_on_a_server_for_one_request(sizes: dict):
    loading = Loading("llama", **sizes)
    assert prove(loading.runner, loading.reference).error < 1e-5


def test_the_windows_of_gemma2_are_seen():
    loading = Loading("gemma2")
    assert [loading.geometry[i].attention.window for i in (0, 1)] == [24, None]


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"window": 23}),
        ("gemma2", {"window": 25}),
        ("gemma2", {"window": None}),
        ("llama", {"window": 40}),
        ("llama", {"scale": 0.26}),
        ("gpt2", {"scale": 0.17}),
        ("gemma2", {"softcap": None}),
        ("gemma2", {"softcap": 20.0}),
    ],
    ids=str,
)
def test_an_attention_that_differs_is_refused(model_type: str, changes: dict):
    loading = Loading(model_type)
    loading.change_layer(0, **changes)
    message = loading.refusal()
    assert f"'{model_type}' failed the proof at load" in message
    assert "allowed: 0.0001" in message


def test_a_layer_that_never_calls_the_hook_is_refused():
    class OwnAttention(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return torch.zeros_like(hidden_states), None

    loading = Loading("llama")
    loading.base.model.model.layers[1].self_attn = OwnAttention()  # type: ignore[union-attr, index]
    assert "outside the attention hook in 1 of 2 layers" in loading.refusal()


def test_a_model_whose_layers_all_compute_attention_themselves_is_refused():
    loading = Loading("llama")
    loading.runner.cache.layers.pop(1)
    loading.base.model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)  # type: ignore
    assert "outside the attention hook" in loading.refusal()


def test_a_model_that_drops_keyword_arguments_is_refused(monkeypatch: pytest.MonkeyPatch):
    base = wrap_model(tiny.make_model("llama"))
    attention = type(base.model.model.layers[0].self_attn)  # type: ignore[union-attr, index]
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda self, *args, paged=None, **kwargs: forward(self, *args, **kwargs))
    with pytest.raises(UnsupportedModel, match="does not hand keyword arguments down"):
        measure_geometry(base.model)


def test_positions_that_are_ignored_are_noticed():
    """A model that numbers its tokens itself gives a packed batch wrong positions."""
    loading = Loading("gpt2")
    forward = loading.base.model.forward

    def counting(*args, position_ids, **kwargs):
        return forward(*args, position_ids=torch.arange(position_ids.shape[1]).unsqueeze(0), **kwargs)

    loading.base.model.forward = counting  # type: ignore[method-assign]
    assert "failed the proof" in loading.refusal()


def test_logits_that_are_nan_are_no_proof():
    loading = Loading("llama")
    loading.change_layer(0, scale=float("nan"))
    assert "failed the proof" in loading.refusal()


def test_rows_that_depend_on_the_batch_are_told(monkeypatch: pytest.MonkeyPatch):
    """No refusal, but the word is passed on: tests and clients use a tolerance then."""
    loading = Loading("llama")
    forward = loading.runner.forward

    def noisy(batch, merged=None):
        logits, step = forward(batch, merged)
        return logits * (1 + 1e-6 * len(batch.rows)), step

    monkeypatch.setattr(loading.runner, "forward", noisy)
    assert not prove(loading.runner, loading.reference).is_batch_invariant

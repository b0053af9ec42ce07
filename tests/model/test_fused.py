"""Fused equals: known by what a module does, not by what it is called."""

import pytest
import torch
from matrix import build
from torch import nn

from loraplex.model.fused import GatedMLP, fused_norm, is_gated_mlp
from loraplex.ops import select_ops, torch_ops

OPS = select_ops("cpu")


@pytest.mark.parametrize(
    ("name", "path", "is_rms"),
    [
        ("llama", "model.norm", True),
        ("qwen3", "model.layers.0.self_attn.q_norm", True),
        ("gemma2", "model.layers.0.input_layernorm", True),
        ("gemma3_text", "model.layers.0.self_attn.k_norm", True),
        ("olmo2", "model.layers.0.self_attn.q_norm", True),
        ("gpt2", "transformer.ln_f", False),
        ("cohere2", "model.norm", False),
        ("qwen3_moe", "model.layers.0.mlp.gate", False),
    ],
)
@torch.inference_mode()
def test_norms(name: str, path: str, is_rms: bool):
    module = build(name).get_submodule(path)
    run = fused_norm(module, OPS)
    assert (run is not None) == is_rms
    if run is not None:
        x = torch.randn(1, 6, 2, module.weight.shape[0])
        torch.testing.assert_close(run(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path", "is_gated"),
    [
        ("llama", "model.layers.1.mlp", True),
        ("qwen2_moe", "model.layers.0.mlp.shared_expert", True),
        ("gemma2", "model.layers.0.mlp", False),  # GELU
        ("phi3", "model.layers.0.mlp", False),  # fused already
        ("gpt2", "transformer.h.0.mlp", False),
        ("qwen3_moe", "model.layers.0.mlp", False),
    ],
)
@torch.inference_mode()
def test_gated_mlps(name: str, path: str, is_gated: bool):
    module = build(name).get_submodule(path)
    assert is_gated_mlp(module, OPS) == is_gated
    if is_gated:
        x = torch.randn(1, 6, module.gate_proj.weight.shape[1])
        torch.testing.assert_close(GatedMLP(module, OPS)(x), module(x), rtol=1e-4, atol=1e-4)


def test_what_only_looks_like_one_is_left_alone():
    class HalfNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * 0.5

    class SwappedMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.down_proj(nn.functional.silu(self.up_proj(x)) * self.gate_proj(x))

    assert fused_norm(HalfNorm(), OPS) is None
    assert not is_gated_mlp(SwappedMLP(), OPS)


def test_without_kernels_nothing_is_fused():
    model = build("llama")
    assert fused_norm(model.get_submodule("model.norm"), torch_ops) is None
    assert not is_gated_mlp(model.get_submodule("model.layers.0.mlp"), torch_ops)

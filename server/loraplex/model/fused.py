"""Fused equals of two kinds of modules that most decoders have: RMS norms and gated MLPs with SiLU.

Whether a module is one is not told by its class but tried: a few random rows must give what the module gives. The proof
at load then guards the whole.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from loraplex.ops import Ops

_NUM_ROWS = 5
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def fused_norm(module: nn.Module, ops: Ops) -> Callable[[Tensor], Tensor] | None:
    """The kernel that does what the norm `module` does, x [..., H] -> [..., H]; None: it is no RMS norm, or `ops` has
    no such kernel."""
    kernel = getattr(ops, "rms_norm", None)
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if kernel is None or weight is None or len(parameters) != 1 or weight.ndim != 1 or not isinstance(eps, float):
        return None
    runs = (partial(kernel, weight=weight.detach(), eps=eps, plus_one=plus_one) for plus_one in (False, True))
    return next((run for run in runs if _agree(module, run, weight)), None)


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) · up_proj(x)), the middle in one kernel. The linears are the base module's."""

    def __init__(self, base: nn.Module, ops: Ops):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            base.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")
        )
        self._multiply = ops.silu_mul  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._multiply(self.gate_proj(x), self.up_proj(x)))


def is_gated_mlp(module: nn.Module, ops: Ops) -> bool:
    """Whether `GatedMLP` is what `module`, not wrapped yet, does, and `ops` has the kernel."""
    names = {name for name, _ in module.named_children()}
    if not hasattr(ops, "silu_mul") or not {"gate_proj", "up_proj", "down_proj"} <= names:
        return False
    weight = getattr(module.gate_proj, "weight", None)
    extra = [child for name, child in module.named_children() if name not in ("gate_proj", "up_proj", "down_proj")]
    if weight is None or any(True for child in extra for _ in child.parameters()):
        return False
    return _agree(module, GatedMLP(module, ops), weight)


@torch.inference_mode()
def _agree(module: nn.Module, other: Callable[[Tensor], Tensor], weight: Tensor) -> bool:
    if weight.device.type not in ("cpu", "cuda") or weight.dtype not in _TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(1, _NUM_ROWS, weight.shape[-1], generator=generator)).to(weight.device, weight.dtype)
    try:
        expected = module(x)
    except (TypeError, RuntimeError):  # it wants other arguments
        return False
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype:
        return False
    found, tolerance = other(x), _TOLERANCE[weight.dtype]
    return found.shape == expected.shape and torch.allclose(
        found.float(), expected.float(), rtol=tolerance, atol=tolerance * float(expected.float().abs().max())
    )

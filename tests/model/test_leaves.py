"""Leaves: which modules are some, and that each row gets its adapter's parameters."""

import pytest
import torch
from matrix import build
from torch import nn

from loraplex.lora.weights import Extra
from loraplex.model.leaves import ReplaceableLeaf
from loraplex.model.step_context import Span, StepContext, StepLoRA
from loraplex.model.targets import find_targets
from loraplex.ops import LoRASegments, select_ops

OPS = select_ops("cpu")


def step(*spans: tuple[int, int, int]) -> StepLoRA:
    zero = torch.zeros(0, dtype=torch.int32)
    found = tuple(Span(start, end, place, 0, 1.0) for start, end, place in spans)
    return StepLoRA(LoRASegments(zero, zero, zero, zero.float(), zero, 0, 0), found, found)


@pytest.mark.parametrize(
    ("name", "path", "axes"),
    [
        ("llama", "model.norm", (1, 1)),
        ("llama", "model.layers.0.input_layernorm", (1, 1)),
        ("gpt2", "transformer.wpe", (1, 1)),
        ("gemma3_text", "model.layers.0.self_attn.q_norm", (2, 2)),  # it sees [1, heads, tokens, size]
        ("qwen3", "model.layers.0.self_attn.q_norm", (1, 1)),
        ("qwen3_moe", "model.layers.0.mlp.gate", (0, 0)),
        ("deepseek_v3", "model.layers.1.mlp.gate", (1, 0)),
    ],
)
def test_where_the_tokens_lie_is_measured(name: str, path: str, axes: tuple[int, int]):
    shape = find_targets(build(name))[path]
    assert (shape.kind, shape.token_axes) == ("leaf", axes)


def test_what_does_not_work_row_by_row_is_no_leaf():
    """OPT's learned positions get keyword arguments; gpt_oss' sinks belong to a module with children."""
    assert "model.decoder.embed_positions" not in find_targets(build("opt"))
    assert not [name for name in find_targets(build("gpt_oss")) if name.endswith("self_attn")]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rows_get_their_own_parameters(axis: int):
    norm = nn.LayerNorm(6)
    own = {name: torch.randn(6) for name in ("weight", "bias")}
    extras = [Extra(replaced=own), None, Extra(replaced={"bias": own["bias"]})]
    context = StepContext()
    leaf = ReplaceableLeaf(norm, (axis, axis), extras, context, OPS)
    x = torch.randn(*[3] * axis, 8, *[3] * (2 - axis), 6)
    with torch.inference_mode():
        plain = norm(x)
        assert torch.equal(leaf(x), plain)
        with context.running(step((0, 3, 0), (3, 4, 1), (5, 7, 2))):
            got = leaf(x).movedim(axis, 0)
        other = nn.functional.layer_norm(x, (6,), own["weight"], own["bias"]).movedim(axis, 0)
        shifted = nn.functional.layer_norm(x, (6,), norm.weight, own["bias"]).movedim(axis, 0)
    plain = plain.movedim(axis, 0)
    assert torch.equal(got[:3], other[:3])
    assert torch.equal(got[3:5], plain[3:5])
    assert torch.equal(got[5:7], shifted[5:7])
    assert torch.equal(got[7:], plain[7:])


@torch.inference_mode()
def test_all_results_of_a_router_are_replaced_and_its_attributes_are_seen():
    router = build("qwen3_moe").get_submodule("model.layers.0.mlp.gate")
    own = torch.randn_like(router.weight)
    context = StepContext()
    leaf = ReplaceableLeaf(router, (0, 0), [Extra(replaced={"weight": own})], context, OPS)
    assert leaf.top_k == router.top_k
    assert leaf.weight is router.weight
    x = torch.randn(10, router.weight.shape[1])
    before = [part.clone() for part in router(x)]
    with context.running(step((4, 5, 0), (6, 9, 0))):
        got = leaf(x)
    router.weight.data = own
    for part, plain, other in zip(got, before, router(x), strict=True):
        for row in range(10):
            torch.testing.assert_close(part[row], (other if row in (4, 6, 7, 8) else plain)[row])


@torch.inference_mode()
def test_a_routers_row_has_the_same_bits_in_any_batch():
    """torch's own product has not, at this size."""
    router = build("qwen3_moe", hidden_size=512).get_submodule("model.layers.0.mlp.gate")
    leaf = ReplaceableLeaf(router, (0, 0), [], StepContext(), OPS)
    x = torch.randn(70, 512)
    whole = leaf(x)
    for start, end in ((0, 1), (3, 5), (8, 20), (69, 70)):
        for part, all_rows in zip(leaf(x[start:end]), whole, strict=True):
            assert torch.equal(part, all_rows[start:end]), (start, end)


@torch.inference_mode()
def test_a_leaf_forgets_the_step():
    norm = nn.LayerNorm(6)
    context = StepContext()
    leaf = ReplaceableLeaf(norm, (0, 0), [Extra(replaced={"weight": torch.zeros(6)})], context, OPS)
    x = torch.randn(4, 6)
    with context.running(step((0, 4, 0))):
        assert not leaf(x).any()
    assert torch.equal(leaf(x), norm(x))


def test_attributes_that_neither_has():
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        ReplaceableLeaf(nn.LayerNorm(6), (0, 0), [], StepContext(), OPS).nothing_of_this_name  # noqa: B018

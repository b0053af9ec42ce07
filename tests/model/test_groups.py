"""Groups: which linears read the same tensor, and that each gets its own outputs, once."""

import pytest
import torch
from matrix import build
from torch import nn

from loraplex.model.groups import GroupProduct, find_groups
from loraplex.model.targets import find_targets


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("llama", [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]),
        ("phi3", []),  # fused already
        ("gpt2", []),
        ("opt", [("q_proj", "k_proj", "v_proj")]),
        ("qwen3_moe", [("q_proj", "k_proj", "v_proj")]),
    ],
)
def test_which_linears_read_the_same_tensor(name: str, groups: list[tuple[str, ...]]):
    found: dict[str, list[str]] = {}
    for path, shape in find_targets(build(name)).items():
        if shape.group:
            found.setdefault(shape.group, []).append(path)
    per_layer = [tuple(sorted(path.rpartition(".")[2] for path in paths)) for paths in found.values()]
    assert set(per_layer) == {tuple(sorted(group)) for group in groups}
    assert all(len({path.rpartition(".")[0] for path in paths}) == 1 for paths in found.values())


def test_a_model_that_needs_contiguous_outputs_has_no_groups():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, input_ids, position_ids, use_cache):
            x = torch.ones(1, input_ids.shape[1], 4)
            return self.a(x).view(-1) + self.b(x).view(-1)

    assert find_groups(Block(), ["a", "b"]) == []


@pytest.fixture
def group() -> GroupProduct:
    weights = [torch.randn(6, 8), torch.randn(3, 8), torch.randn(5, 8)]
    return GroupProduct(weights, [torch.randn(6), None, torch.randn(5)])


def expected(group: GroupProduct, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return group.product(x).split([6, 3, 5], dim=1)


@torch.inference_mode()
def test_each_member_gets_its_part(group: GroupProduct):
    calls = 0
    multiply = group.product

    def count(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return multiply(x)

    group.product = count
    for _ in range(3):
        x = torch.randn(7, 8)
        parts = [group.output(index, x, x) for index in (0, 2, 1)]
        for part, index in zip(parts, (0, 2, 1), strict=True):
            assert torch.equal(part, multiply(x).split([6, 3, 5], dim=1)[index])
    assert calls == 3
    assert group._input is None, "nothing is held between inputs"


@torch.inference_mode()
def test_another_input_is_another_product(group: GroupProduct):
    x, other = torch.randn(4, 8), torch.randn(4, 8)
    first = group.output(0, x, x)
    second = group.output(1, other, other)
    third = group.output(2, x, x)
    assert torch.equal(first, expected(group, x)[0])
    assert torch.equal(second, expected(group, other)[1])
    assert torch.equal(third, expected(group, x)[2])


@torch.inference_mode()
def test_a_member_that_comes_twice_is_not_given_what_was_written_to(group: GroupProduct):
    """A layer adds its adapters to what it gets, in place."""
    x = torch.randn(4, 8)
    group.output(0, x, x).zero_()
    assert torch.equal(group.output(0, x, x), expected(group, x)[0])


@torch.inference_mode()
def test_what_adapts_a_group_sees_each_input_once(group: GroupProduct):
    seen = []

    def adapt(y: torch.Tensor, x: torch.Tensor) -> None:
        seen.append(x)
        y += 1.0

    group.adapt = adapt
    x = torch.randn(4, 8)
    for index, part in enumerate(expected(group, x)):
        assert torch.equal(group.output(index, x, x), part + 1.0)
    assert len(seen) == 1
    assert seen[0] is x

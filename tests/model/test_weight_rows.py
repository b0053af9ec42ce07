"""Rows of a weight that a product holds packed: the very numbers, with as little unpacked as can be."""

import pytest
import torch

from loraplex.model.groups import Alone, GroupProduct, Member
from loraplex.model.linear import make_product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("outputs", "features"), [(64, 64), (100, 33), (31, 70), (257, 96)])
def test_rows_are_those_of_the_weight(outputs: int, features: int, dtype: torch.dtype):
    weight = torch.randn(outputs, features).to(dtype)
    way = Alone(make_product(weight, None))
    for runs in ([(0, outputs)], [(0, 1), (outputs - 1, outputs)], [(5, 20), (17, 31)]):
        expected = torch.cat([weight[start:stop] for start, stop in runs])
        assert torch.equal(way.rows(runs), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_a_member_of_a_group(dtype: torch.dtype):
    weights = [torch.randn(outputs, 48).to(dtype) for outputs in (40, 24, 70)]
    group = GroupProduct(weights, [None] * 3)
    for index, weight in enumerate(weights):
        way = Member(group, index)
        assert torch.equal(way.rows([(0, 3), (8, 24)]), torch.cat([weight[:3], weight[8:24]]))

"""TIES, DARE and magnitude pruning of task tensors, value for value as `peft.utils.merge_utils` has them.

A task tensor is what one adapter says in one place: its A, its B or its ΔW. (TIES: Yadav et al. 2023; DARE: Yu et al.
2024.)
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from loraplex.lora.arithmetic.method import MajoritySign, Method


def combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    method: Method,
    density: float,
    majority_sign: MajoritySign,
    generator: Generator,
) -> Tensor:
    """The task tensors (all of one shape) pruned to `density`, weighted, and summed or merged by sign."""
    pruned = [
        prune_at_random(tensor, density, generator) if method.is_random else prune_by_magnitude(tensor, density)
        for tensor in tensors
    ]
    stacked = torch.stack(pruned)
    weighted = stacked * torch.tensor(weights).view(-1, *[1] * (stacked.ndim - 1))
    if not method.elects_signs:
        return weighted.sum(0)
    agrees = agrees_with_majority(stacked, majority_sign)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def prune_by_magnitude(tensor: Tensor, density: float) -> Tensor:
    """Zero all but the largest share `density` of the values."""
    if density >= 1:
        return tensor
    flat = tensor.flatten()
    mask = torch.zeros_like(flat)
    mask[flat.abs().topk(int(density * flat.numel())).indices] = 1
    return tensor * mask.view(tensor.shape)


def prune_at_random(tensor: Tensor, density: float, generator: Generator) -> Tensor:
    """Keep each value with probability `density`, divided by it, so that the mean stays."""
    if density >= 1:
        return tensor
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def agrees_with_majority(stacked: Tensor, majority_sign: MajoritySign) -> Tensor:
    """Whether each value has the sign elected in its place; bool, of the shape [tensors, ...] of `stacked`."""
    signs = stacked.sign()
    votes = (stacked if majority_sign is MajoritySign.TOTAL else signs).sum(0)
    return signs == torch.where(votes >= 0, 1, -1)

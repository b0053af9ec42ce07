"""Factors and Spectrum: a change of a weight as ΔW = b·a, and its singular values.

Everything works on stacks of experts, too: a [..., r, in], b [..., out, r]. A stack shares one rank, and its energy is
that of all its members together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Up to this size of the smaller side all singular values of a dense delta are computed, in float64.
_SMALL = 1024
# Beyond it, and where less than a quarter of the rank is wanted, only the largest are, by subspace iteration (Halko et
# al. 2011). What was kept is measured in any case: U·Uᵀ·ΔW is a projection.
_OVERSAMPLES = 32
_ITERATIONS = 6


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """ΔW = b·a: a [..., rank, in], b [..., out, rank]; scaling is in them."""

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def dense(self) -> Tensor:
        """ΔW [..., out, in]."""
        return self.b @ self.a


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """ΔW = u·diag(s)·vh with u [..., out, k], s [..., k] descending, vh [..., k, in]. `total` is ‖ΔW‖² (Frobenius),
    which is more than Σ s² where only the largest k values were computed."""

    u: Tensor
    s: Tensor
    vh: Tensor
    total: float

    @property
    def energies(self) -> Tensor:
        """Share of ‖ΔW‖² in the first 1, 2, …, k values, float64 [k]; ones for a delta of zero."""
        sums = self.s.double().square().flatten(0, -2).sum(0) if self.s.ndim > 1 else self.s.double().square()
        return sums.cumsum(0) / self.total if self.total > 0 else torch.ones_like(sums)

    def energy(self, rank: int) -> float:
        """Share of ‖ΔW‖² that the first `rank` values hold."""
        return min(1.0, float(self.energies[min(rank, len(self.energies)) - 1]))

    def rank_for(self, energy: float) -> int:
        """The smallest rank that holds this share of ‖ΔW‖², at least 1."""
        enough = (self.energies >= energy - 1e-12).nonzero()
        return int(enough[0]) + 1 if len(enough) else len(self.energies)

    @property
    def numerical_rank(self) -> int:
        """The number of values that are no rounding of zero (as `torch.linalg.matrix_rank`), at least 1."""
        size = max(self.u.shape[-2], self.vh.shape[-1])
        floor = float(self.s.max()) * size * torch.finfo(self.s.dtype).eps
        return max(1, int((self.s > floor).sum(-1).max()))

    def factors(self, rank: int) -> Factors:
        """The best approximation of this rank (Eckart-Young), float32; sqrt(s) goes to both sides."""
        root = self.s[..., :rank].sqrt()
        a, b = root.unsqueeze(-1) * self.vh[..., :rank, :], self.u[..., :rank] * root.unsqueeze(-2)
        return Factors(a.float(), b.float())


def concatenated(parts: Sequence[Factors]) -> Factors:
    """The sum of `parts`, exactly: ranks side by side."""
    return Factors(torch.cat([part.a for part in parts], dim=-2), torch.cat([part.b for part in parts], dim=-1))


def spectrum_of_factors(factors: Factors) -> Spectrum:
    """All singular values of b·a, in float64, without the product: b = Q·R and aᵀ = P·S give those of R·Sᵀ. What is
    rounding beside the factors' size is zero: parts may cancel each other."""
    q, r = torch.linalg.qr(factors.b.double())
    p, s = torch.linalg.qr(factors.a.double().mT)
    u, values, vh = torch.linalg.svd(r @ s.mT, full_matrices=False)
    size = max(factors.b.shape[-2], factors.a.shape[-1])
    values[values <= size * torch.finfo(values.dtype).eps * float(r.norm() * s.norm())] = 0
    return Spectrum(q @ u, values, vh @ p.mT, float(values.square().sum()))


def spectrum_of_delta(delta: Tensor, rank: int) -> Spectrum:
    """At least the largest `rank` singular values of `delta` [..., out, in]."""
    smaller = min(delta.shape[-2:])
    if smaller <= _SMALL:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    elif 4 * (rank + _OVERSAMPLES) >= smaller:
        u, s, vh = torch.linalg.svd(delta.float(), full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):  # it draws from torch's own generator
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta.float(), rank + _OVERSAMPLES, _ITERATIONS)
        vh = v.mT
    return Spectrum(u, s, vh, float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2)

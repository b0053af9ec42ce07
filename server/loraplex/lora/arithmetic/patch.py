"""Patch: what an adapter makes of one parameter of the base.

    W′ = gain · W + left · right     the delta and DoRA's gain, along the outputs
    W′[rows] = own                   a saved module, or trained rows (None: all rows)
    W′ = W + shift                   a bias

All in the layout in which the base stores W [rows, cols] (a bias [rows, 1]), in float32, some rows at a time, with one
rounding to the type of W.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex.errors import AdapterInvalid
from loraplex.lora.arithmetic.factors import Factors
from loraplex.lora.text import shown
from loraplex.lora.weights import ModuleShape

_ROWS = 1024


@dataclass(slots=True)
class Change:
    """How far a parameter moved, in squares summed over its values: `delta` ‖W′ - W‖² before rounding, `base` ‖W‖²,
    `rounding` the rounding's. `num_moved` values differ from the base's after it, of `num_wanted` that should."""

    delta: float = 0.0
    base: float = 0.0
    rounding: float = 0.0
    num_moved: int = 0
    num_wanted: int = 0

    @property
    def relative(self) -> float:
        """‖W′ - W‖ / ‖W‖."""
        return (self.delta / self.base) ** 0.5 if self.base else float("inf")

    @property
    def lost(self) -> float:
        """‖what rounding added‖ / ‖W′ - W‖."""
        return (self.rounding / self.delta) ** 0.5 if self.delta else 0.0

    def add(self, old: Tensor, exact: Tensor, rounded: Tensor) -> None:
        """Count some rows, all float32."""
        self.delta += _square(exact - old)
        self.base += _square(old)
        self.rounding += _square(rounded - exact)
        self.num_moved += int((rounded != old).sum())
        self.num_wanted += int((exact != old).sum())


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """`left` [rows, r] and `right` [r, cols]; `gain` [rows, 1] or [1, cols]; `own` [n, cols] and `rows` int64 [n]
    (None: all); `shift` [rows, 1]. Each may be missing."""

    left: Tensor | None = None
    right: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    own: Tensor | None = None
    rows: Tensor | None = None

    def applied(self, weight: Tensor, path: str, change: Change) -> Tensor:
        """W′ in the type and shape of `weight`; counts it in `change`. Raises AdapterInvalid where it overflows."""
        flat = weight.reshape(len(weight), -1)
        out = torch.empty_like(flat)
        for start in range(0, len(flat), _ROWS):
            end = min(start + _ROWS, len(flat))
            old = flat[start:end].float()
            exact = self._exact(old, start, end)
            out[start:end] = exact.to(weight.dtype)
            change.add(old, exact, out[start:end].float())
        if not bool(torch.isfinite(out).all()):
            raise AdapterInvalid(
                f"{shown(path, 160)} with the adapter is not finite in {str(weight.dtype).removeprefix('torch.')}: it "
                "overflows, or the base's holds NaN. Check the adapter's scaling and the base."
            )
        return out.view(weight.shape)

    def _exact(self, old: Tensor, start: int, end: int) -> Tensor:
        new = old.clone()
        if self.gain is not None:
            new *= self.gain if len(self.gain) == 1 else self.gain[start:end]
        if self.left is not None and self.right is not None:
            new += self.left[start:end] @ self.right
        if self.shift is not None:
            new += self.shift[start:end]
        if self.own is not None and self.rows is None:
            new = self.own[start:end].clone()
        elif self.own is not None and self.rows is not None:
            inside = (self.rows >= start) & (self.rows < end)
            new[self.rows[inside] - start] = self.own[inside]
        return new


def delta_patch(shape: ModuleShape, factors: Factors, gain: Tensor | None) -> Patch:
    """The patch of b·a (of one expert) and of gain [out] as the base stores the weight: [out, in], but [in, out] where
    it is transposed and in an embedding. b carries the gain already."""
    if shape.transposed or shape.kind == "embedding":
        return Patch(factors.a.T, factors.b.T, None if gain is None else gain.unsqueeze(0))
    return Patch(factors.b, factors.a, None if gain is None else gain.unsqueeze(1))


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2

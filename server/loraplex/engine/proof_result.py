"""ProofResult: what the proof of an adapter found. Plain data: picklable, no torch.

What is measured of a module:

    delta    the kernels' s·B·A·x from the adapter's place, all outputs, against float32; rows beside it stay zero
    product  what the layer answered in the probe's forward pass, against float32 x·(W + s·B·A)ᵀ (W replaced, gained
             and shifted as the adapter says), at up to `num_outputs` outputs
    own      a leaf of the base (norm, router) against the base's own module with the adapter's parameters

Every figure is the largest difference of a row as a share of the row's largest value. None: it does not apply. Experts
have `delta` only: which of them a probe meets is the router's choice.
"""

import math
from dataclasses import dataclass

from loraplex.engine.messages import Failure


@dataclass(frozen=True, slots=True)
class ModuleFigures:
    """One module's. `num_outputs`: outputs at which `product` was taken."""

    name: str
    kind: str
    delta: float | None = None
    product: float | None = None
    own: float | None = None
    num_outputs: int = 0

    @property
    def error(self) -> float:
        """The largest of them; NaN if one is."""
        known = [figure for figure in (self.delta, self.product, self.own) if figure is not None]
        return math.nan if any(map(math.isnan, known)) else max(known, default=0.0)


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far the adapter moves the logits of the probe's positions from the base's. `kl` in nats, base || adapter;
    `num_changed`: positions whose most likely token is another."""

    max_difference: float
    mean_kl: float
    max_kl: float
    num_changed: int
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofResult:
    """`failure` None: proven. `tolerance`: the largest error allowed of any module. `isolation_error`: how far the
    adapter's neighbours in the batch were from the same rows without it, as a share of their range. `seconds`: of the
    engine's time; `num_slices` it was cut into."""

    base_fingerprint: str
    dtype: str
    device: str
    quantization: str | None = None  # of the base
    failure: Failure | None = None
    tolerance: float = 0.0
    modules: tuple[ModuleFigures, ...] = ()
    isolation_error: float = 0.0
    divergence: Divergence | None = None
    seconds: float = 0.0
    num_slices: int = 0

"""Counter-based Gumbel noise: a number that depends on (seed, choice, output position, token id) and on nothing else.

argmax(logits + Gumbel noise) is a draw from softmax(logits) (Gumbel 1954; Maddison et al. 2014). Because the noise is
a hash of its key, a token is the same in any batch and after any preemption, and small differences in the logits
change it no more often than they change a greedy one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def row_key(seed: int, choice: int, position: int) -> int:
    """64 bits that stand for one draw."""
    key = _splitmix64(seed & 0xFFFFFFFFFFFFFFFF)
    key = _splitmix64(key ^ choice)
    return _splitmix64(key ^ position)


def gumbel_noise(keys: Sequence[int], token_ids: Tensor) -> Tensor:
    """Noise for `token_ids` int64 [V] or [R, V] under R `keys` -> float32 [R, V]."""
    device = token_ids.device
    low = torch.tensor([key & _MASK for key in keys], dtype=torch.int64, device=device).unsqueeze(1)
    high = torch.tensor([key >> 32 for key in keys], dtype=torch.int64, device=device).unsqueeze(1)
    bits = _fmix32(_fmix32((token_ids ^ low) & _MASK) ^ high)
    # u in (0, 1); -log(1 - u) is exponential and keeps full precision where it matters, at small values.
    exponential = -torch.log1p(-((bits.float() + 0.5) * 2.0**-32).clamp_(max=1 - 2.0**-24))
    return -torch.log(exponential)


def _fmix32(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby, public domain) on 32-bit values held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _splitmix64(x: int) -> int:
    """One step of SplitMix64 (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)

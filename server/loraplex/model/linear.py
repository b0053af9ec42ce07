"""The product x·Wᵀ + b of the frozen base, the same kernel for every batch size.

torch's float32 `F.linear` chooses between kernels by the number of rows, so a token's result depends on how many
others are in the batch. Products on weights packed once are faster and do not: our own on AMX tiles in bfloat16,
oneDNN's elsewhere (rows padded to a multiple of 4). oneDNN's packing operators are torch's own but not public API
(inductor uses them): they are detected, and `F.linear` is the way without them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

ROW_MULTIPLE = 4
"""Batches are padded to this many rows: packed float32 products at K = 2048 have a kernel of their own for M = 1."""

_PROBED_ROWS = (1, 2, 5, 12, 20, 29, 34, 48, 64, 128, 250, 257)


class Product(Protocol):
    """x·Wᵀ + b for a weight [out, in] and a bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, in] -> [M, out], a new contiguous tensor."""
        ...

    def weight(self) -> Tensor:
        """The weight [out, in], bit by bit: the very tensor, or a new one unpacked."""
        ...


def make_product(weight: Tensor, bias: Tensor | None) -> Product:
    """The product for `weight` [out, in], which is read, packed or kept; never written."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if not is_packed(weight):
        return _PlainProduct(weight, bias)
    if weight.dtype == torch.bfloat16:
        from loraplex.ops import numba_tiles

        if numba_tiles.has_tiles():
            return _TiledProduct(weight, bias)
    return _PackedProduct(weight, bias)


def is_packed(weight: Tensor) -> bool:
    """Whether `make_product` makes a packed copy of `weight`, of the same size, and has no use for the weight then."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@torch.inference_mode()
def is_row_invariant(
    product: Callable[[Tensor], Tensor], in_features: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the product of a row has the same bits in batches of many sizes. A probe with random numbers: kernels
    change with the number of rows, and where they do some last bit differs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_PROBED_ROWS), in_features, generator=generator).to(device, dtype)
    whole = product(x)
    return all(torch.equal(product(x[:count]), whole[:count]) for count in _PROBED_ROWS)


class _PlainProduct:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight, self._bias)

    def weight(self) -> Tensor:
        return self._weight


class _PackedProduct:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self._bias = bias
        self._multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        padding = -num_rows % ROW_MULTIPLE
        if padding:
            x = nn.functional.pad(x, (0, 0, 0, padding))
        y = self._multiply(x, self._packed, self._bias, "none", [], "")
        return y[:num_rows] if padding else y

    def weight(self) -> Tensor:
        return self._packed.to_dense()


class _TiledProduct:
    def __init__(self, weight: Tensor, bias: Tensor | None):
        from loraplex.ops import numba_tiles

        self._tiles = numba_tiles
        self._shape = weight.shape
        self._packed = numba_tiles.pack_tiles(weight)
        self._bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self._tiles.multiply_tiles(x, self._packed, self._bias, self._shape[0])

    def weight(self) -> Tensor:
        return self._tiles.unpack_tiles(self._packed, *self._shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start:stop of the weight, without unpacking the others."""
        outputs, features = self._shape
        panel = self._tiles.PANEL
        first, end = start // panel, -(-stop // panel)
        size = len(self._packed) // -(-outputs // panel)  # of a panel
        part = self._tiles.unpack_tiles(self._packed[first * size : end * size], (end - first) * panel, features)
        return part[start - first * panel : stop - first * panel]


def weight_rows(product: Product, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Rows start:stop of a product's weight for each of `runs`, [rows, in]: as little unpacked as can be."""
    if isinstance(product, _TiledProduct):
        return torch.cat([product.rows(start, stop) for start, stop in runs])
    weight = product.weight()
    return torch.cat([weight[start:stop] for start, stop in runs])

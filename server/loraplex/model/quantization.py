"""Quantised bases: linears that transformers' own quantisers made, served unmerged through the same LoRA layers.

int8    torchao, weights only, one scale a row
int4    torchao, weights only, groups of 128 (CUDA)
nf4     bitsandbytes, blocks of 64: the 4-bit base of QLoRA (Dettmers et al. 2023)
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraplex.errors import StartupError

KINDS = ("int8", "int4", "nf4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What quantising did to a base. Bytes of its parameters; `divergence`: the largest difference of its logits from
    the unquantised base's on fixed tokens, as a share of their range."""

    kind: str
    plain_nbytes: int
    nbytes: int
    num_parameters: int
    divergence: float


def quantization_config(kind: str, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' config for `kind`. Raises StartupError when its library is not installed or cannot do it here."""
    if kind == "int4" and device.type != "cuda":
        raise StartupError("--quantization int4 needs CUDA: its kernels do not exist for a CPU. Use nf4 or int8.")
    return _MAKERS[kind](dtype)


def _int8(dtype: torch.dtype) -> Any:
    quantization = _library("torchao.quantization")
    return _transformers().TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _int4(dtype: torch.dtype) -> Any:
    quantization = _library("torchao.quantization")
    return _transformers().TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=128))


def _nf4(dtype: torch.dtype) -> Any:
    _library("bitsandbytes")
    return _transformers().BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


_MAKERS: Mapping[str, Callable[[torch.dtype], Any]] = {"int8": _int8, "int4": _int4, "nf4": _nf4}


def _transformers() -> Any:
    return importlib.import_module("transformers")


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise StartupError(
            f"This quantisation needs {package}, which is not installed ({error}). "
            "Install it: pip install 'loraplex[quantization]'."
        ) from error


def keep_exact(model: nn.Module) -> None:
    """Let 4-bit linears compute as they were trained, from the dequantised weight: on a CPU with AVX512-BF16
    bitsandbytes would repack them at the first product for a kernel that computes in bfloat16 whatever was asked for,
    refuses some widths, and is faster for one row (four times) but slower from 32 rows on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(module: nn.Module) -> bool:
    """Whether a Linear's weight is no plain matrix: a tensor subclass (torchao), or packed with its state beside it
    (bitsandbytes)."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and (_is_4bit(weight) or hasattr(type(weight), "__tensor_flatten__"))


def dequantized(module: nn.Module) -> Tensor:
    """The weight that a quantised Linear stands for, a new [out, in] in the dtype it computes in."""
    weight: Any = module.weight
    if _is_4bit(weight):
        functional = importlib.import_module("bitsandbytes.functional")
        return functional.dequantize_4bit(weight.data, weight.quant_state).to(module.compute_dtype)
    return weight.dequantize()


class QuantizedProduct:
    """x·Wᵀ + b by the quantised Linear itself."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self._module(x)

    def weight(self) -> Tensor:
        return dequantized(self._module)


def stored_nbytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are stored, with the scales of quantised ones."""
    return sum(_stored(parameter) for parameter in model.parameters())


def _stored(tensor: Any) -> int:
    if _is_4bit(tensor):
        return tensor.nbytes + tensor.quant_state.absmax.nbytes
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_stored(getattr(tensor, name)) for name in names)
    return tensor.nbytes


def _is_4bit(weight: Any) -> bool:
    return hasattr(weight, "quant_state")

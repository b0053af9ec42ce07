"""Where and in what numbers the base runs, and on how many threads."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from loraplex.errors import StartupError

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # glibc's malloc.h
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N". Raises StartupError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError("--device cuda was asked for, but torch sees no CUDA device. Use --device cpu.")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively (CUDA; a CPU with AVX512-BF16 or AMX), else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    is_native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if is_native else torch.float32


def set_threads(threads: int | None, device: torch.device) -> int:
    """Compute threads of the calling thread and its kernels; returns the number.

    None: one less than torch would take, so that the event loop has a core of its own. On two cores one thread was
    faster than two even for a model of 124.7 M parameters (`bench/NOTES.md`).
    """
    count = threads if threads is not None else max(1, torch.get_num_threads() - 1)
    torch.set_num_threads(count)
    if device.type == "cpu":
        from loraplex.ops import numba_ops

        numba_ops.set_num_threads(count)
    return count


def keep_large_blocks_apart() -> None:
    """Give every block of a megabyte or more back to the system when it is freed, as glibc does until it has seen
    larger ones go: then it keeps evicted adapters' memory for blocks of other sizes, and the process grows. For the
    same reason threads share their arenas: each new one would keep what its loads and uploads have freed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        mallopt(_M_ARENA_MAX, 2)


def send(values: Sequence | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the host's numbers on `device`. Nobody waits: the copy is made in the order of the stream, from
    pinned memory that torch keeps until it is done."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetch(*tensors: Tensor) -> list[Tensor]:
    """The same on the host, with one wait for all of them; on a CPU the very same tensors."""
    if not any(tensor.is_cuda for tensor in tensors):
        return [tensor.cpu() for tensor in tensors]
    found = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # into pinned memory
    torch.cuda.current_stream().synchronize()
    return found

"""What an exception in a step says of the device: out of memory ends a batch, a lost context the engine."""

import traceback

import torch

_CUDA_ERROR_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation: what torch's allocator does not ask for itself


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no room for what was asked. Its context is whole, and what stands there stays."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    is_refused = getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION
    return isinstance(error, torch.AcceleratorError) and is_refused


def is_device_error(error: BaseException) -> bool:
    """Whether the accelerator itself is gone: its context cannot be used after such an error."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)


def let_go(error: BaseException) -> None:
    """Let go of what the frames that `error` came through hold: a step's activations live as long as they do."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__

"""Fixtures of the ops' tests."""

from collections.abc import Iterator

import pytest
import torch

from loraplex.ops import numba_ops


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Kernels on one thread, unless a test asks for more; torch's count is put back."""
    before = torch.get_num_threads()
    numba_ops.set_num_threads(1)
    yield
    numba_ops.set_num_threads(before)

import pytest

from loraplex.bench.machine import MachineLimits


@pytest.fixture(scope="session")
def limits() -> MachineLimits:
    """Round numbers, so that nothing is measured."""
    return MachineLimits(
        device="cpu",
        threads=1,
        bytes_per_second={1: 1e9},
        flops={"bfloat16": 1e9, "float32": 1e9},
        buffer_bytes=1 << 30,
        cache_bytes=1 << 20,
        seconds=0.0,
    )

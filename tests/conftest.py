"""What every test runs under. Import-time settings come first: torch and numba read them when they are imported."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from loraplex.config import prepare_process

if TYPE_CHECKING:
    from forks import Forks
    from postgres import Postgres

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy's own threads spin, in products as small as Triton's interpreter has
prepare_process()

import torch  # noqa: E402  after the settings it reads

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run on the CPU

# The same examples in every run, on a machine of any speed; with --hypothesis-profile random other ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.load_profile("same")


@pytest.fixture(scope="session")
def postgres() -> Iterator["Postgres"]:
    """One server for the tests that need it, started by the first."""
    from postgres import running_postgres

    with running_postgres() as server:
        yield server


@pytest.fixture(scope="session")
def forks() -> Iterator["Forks"]:
    """Starts servers as processes of their own."""
    from forks import Forks

    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new registry's URL: on each of the two databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    return request.getfixturevalue("postgres").fresh()

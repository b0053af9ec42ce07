"""What every test runs under. Import-time settings come first: torch and numba read them when they are imported."""

import os

from loraplex.config import prepare_process

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
prepare_process()

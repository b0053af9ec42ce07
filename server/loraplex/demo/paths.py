"""Where the demo's base and adapters are: in the package, or for adapters in the checkout it is run from."""

from pathlib import Path

BASE_NAME = "demo-base"
EXAMPLE = ("upper", "a pilot sees the queen under the market")
"""An adapter of the demo and a prompt that shows what it does."""
BASE_FOLDER = Path(__file__).parent / "base"


def adapters_folder() -> Path | None:
    """The folder of the demo's adapters, None when they are not at hand."""
    for folder in (Path(__file__).parent / "adapters", Path(__file__).parents[3] / "adapters"):
        if folder.is_dir():
            return folder
    return None

"""Build the demo from nothing: `make demo-model`, or `python -m loraplex.demo.build` with the extra `[train]`.

Some 20 minutes on two idle cores. An interrupted base is taken up from its last checkpoint.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import Progress, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from loraplex.demo.adapter_training import build_adapters
from loraplex.demo.base_training import build_base, build_tokenizer
from loraplex.demo.evaluate import evaluate
from loraplex.demo.recipe import THREADS

_HERE = Path(__file__).parent


class Stage(StrEnum):
    """The stages in their order. Each reads what the ones before it wrote."""

    TOKENIZER = "tokenizer"
    BASE = "base"
    ADAPTERS = "adapters"
    EVALUATE = "evaluate"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the results go, and where unfinished training waits."""

    base: Path
    adapters: Path
    scores: Path
    work: Path

    @classmethod
    def of_checkout(cls, work: Path, demo: Path = _HERE) -> Layout:
        """The places a checkout keeps its demo in: the package `demo`, and `adapters/` beside `server/`.

        Raises typer.BadParameter in an installation, which is not to be written into.
        """
        root = demo.parents[2]
        if not (root / "pyproject.toml").is_file():
            raise typer.BadParameter("this is no checkout of the project; say where to write", param_hint="--out")
        return cls(demo / "base", root / "adapters", demo / "scores.json", work)

    @classmethod
    def under(cls, folder: Path, work: Path) -> Layout:
        """Everything under one folder."""
        return cls(folder / "base", folder / "adapters", folder / "scores.json", work)


def build(
    out: Annotated[Path | None, typer.Option(help="Write under this folder instead of into the checkout.")] = None,
    stage: Annotated[list[Stage] | None, typer.Option(help="Run this stage only; may be given more than once.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Train only these adapters.")] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints of unfinished training.")] = Path("build/demo"),
    threads: Annotated[int, typer.Option(help="Threads for torch; another number gives other weights.")] = THREADS,
) -> None:
    """Train the demo's tokenizer, base model and adapters, score them, and write the model cards."""
    console = Console()
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[RichHandler(console=console, show_path=False)])
    _quieten()
    torch.set_num_threads(threads)
    layout = Layout.of_checkout(work) if out is None else Layout.under(out, work)
    layout.base.mkdir(parents=True, exist_ok=True)
    stages = stage or list(Stage)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        if Stage.TOKENIZER in stages:
            build_tokenizer(layout.base)
        if Stage.BASE in stages:
            build_base(layout.base, layout.work, progress)
        if Stage.ADAPTERS in stages:
            build_adapters(layout.base, layout.adapters, progress, only)
        if Stage.EVALUATE in stages:
            # generation of so small a model gains nothing from a second thread, and loses much on busy cores
            torch.set_num_threads(1)
            evaluate(layout.base, layout.adapters, layout.scores, progress)


def _quieten() -> None:
    """One progress bar, ours, and no warnings of what is meant so."""
    disable_progress_bar()
    # PEFT 0.21 reads an attribute that transformers 5.23 has deprecated
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    # velna's LoRAs on the embedding and the head are two, though these share a matrix: nothing is merged here
    warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*", category=UserWarning)


if __name__ == "__main__":
    typer.run(build)

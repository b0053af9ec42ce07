"""`loraplex bench`: measurements. `step` runs in process."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loraplex.config import prepare_process

app = typer.Typer(no_args_is_help=True, help="Measure this machine and this server.")


@app.callback()
def bench() -> None:
    """Measure this machine and this server."""


@app.command("step")
def step(
    rounds: Annotated[int, typer.Option(help="Timed rounds; every variant takes its turn in each.", min=1)] = 12,
    context: Annotated[int, typer.Option(help="Tokens each sequence has behind it.", min=1, max=960)] = 64,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    rank: Annotated[int, typer.Option(min=1, max=256)] = 16,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Decode steps of a Llama of 124.7 M parameters: base only and with 1, 8 and 32 adapters, side by side."""
    prepare_process()
    from loraplex.bench.step import StepBench, StepSettings

    settings = StepSettings(rounds=rounds, context=context, dtype=dtype, device=device, threads=threads, rank=rank)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("rounds", total=rounds * 3)
        result = StepBench(settings).run(lambda: progress.advance(bar))
    if json_output:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table("batch", "adapters", "step ms", "tokens/s", "× base", title=result["shape"])
    for row in result["rows"]:
        ratio = row["tokens_per_second"] / result["base"][str(row["batch"])]
        table.add_row(
            str(row["batch"]),
            str(row["adapters"]) if row["adapters"] else "base only",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{ratio:.3f}",
        )
    console = Console()
    console.print(table)
    console.print("  ".join(f"{name} {value:.3f}" for name, value in result["ratios"].items()))

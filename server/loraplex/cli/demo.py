"""`loraplex demo`: all tasks of all adapters mixed in the same batches, and what comes of it."""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loraplex.cli.output import Json, console, print_json, progress
from loraplex.cli.serve import configure_logging, demo_settings
from loraplex.config import Settings, prepare_process
from loraplex.demo.kind import short_names
from loraplex.errors import StartupError


def demo(
    prompts: Annotated[int, typer.Option(help="Held-out prompts for each adapter.", min=1, max=1000)] = 256,
    json_output: Json = False,
) -> None:
    """Send every task to its adapter and to the base, all in the same batches, and check the answers by program."""
    prepare_process(Path(tempfile.gettempdir()) / "loraplex")
    configure_logging("warning", as_json=False)
    with tempfile.TemporaryDirectory(prefix="loraplex-demo-") as data_dir:
        settings = Settings.load(
            {**demo_settings(), "data_dir": Path(data_dir), "max_num_seqs": 32, "host": "127.0.0.1"}  # nothing listens
        )
        if settings.adapters is None:
            raise StartupError("The demo's adapters are not here. Run it in a checkout of the project.")
        result = asyncio.run(_run(settings, prompts))
    if json_output:
        print_json(result)
    else:
        _print(result)


async def _run(settings: Settings, num_prompts: int) -> dict:
    from loraplex.demo.exam import Exam
    from loraplex.service import Service

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    async with Service.running(settings) as service:
        exam = Exam(service, num_prompts)
        if not exam.names:
            raise StartupError(f"None of the demo's adapters is in {settings.adapters}.")
        with progress(*columns) as bar:
            task = bar.add_task("answers", total=exam.num_questions)
            return await exam.take(lambda: bar.advance(task))


def _print(result: dict) -> None:
    table = Table("adapter", "kind", "rank", "modules", box=SIMPLE_HEAD)
    for heading in ("exact match", "base alone"):
        table.add_column(heading, justify="right", no_wrap=True)
    answers = Table.grid(padding=(0, 2))
    for row in result["adapters"]:
        table.add_row(
            row["name"],
            row["kind"],
            str(row["rank"]),
            short_names(row["target_modules"]),
            f"{row['exact_match']:.1%}",
            f"{row['base_exact_match']:.1%}",
        )
        answers.add_row(f" {row['name']}", Text(f"{row['example']['prompt']}\n→ {row['example']['answer']}"))
    out = console()
    out.print(table, answers, "")
    bars = result["bars"]
    out.print(
        f"{result['adapters'][0]['prompts']} prompts a task that were never trained on. The bars, at least "
        f"{bars['exact_match']:.0%} with the adapter and at most {bars['base_exact_match']:.0%} without, are "
        f"{'met' if result['meets_bars'] else 'MISSED'}."
    )
    out.print(
        f"{result['num_requests']} requests in {result['seconds']:.1f} s; up to {result['max_distinct']} different "
        f"adapters and the base answered in one batch; {result['generated_tokens']} tokens."
    )

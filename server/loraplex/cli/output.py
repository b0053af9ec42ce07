"""What the commands show things with."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_WIDE = 1 << 16


def console() -> Console:
    """For stdout. Where that is no terminal, nothing is cut: lines are as long as what they say."""
    found = Console()
    if not found.is_terminal:
        found.width = _WIDE
    return found


def progress(*columns: ProgressColumn, refresh_per_second: float = 10) -> Progress:
    """On stderr, gone at the end; nothing at all where that is no terminal."""
    errors = Console(stderr=True)
    return Progress(
        *columns,
        console=errors,
        transient=True,
        refresh_per_second=refresh_per_second,
        disable=not errors.is_terminal,
    )


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))

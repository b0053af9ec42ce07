"""The command line. The only place that prints. Heavy imports happen inside the commands, after `prepare_process`."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from loraplex import __version__
from loraplex.cli import adapters, arithmetic, bench, check, compare, demo, routes, serve, store, taking, tiers
from loraplex.errors import LoraplexError

# No markup in help texts: it would swallow "[default: 8000]".
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("check")(check.check)
app.command("compare")(compare.compare)
app.command("push")(adapters.push)
app.command("pull")(taking.pull)
app.command("export")(store.export)
app.command("import")(store.import_)
app.command("ls")(adapters.ls)
app.command("rm")(adapters.rm)
app.command("pin")(tiers.pin)
app.command("unpin")(tiers.unpin)
app.command("prefetch")(tiers.prefetch)
app.command("tiers")(tiers.tiers)
app.command("rollback")(adapters.rollback)
app.command("history")(adapters.history)
app.command("merge")(arithmetic.merge)
app.command("resize")(arithmetic.resize)
app.command("bake")(arithmetic.bake)
app.command("extract")(arithmetic.extract)
app.add_typer(routes.app, name="route")
app.add_typer(bench.app, name="bench")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"loraplex {__version__}")
        raise typer.Exit


@app.callback()
def loraplex(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An inference server for many LoRA adapters on one frozen base model."""


def main() -> None:
    """Run the command line. Exit codes: 0 well, 1 failed, 2 wrong usage or settings."""
    try:
        app()
    except LoraplexError as error:
        # Text, not markup: a message may quote what the user typed.
        Console(stderr=True).print(Text.assemble(("error ", "bold red"), error.message), soft_wrap=True)
        sys.exit(2)

"""The command line. The only place that prints. Heavy imports happen inside the commands, after `prepare_process`."""

import sys
from typing import Annotated, Any

import typer

from loraplex import __version__
from loraplex.cli import adapters, arithmetic, bench, check, compare, demo, routes, serve, store, taking, tiers
from loraplex.cli.client import connected
from loraplex.cli.failures import FAILED, UsageError, exit_code_of, tell
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

_ClickError: Any = typer.BadParameter.__base__
"""UsageError of click, or of the copy of it that newer releases of typer bring and do not export."""


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"loraplex {__version__}")
        raise typer.Exit


@app.callback()
def loraplex(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """An inference server for many LoRA adapters on one frozen base model."""
    context.with_resource(connected())


def main() -> None:
    """Run the command line. `failures` has the exit codes."""
    as_json = "--json" in sys.argv
    try:
        sys.exit(app(standalone_mode=False))
    except LoraplexError as error:
        tell(error, as_json=as_json)
        sys.exit(exit_code_of(error))
    except _ClickError as error:
        if as_json:
            tell(UsageError(error.format_message()), as_json=True)
        else:
            error.show()
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(FAILED)

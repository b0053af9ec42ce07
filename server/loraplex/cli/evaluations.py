"""`loraplex route eval put|show|lines|run|report|cancel|rm`: the evaluation set of a route, on a running server."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from loraplex.cli.client import download, request
from loraplex.cli.failures import FAILED, UsageError
from loraplex.cli.output import Json, console, print_json, progress

app = typer.Typer(no_args_is_help=True, help="Prompts with checks that gate promotions.", rich_markup_mode=None)

Alias = Annotated[str, typer.Argument(help="Name of the route.")]
RunId = Annotated[str, typer.Argument(help="A run, as 'run' and 'report' name it.")]
_POLL_SECONDS = 0.25


def _path(alias: str, below: str = "") -> str:
    return f"/v1/routes/{quote(alias, safe='')}/evaluation{below}"


@app.command()
def put(
    alias: Alias,
    file: Annotated[Path, typer.Argument(help="JSON objects, one a line: prompt or messages, and check.")],
    json_output: Json = False,
) -> None:
    """Store a set; what targets have passed counts no longer, unless it is the same set."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    stored = request("PUT", _path(alias), content=data)
    if json_output:
        print_json(stored)
    else:
        _say(f"{alias}: {stored['cases']} cases, revision {stored['revision']} of the set")


@app.command()
def show(alias: Alias, json_output: Json = False) -> None:
    """Show how each target of the route stands."""
    reply = request("GET", _path(alias))
    if json_output:
        print_json(reply)
        return
    gate = "no gate" if reply["gate"] is None else f"gate at {reply['gate']['min_pass']:g}"
    _say(f"{alias}: {reply['cases']} cases, revision {reply['revision']} by {reply['who']}, {gate}")
    table = Table("target", "share", "passed", "rate", "gate")
    for one in reply["targets"]:
        passed = "-" if one["passed"] is None else f"{one['passed']} of {one['total']}"
        closed = "" if reply["gate"] is None else one["closed"] or "open"
        table.add_row(Text(one["model"]), f"{100 * one['share']:.4g} %", passed, _rate(one["pass_rate"]), Text(closed))
    console().print(table)
    if (run := reply["run"]) is not None:
        _say(f"latest run: {run['id']}, {run['state']}, {run['done']} of {run['total']}")


@app.command()
def lines(alias: Alias) -> None:
    """Print the set as it was stored."""
    with download(_path(alias, "/lines")) as reply:
        for part in reply.iter_bytes():
            sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()


@app.command()
def run(
    alias: Alias,
    target: Annotated[list[str] | None, typer.Option(help="A model; repeatable. [default: the route's]")] = None,
    wait: Annotated[bool, typer.Option(help="Stay until it has ended, and print the report.")] = True,
    min_pass: Annotated[float | None, typer.Option(help="Exit code 1 below it. [default: the route's gate]")] = None,
    json_output: Json = False,
) -> None:
    """Run the set on targets, beside the traffic. Exit code 1 when one passes too little, or the run is cut short."""
    begun = request("POST", _path(alias, "/runs"), json={"targets": target} if target else {})
    if not wait:
        print_json(begun) if json_output else _say(
            f"{begun['id']}  0 of {begun['total']}; see loraplex route eval report"
        )
        return
    ended = _watched(alias, begun)
    _print_report(ended, json_output)
    gate = request("GET", _path(alias))["gate"] if min_pass is None else {"min_pass": min_pass}
    least = 0.0 if gate is None else gate["min_pass"]
    reached = [one["pass_rate"] for one in (ended["report"] or {"targets": ()})["targets"]]
    if ended["state"] != "done" or min(reached) < least:
        raise typer.Exit(FAILED)


@app.command()
def report(
    alias: Alias,
    run_id: Annotated[str, typer.Argument(help="A run. [default: the latest]")] = "latest",
    json_output: Json = False,
) -> None:
    """Show a run: how far it is, or what each target reached and where it failed."""
    _print_report(request("GET", _path(alias, f"/runs/{quote(run_id, safe='')}")), json_output)


@app.command()
def cancel(alias: Alias, run_id: RunId, json_output: Json = False) -> None:
    """End a run."""
    reply = request("DELETE", _path(alias, f"/runs/{quote(run_id, safe='')}"))
    print_json(reply) if json_output else _say(f"{reply['id']}  {reply['state']}, {reply['done']} of {reply['total']}")


@app.command()
def rm(alias: Alias, json_output: Json = False) -> None:
    """Delete the set; a gate is then closed to everything."""
    reply = request("DELETE", _path(alias))
    print_json(reply) if json_output else _say(f"deleted the evaluation set of {reply['alias']}")


def _watched(alias: str, run: dict[str, Any]) -> dict[str, Any]:
    """The run when it has ended. The bar goes to stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task(f"{alias} {run['id']}", total=run["total"])
        while run["state"] == "running":
            time.sleep(_POLL_SECONDS)
            run = request("GET", _path(alias, f"/runs/{run['id']}"))
            bar.update(task, completed=run["done"])
    return run


def _print_report(run: dict[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(run)
        return
    _say(f"{run['id']}  {run['state']}, {run['done']} of {run['total']}, revision {run['set_revision']} of the set")
    if run["report"] is None:
        return
    table = Table("target", "passed", "rate", "without an answer")
    for one in run["report"]["targets"]:
        table.add_row(
            Text(one["model"]), f"{one['passed']} of {one['total']}", _rate(one["pass_rate"]), str(one["errors"])
        )
    shown = console()
    shown.print(table)
    failures = Table("target", "line", "prompt", "answer", "why", title="failures", title_justify="left")
    for one in run["report"]["targets"]:
        for failed in one["failures"]:
            texts = (failed["prompt"], failed["answer"] or "", failed["why"])
            failures.add_row(Text(one["model"]), str(failed["line"]), *(Text(text[:120]) for text in texts))
        if one["failures_left_out"]:
            failures.add_row(Text(one["model"]), "…", f"{one['failures_left_out']} more", "", "")
    if failures.row_count:
        shown.print(failures)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.4g} %"


def _say(text: str) -> None:
    console().print(text, highlight=False, markup=False, soft_wrap=True)

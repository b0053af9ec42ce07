"""`loraplex route set|show|ramp|promote|rollback|rm|eval`: aliases that are policies, on a running server."""

import json
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from loraplex.cli import evaluations
from loraplex.cli.client import request
from loraplex.cli.failures import UsageError
from loraplex.cli.output import Json, console, print_json

app = typer.Typer(no_args_is_help=True, help="Aliases that split, shadow and guard traffic.", rich_markup_mode=None)
app.add_typer(evaluations.app, name="eval")

Alias = Annotated[str, typer.Argument(help="Name of the route.")]


def _path(alias: str, below: str = "") -> str:
    return f"/v1/routes/{quote(alias, safe='')}{below}"


@app.command("set")
def set_route(
    alias: Alias,
    targets: Annotated[list[str] | None, typer.Argument(help="MODEL or MODEL=WEIGHT, as sql@3=90 sql@4=10.")] = None,
    sticky_by: Annotated[str, typer.Option(help="user, api_key, header:NAME or none.")] = "none",
    fallback: Annotated[list[str] | None, typer.Option(help="Answers when a target cannot; repeatable.")] = None,
    shadow: Annotated[list[str] | None, typer.Option(help="Is asked, too, and not heard; repeatable.")] = None,
    guard: Annotated[str | None, typer.Option(help="Baseline target; others that fail beside it go.")] = None,
    gate: Annotated[float | None, typer.Option(help="What a target must pass of the evaluation set, 0 to 1.")] = None,
    file: Annotated[Path | None, typer.Option(help="The whole route as JSON, with rules and limits, instead.")] = None,
    json_output: Json = False,
) -> None:
    """Make an alias mean weighted targets; what it meant before is in its history."""
    if (file is None) == (not targets):
        raise UsageError("Name the targets, as sql@3=90 sql@4=10, or give --file, one of the two.")
    if file is not None:
        document = _read(file)
    else:
        document = {
            "targets": [_target(text) for text in targets or ()],
            "sticky_by": sticky_by,
            "fallback": fallback or [],
            "shadow": shadow or [],
            "guard": {"baseline": guard} if guard else None,
            "gate": None if gate is None else {"min_pass": gate},
        }
    _show(request("PUT", _path(alias), json=document), json_output)


@app.command()
def show(
    alias: Annotated[str | None, typer.Argument(help="Name of the route. [default: all]")] = None,
    window: Annotated[float, typer.Option(help="Seconds to look back.")] = 300,
    json_output: Json = False,
) -> None:
    """Show a route and what its targets do, or all routes."""
    if alias is not None:
        _show(request("GET", _path(alias), params={"window": window}), json_output)
        return
    reply = request("GET", "/v1/routes")
    if json_output:
        print_json(reply)
        return
    table = Table("route", "revision", "who", "targets")
    for one in reply["data"]:
        shares = "  ".join(f"{model}={100 * share:g}%" for model, share in one["shares"].items())
        table.add_row(one["alias"], str(one["revision"]), one["who"], shares)
    console().print(table)


@app.command()
def ramp(
    alias: Alias,
    target: Annotated[str, typer.Argument(help="The target that grows.")],
    steps: Annotated[str, typer.Option(help="Per cent, one after the other.")] = "1,5,25,100",
    every: Annotated[float, typer.Option(help="Seconds for each step.")] = 600,
    json_output: Json = False,
) -> None:
    """Give a target more and more of the traffic, from now on."""
    try:
        percents = [float(step) for step in steps.split(",")]
    except ValueError as error:
        raise UsageError(f"--steps {steps!r} is no list of per cents, as 1,5,25,100.") from error
    body = {"target": target, "steps": percents, "every": every}
    _show(request("POST", _path(alias, "/ramp"), json=body), json_output)


@app.command()
def promote(
    alias: Alias, target: Annotated[str, typer.Argument(help="The target that gets all.")], json_output: Json = False
) -> None:
    """Send everything to one target, but what rules lead elsewhere."""
    _show(request("POST", _path(alias, "/promote"), json={"target": target}), json_output)


@app.command()
def rollback(
    alias: Alias,
    to: Annotated[int | None, typer.Option(help="Revision to go to. [default: the one before]")] = None,
    json_output: Json = False,
) -> None:
    """Make an earlier revision of a route hold again."""
    body = {} if to is None else {"revision": to}
    _show(request("POST", _path(alias, "/rollback"), json=body), json_output)


@app.command()
def rm(alias: Alias, json_output: Json = False) -> None:
    """Delete a route; running requests finish."""
    reply = request("DELETE", _path(alias))
    if json_output:
        print_json(reply)
    else:
        console().print(f"deleted the route {reply['alias']}", highlight=False, soft_wrap=True)


def _target(text: str) -> dict[str, Any]:
    model, equals, weight = text.partition("=")
    try:
        return {"model": model, "weight": float(weight) if equals else 1.0}
    except ValueError as error:
        raise UsageError(f"{weight!r} in {text!r} is no weight. Write targets as sql@3=90 sql@4=10.") from error


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON: {error}.") from error


def _show(reply: dict[str, Any], json_output: bool) -> None:
    if json_output:
        print_json(reply)
        return
    out = console()
    facts = f"revision {reply['revision']} by {reply['who']}, sticky by {reply['sticky_by']}"
    out.print(f"{reply['alias']}  {facts}", highlight=False, markup=False, soft_wrap=True)
    seen = {one["model"]: one for one in reply.get("observed", ())}
    columns = ("observed", "requests", "failed", "TTFT p50 / p95", "between p50 / p95") if seen else ()
    table = Table("target", "share", *columns)
    for model, share in reply["shares"].items():
        one = seen.get(model)
        table.add_row(model, _percent(share), *(_observed(one) if one else ()))
    out.print(table)
    for name in ("rules", "fallback", "shadow", "ramp", "guard", "gate"):
        if reply[name]:
            out.print(f"  {name}: {json.dumps(reply[name])}", highlight=False, markup=False, soft_wrap=True)


def _observed(one: dict[str, Any]) -> tuple[str, ...]:
    share = one["observed_share"]
    failed = one["failed"] + one["unavailable"]
    times = [f"{_ms(one[name]['p50'])} / {_ms(one[name]['p95'])}" for name in ("ttft", "inter_token")]
    return "" if share is None else _percent(share), str(one["requests"]), str(failed), *times


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.3g} ms"

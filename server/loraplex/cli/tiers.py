"""`loraplex pin`, `unpin`, `prefetch`, `tiers`: what stands where in a running server."""

from typing import Annotated, Any

import typer
from rich.table import Table

from loraplex.cli.client import path_of, request
from loraplex.cli.output import Json, console, print_json

Model = Annotated[str, typer.Argument(help="name or name@version")]


def pin(name: Model, json_output: Json = False) -> None:
    """Keep an adapter in RAM, over restarts; a name's pin follows it to later versions."""
    reply = request("POST", path_of(name, "/pin"))
    _say(reply, f"{name} is pinned: {reply['id']}, {reply['ram_bytes']} bytes in RAM", json_output)


def unpin(name: Model, json_output: Json = False) -> None:
    """Let an adapter leave RAM again."""
    reply = request("POST", path_of(name, "/unpin"))
    _say(reply, f"unpinned {', '.join(reply['unpinned'])}", json_output)


def prefetch(
    name: Model,
    to: Annotated[str, typer.Option(help="ram or device.")] = "ram",
    json_output: Json = False,
) -> None:
    """Bring an adapter into RAM, or on to the device, ahead of its first request."""
    reply = request("POST", path_of(name, "/prefetch"), json={"to": to})
    _say(reply, f"{reply['id']} is in the tier {reply['tier']}", json_output)


def tiers(
    tier: Annotated[str | None, typer.Option(help="device, ram or disk. [default: all]")] = None,
    limit: Annotated[int, typer.Option(help="Rows to show.", min=1, max=1000)] = 100,
    json_output: Json = False,
) -> None:
    """Show what stands where: sizes, leases, hits, last use, why it left RAM."""
    reply = request("GET", "/v1/tiers", params={"limit": limit} | ({"tier": tier} if tier else {}))
    if json_output:
        print_json(reply)
        return
    ram, device = reply["ram"], reply["device"]
    out = console()
    out.print(
        f"RAM {ram['bytes']} of {ram['budget']} bytes, {ram['adapters']} adapters, {ram['pinned']} pinned; device "
        f"{device['used']} of {device['places']} places",
        highlight=False,
        soft_wrap=True,
    )
    table = Table("id", "tier", "disk", "RAM", "leases", "pinned", "hits", "last use", "left RAM")
    for row in reply["data"]:
        values = (row["id"], row["tier"], row["disk_bytes"], row["ram_bytes"], row["leases"])
        table.add_row(*map(str, values), "yes" if row["pinned"] else "", str(row["hits"]), _ago(row), _left(row))
    out.print(table)
    if reply["total"] > len(reply["data"]):
        out.print(f"{len(reply['data'])} of {reply['total']}", highlight=False)


def _ago(row: dict[str, Any]) -> str:
    return "" if row["last_use"] is None else f"{row['last_use']:.1f} s ago"


def _left(row: dict[str, Any]) -> str:
    left = row["evicted"]
    return "" if left is None else f"{left['why']}, {left['seconds_ago']:.1f} s ago"


def _say(reply: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(reply)
    else:
        console().print(text, highlight=False, markup=False, soft_wrap=True)

"""`loraplex push`, `ls`, `rm`, `rollback`, `history`: clients of a running server (LORAPLEX_URL, LORAPLEX_API_KEY)."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from loraplex.cli.client import listed, path_of, request
from loraplex.cli.failures import UsageError
from loraplex.cli.output import Json, console, print_json, progress
from loraplex.lora.files import FILES, REQUIRED

_MAX_LIMIT = 1000  # the API's


def push(
    path: Annotated[Path, typer.Argument(help="A PEFT folder.")],
    name: Annotated[str | None, typer.Option(help="Name of the adapter. [default: the folder's]")] = None,
    parent: Annotated[str | None, typer.Option(help="name or name@version of the adapter it was trained on.")] = None,
    json_output: Json = False,
) -> None:
    """Upload an adapter with its chat template, tokenizer and serving profile; it is usable when this returns."""
    for required in REQUIRED:
        if not (path / required.name).is_file():
            raise UsageError(f"{path / required.name} does not exist. Name a folder that PEFT's save_pretrained wrote.")
    found = [file for file in FILES if (path / file.name).is_file()]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with ExitStack() as stack:
        bar = stack.enter_context(progress(*columns))
        total = sum((path / file.name).stat().st_size for file in found)
        task = bar.add_task(f"push {path.name}", total=total)
        parts = {
            file.part: (file.name, _Counted(stack.enter_context(open(path / file.name, "rb")), bar, task))
            for file in found
        }
        data = {"name": name or path.resolve().name} | ({} if parent is None else {"parent": parent})
        reply = request("POST", "/v1/adapters", data=data, files=parts)
    if json_output:
        print_json(reply)
        return
    news = "" if reply["is_new"] else "  (no new version: these very files are there)"
    if reply["previous"] not in (None, reply["id"]):
        news += f"  {reply['name']} meant {reply['previous']} before"
    facts = f"rank {reply['rank']}, {reply['num_modules']} modules, {reply['bytes']} bytes"
    out = console()
    out.print(f"{reply['id']}  {facts}{news}", highlight=False, soft_wrap=True)
    if reply["parent"]:
        out.print(f"  the sum of {' + '.join(reply['path'])}", highlight=False, markup=False, soft_wrap=True)
    sent = [file.name for file in found if file not in REQUIRED]
    if sent:
        out.print(f"  sent with it: {', '.join(sent)}", highlight=False, markup=False, soft_wrap=True)
    for note in reply["notes"]:
        out.print(f"  note: {note}", highlight=False, markup=False, soft_wrap=True)


def ls(json_output: Json = False) -> None:
    """List the adapters of the server."""
    reply = listed("/v1/adapters")
    if json_output:
        print_json(reply)
        return
    table = Table("name", "version", "parent", "rank", "modules", "bytes", "tier", "source", "state")
    for row in reply["data"]:
        values = (
            row["name"],
            row["version"],
            row["parent"] or "",
            row["rank"],
            row["num_modules"],
            row["bytes"],
            row["tier"],
            row["source"],
            row["state"],
        )
        table.add_row(*map(str, values))
    console().print(table)


def rm(name: Annotated[str, typer.Argument(help="name or name@version")], json_output: Json = False) -> None:
    """Delete an adapter or one version of it; running requests finish."""
    reply = request("DELETE", path_of(name))
    if json_output:
        print_json(reply)
    else:
        meant = f"; {reply['name']} means {reply['current']} now" if reply["current"] else ""
        console().print(f"deleted {', '.join(reply['deleted'])}{meant}", highlight=False, soft_wrap=True)


def rollback(
    name: Annotated[str, typer.Argument(help="Name of the adapter.")],
    to: Annotated[int | None, typer.Option(help="Version to go to. [default: the one before the last push]")] = None,
    json_output: Json = False,
) -> None:
    """Make a name mean an earlier version again; running requests finish on theirs."""
    meant, at, version = name.partition("@")
    if at:
        raise UsageError(f"Roll back a name, not {name!r}: loraplex rollback {meant} --to {version or 'N'}.")
    body = {} if to is None else {"version": to}
    reply = request("POST", path_of(name, "/rollback"), json=body)
    if json_output:
        print_json(reply)
    elif reply["previous"] == reply["id"]:
        console().print(f"{name} means {reply['id']} already", highlight=False, soft_wrap=True)
    else:
        console().print(f"{name} means {reply['id']} now, before {reply['previous']}", highlight=False, soft_wrap=True)


def history(
    name: Annotated[str | None, typer.Argument(help="Name of the adapter. [default: all]")] = None,
    limit: Annotated[int, typer.Option(help="Changes to show, the latest.", min=1, max=_MAX_LIMIT)] = 50,
    json_output: Json = False,
) -> None:
    """Show who changed an adapter, when and how, latest first."""
    path = "/v1/audit" if name is None else path_of(name, "/history")
    reply = request("GET", path, params={"limit": limit})
    if json_output:
        print_json(reply)
        return
    shown, total = len(reply["data"]), reply["total"]
    caption = None
    if shown < total:
        caption = f"the latest {shown} of {total}" + ("; --limit shows more" if limit < _MAX_LIMIT else "")
    table = Table("at", "who", "what", "version", "before", "since", caption=caption, caption_justify="left")
    for row in reply["data"]:
        version = row["name"] if row["version"] is None else f"{row['name']}@{row['version']}"
        values = (row["at"], row["who"], row["action"], version, _meant(row.get("was")), _meant(row.get("now")))
        table.add_row(*map(escape, values))
    console().print(table)


def _meant(what: str | dict[str, Any] | None) -> str:
    """What a name meant: a version, or the targets of a route; or its evaluation set."""
    if isinstance(what, dict) and "cases" in what:
        return f"{what['cases']} cases ({what['digest'][:8]})"
    if isinstance(what, dict):
        return " ".join(f"{one['model']}={one['weight']:g}" for one in what["targets"])
    return what or ""


class _Counted:
    """A file that moves a progress bar as it is read."""

    def __init__(self, file, progress: Progress, task):
        self._file, self._progress, self._task = file, progress, task

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._progress.advance(self._task, len(data))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

"""`loraplex pull`: an adapter's files out of a running server."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loraplex.cli.client import download, path_of, request
from loraplex.cli.failures import CommandFailed, NotDone, UsageError
from loraplex.cli.output import Json, console, print_json, progress
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest
from loraplex.lora.files import FILES


def pull(
    name: Annotated[str, typer.Argument(help="name or name@version")],
    out: Annotated[Path, typer.Argument(help="Folder to make; it may be there if it is empty.")],
    version: Annotated[int | None, typer.Option(help="Version. [default: what the name means]", min=1)] = None,
    json_output: Json = False,
) -> None:
    """Download an adapter's files into a PEFT folder, checked against its digest."""
    if version is not None and "@" in name:
        raise UsageError(f"{name!r} names a version, and --version does, too. Give one of the two.")
    model = name if version is None else f"{name}@{version}"
    described = request("GET", path_of(model))
    with fresh_folder(out) as folder, progress_bar() as bar:
        pull_version(described, folder, bar)
    if json_output:
        print_json({"id": described["id"], "digest": described["digest"], "folder": str(out)})
    else:
        console().print(f"{described['id']} -> {out}", highlight=False, markup=False, soft_wrap=True)


def pull_version(described: dict[str, Any], folder: Path, bar: Progress) -> None:
    """The files of the version that GET /v1/adapters described, into `folder`. Raises NotDone when they are not
    those of its digest."""
    task = bar.add_task(f"pull {described['id']}", total=described["bytes"])
    parts = {file.name: file.part for file in FILES}
    sums = {}
    for file_name in described["files"]:
        if file_name not in parts:
            raise NotDone(f"The server names a file that this release does not know: {file_name[:64]!r}.")
        with download(path_of(described["id"], f"/files/{parts[file_name]}")) as reply:
            sums[file_name] = _write(folder / file_name, _watched(reply.iter_bytes(), bar, task))
    if adapter_digest(sums[CONFIG_NAME], sums[WEIGHTS_NAME], sums) != described["digest"]:
        raise NotDone(f"What arrived is not {described['id']}: its digest differs. Pull it again.")


def progress_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return progress(*columns)


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """A new folder that becomes `out` at the end of the block, whole, or is gone. Raises UsageError,
    CommandFailed."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already. Name a new or an empty folder; nothing is written over.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as cause:
        raise UsageError(f"{out} cannot be made: {cause.strerror or cause}.") from cause
    try:
        yield folder
        folder.chmod(0o755)
        os.replace(folder, out)
    except OSError as cause:
        raise CommandFailed(f"{out} cannot be written: {cause.strerror or cause}.") from cause
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watched(chunks: Iterable[bytes], bar: Progress, task: Any) -> Iterator[bytes]:
    for chunk in chunks:
        bar.advance(task, len(chunk))
        yield chunk


def _write(path: Path, chunks: Iterable[bytes]) -> bytes:
    sha = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            sha.update(chunk)
            file.write(chunk)
    return sha.digest()

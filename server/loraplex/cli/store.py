"""`loraplex export`, `import`: all adapters of a running server as a folder or a tar file, and into another one.

    manifest.json                 names, versions, digests, parents, what each name means, and what was left out
    NAME@N/adapter_config.json …  the files of a version

Through the server's own routes: what comes in is checked and proven there as every upload is.
"""

import json
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from loraplex.cli.client import listed, path_of, request
from loraplex.cli.failures import LeftOut, NotDone, UsageError
from loraplex.cli.output import Json, console, print_json
from loraplex.cli.taking import fresh_folder, progress_bar, pull_version
from loraplex.errors import InvalidRequest
from loraplex.lora.files import FILES
from loraplex.routing.names import parse_model

MANIFEST = "manifest.json"
FORMAT = 2
FORMATS = (1, FORMAT)
"""Of 1 no version has a parent."""


def export(
    out: Annotated[Path, typer.Argument(help="Folder to make, or a file that ends in .tar.")],
    json_output: Json = False,
) -> None:
    """Download every adapter with all its versions.

    Versions that the server cannot give are left out and named. Exit code 1: there are some.
    """
    left_out = LeftOut()
    if out.suffix == ".tar":
        with tempfile.TemporaryDirectory(prefix="loraplex-export-", dir=_parent(out)) as scratch:
            folder = Path(scratch) / "store"
            manifest = _export(folder, left_out)
            packed = Path(scratch) / "store.tar"
            with tarfile.open(packed, "x") as archive:
                for path in sorted(folder.rglob("*")):
                    archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
            if out.exists():
                raise UsageError(f"{out} is there already; nothing is written over.")
            packed.rename(out)
    else:
        manifest = _export(out, left_out)
    count = sum(len(adapter["versions"]) for adapter in manifest["adapters"])
    if json_output:
        print_json(manifest)
    else:
        names = len(manifest["adapters"])
        console().print(f"{count} versions of {names} adapters -> {out}", highlight=False, markup=False, soft_wrap=True)
    left_out.end()


def import_(
    path: Annotated[Path, typer.Argument(help="What `loraplex export` made.")],
    json_output: Json = False,
) -> None:
    """Push every version of an export, oldest first and after its parent, and make each name mean what it meant.

    Numbers may differ: a server counts its own. Versions that are there already are not made again. Versions that the
    server refuses, and those that stand on them, are left out and named. Exit code 1: there are some.
    """
    new: dict[str, dict[str, Any]] = {}  # by what it was
    left_out = LeftOut()
    with _opened(path) as (folder, manifest):
        base = request("GET", "/v1/models")["data"][0]["id"]
        for name, version in _parents_first(manifest):
            was, parent = version["folder"], version.get("parent")
            with left_out.unless_done(was):
                if parent is not None and parent not in new:
                    raise NotDone(f"It stands on {parent}, which is not in the export or was left out.")
                new[was] = _push(name, folder / was, base if parent is None else new[parent]["id"])
                if not json_output:
                    console().print(f"{was} -> {new[was]['id']}", highlight=False, markup=False)
        for adapter in manifest["adapters"]:
            with left_out.unless_done(adapter["name"]):
                _mean(adapter, new)
    if json_output:
        rows = [{"from": was, "to": now["id"]} for was, now in new.items()]
        print_json({"object": "list", "data": rows, "left_out": left_out.rows})
    left_out.end()


def _export(out: Path, left_out: LeftOut) -> dict[str, Any]:
    with fresh_folder(out) as folder, progress_bar() as bar:
        adapters = []
        for name in [row["name"] for row in listed("/v1/adapters")["data"]]:
            with left_out.unless_done(name):
                described = request("GET", path_of(name))
                numbers = sorted(set(described["versions"]) - set(described["incompatible"]))
                versions = list(_pulled([f"{name}@{number}" for number in numbers], folder, bar, left_out))
                if versions:
                    adapters.append({"name": name, "current": described["current"], "versions": versions})
        manifest = {"format": FORMAT, "adapters": adapters, "left_out": left_out.rows}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        return manifest


def _pulled(ids: Sequence[str], folder: Path, bar: Progress, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """Download versions into folders below `folder`; the manifest's rows of those that arrived."""
    for model in ids:
        with left_out.unless_done(model):
            version = request("GET", path_of(model))
            with fresh_folder(folder / model) as files:
                pull_version(version, files, bar)
            row = {"version": version["version"], "digest": version["digest"], "parent": version["parent"]}
            yield {**row, "folder": model}


def _mean(adapter: dict[str, Any], new: dict[str, dict[str, Any]]) -> None:
    """Make a name mean what it meant. Raises NotDone when that was left out."""
    meant = f"{adapter['name']}@{adapter['current']}"
    if meant in new:
        request("POST", path_of(adapter["name"], "/rollback"), json={"version": new[meant]["version"]})
    elif adapter["current"] is not None and any(version["folder"] in new for version in adapter["versions"]):
        raise NotDone(f"It meant {meant}, which was left out, and means the newest of its versions that were not.")


def _parents_first(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The versions with their names: those of a name in their order, and each after its parent if that is there.
    Raises UsageError when there is no such order."""
    left = {adapter["name"]: list(adapter["versions"]) for adapter in manifest["adapters"]}
    awaited = {version["folder"] for versions in left.values() for version in versions}
    while awaited:
        before = len(awaited)
        for name, versions in left.items():
            while versions and versions[0].get("parent") not in awaited:
                awaited.discard(versions[0]["folder"])
                yield name, versions.pop(0)
        if len(awaited) == before:
            raise UsageError(f"Parents in the export's {MANIFEST} form a circle: {', '.join(sorted(awaited))}.")


def _push(name: str, folder: Path, parent: str) -> dict[str, Any]:
    with ExitStack() as stack:
        parts = {
            file.part: (file.name, stack.enter_context(open(folder / file.name, "rb")))
            for file in FILES
            if (folder / file.name).is_file()
        }
        return request("POST", "/v1/adapters", data={"name": name, "parent": parent}, files=parts)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folder of an export and its manifest. Raises UsageError."""
    if path.is_dir():
        yield path, _manifest(path)
        return
    with tempfile.TemporaryDirectory(prefix="loraplex-import-") as scratch:
        folder = Path(scratch)
        try:
            with tarfile.open(path, "r:") as archive:
                _extract(archive, folder)
        except (OSError, tarfile.TarError) as cause:
            raise UsageError(
                f"{path} cannot be read as an export; name a folder or an uncompressed tar file that 'loraplex export' "
                "made."
            ) from cause
        yield folder, _manifest(folder)


def _extract(archive: tarfile.TarFile, folder: Path) -> None:
    """The regular files that an export has, by their own names; anything else is left out."""
    known = {file.name for file in FILES}
    for member in archive:
        top, _, name = member.name.partition("/")
        is_file = name in known and _is_version(top)
        data = archive.extractfile(member) if member.isreg() and (is_file or member.name == MANIFEST) else None
        if data is not None:
            target = folder / member.name
            target.parent.mkdir(exist_ok=True)
            with open(target, "xb") as file:
                while chunk := data.read(1 << 20):
                    file.write(chunk)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        is_known = manifest["format"] in FORMATS
        folders = [version["folder"] for adapter in manifest["adapters"] for version in adapter["versions"]]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise UsageError(f"{folder / MANIFEST} cannot be read; name what 'loraplex export' made.") from cause
    if not is_known or not all(map(_is_version, folders)):
        raise UsageError(f"{folder / MANIFEST} is of another format than this release reads ({FORMAT}).")
    return manifest


def _is_version(text: str) -> bool:
    """Whether it is name@number, and so safe as a folder's name."""
    try:
        return parse_model(text).version is not None
    except InvalidRequest:
        return False


def _parent(out: Path) -> Path:
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise UsageError(f"{out} cannot be made: {cause.strerror or cause}.") from cause
    return out.absolute().parent

"""`loraplex export`, `import`: all adapters of a running server as a folder or a tar file, and into another one.

    manifest.json                 names, versions, digests, parents, and what each name means
    NAME@N/adapter_config.json …  the files of a version

Through the server's own routes: what comes in is checked and proven there as every upload is.
"""

import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from loraplex.cli.client import Json, ServerRefused, path_of, print_json, request
from loraplex.cli.taking import fresh_folder, progress_bar, pull_version
from loraplex.errors import InvalidRequest
from loraplex.lora.files import FILES
from loraplex.routing.names import parse_model

MANIFEST = "manifest.json"
FORMAT = 2
FORMATS = (1, FORMAT)
"""Of 1 no version has a parent."""
_PAGE = 1000


def export(
    out: Annotated[Path, typer.Argument(help="Folder to make, or a file that ends in .tar.")],
    json_output: Json = False,
) -> None:
    """Download every adapter with all its versions."""
    if out.suffix == ".tar":
        with tempfile.TemporaryDirectory(prefix="loraplex-export-", dir=_parent(out)) as scratch:
            folder = Path(scratch) / "store"
            manifest = _export(folder)
            packed = Path(scratch) / "store.tar"
            with tarfile.open(packed, "x") as archive:
                for path in sorted(folder.rglob("*")):
                    archive.add(path, path.relative_to(folder).as_posix(), recursive=False)
            if out.exists():
                raise ServerRefused(f"{out} is there already; nothing is written over.")
            packed.rename(out)
    else:
        manifest = _export(out)
    count = sum(len(adapter["versions"]) for adapter in manifest["adapters"])
    if json_output:
        print_json(manifest)
    else:
        names = len(manifest["adapters"])
        Console().print(f"{count} versions of {names} adapters -> {out}", highlight=False, markup=False, soft_wrap=True)


def import_(
    path: Annotated[Path, typer.Argument(help="What `loraplex export` made.")],
    json_output: Json = False,
) -> None:
    """Push every version of an export, oldest first and after its parent, and make each name mean what it meant.

    Numbers may differ: a server counts its own. Versions that are there already are not made again.
    """
    new: dict[str, dict[str, Any]] = {}  # by what it was
    with _opened(path) as (folder, manifest):
        base = request("GET", "/v1/models")["data"][0]["id"]
        for name, version in _parents_first(manifest):
            parent = version.get("parent")
            pushed = _push(name, folder / version["folder"], base if parent is None else new[parent]["id"])
            new[version["folder"]] = pushed
            if not json_output:
                Console().print(f"{version['folder']} -> {pushed['id']}", highlight=False, markup=False)
        for adapter in manifest["adapters"]:
            wanted = new.get(f"{adapter['name']}@{adapter['current']}")
            if wanted is not None:
                request("POST", path_of(adapter["name"], "/rollback"), json={"version": wanted["version"]})
    if json_output:
        print_json({"object": "list", "data": [{"from": was, "to": now["id"]} for was, now in new.items()]})


def _export(out: Path) -> dict[str, Any]:
    with fresh_folder(out) as folder, progress_bar() as progress:
        adapters = []
        for name in _names():
            described = request("GET", path_of(name))
            versions = []
            for number in sorted(set(described["versions"]) - set(described["incompatible"])):
                version = request("GET", path_of(f"{name}@{number}"))
                (folder / version["id"]).mkdir()
                pull_version(version, folder / version["id"], progress)
                row = {"version": number, "digest": version["digest"], "parent": version["parent"]}
                versions.append({**row, "folder": version["id"]})
            if versions:
                adapters.append({"name": name, "current": described["current"], "versions": versions})
        manifest = {"format": FORMAT, "adapters": adapters}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
        return manifest


def _names() -> Iterator[str]:
    offset = 0
    while True:
        page = request("GET", "/v1/adapters", params={"offset": offset, "limit": _PAGE})
        yield from (row["name"] for row in page["data"])
        offset += len(page["data"])
        if not page["data"] or offset >= page["total"]:
            return


def _parents_first(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The versions with their names: those of a name in their order, and each after its parent. Raises ServerRefused
    when there is no such order."""
    left = {adapter["name"]: list(adapter["versions"]) for adapter in manifest["adapters"]}
    done: set[str | None] = {None}
    while any(left.values()):
        before = len(done)
        for name, versions in left.items():
            while versions and versions[0].get("parent") in done:
                done.add(versions[0]["folder"])
                yield name, versions.pop(0)
        if len(done) == before:
            stuck = ", ".join(versions[0]["folder"] for versions in left.values() if versions)
            raise ServerRefused(f"The export lacks what these stand on: {stuck}. Export the whole store again.")


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
    """The folder of an export and its manifest. Raises ServerRefused."""
    if path.is_dir():
        yield path, _manifest(path)
        return
    with tempfile.TemporaryDirectory(prefix="loraplex-import-") as scratch:
        folder = Path(scratch)
        try:
            with tarfile.open(path, "r:") as archive:
                _extract(archive, folder)
        except (OSError, tarfile.TarError) as cause:
            raise ServerRefused(
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
        raise ServerRefused(f"{folder / MANIFEST} cannot be read; name what 'loraplex export' made.") from cause
    if not is_known or not all(map(_is_version, folders)):
        raise ServerRefused(f"{folder / MANIFEST} is of another format than this release reads ({FORMAT}).")
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
        raise ServerRefused(f"{out} cannot be made: {cause.strerror or cause}.") from cause
    return out.absolute().parent

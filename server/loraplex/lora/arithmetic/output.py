"""OutputFolder: a folder that is there whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraplex.errors import InvalidRequest, StorageFull

# With force only what has one of these is replaced: nobody's home.
_MARKS = ("adapter_config.json", "config.json")


@contextmanager
def output_folder(path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A new folder beside `path`, which becomes `path` when the block ends well, and vanishes when it does not.

    Raises InvalidRequest where something is there already (unless `force`, and it is a model or an adapter), or where
    `path` is one of the `inputs` or holds one; StorageFull for what the disk refuses.
    """
    path = path.absolute()
    _check(path, force, inputs)
    scratch = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex[:12]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        _sync(scratch)
        _put(scratch, path)
    except OSError as cause:
        raise StorageFull(
            f"{path} could not be written: {cause.strerror or cause}. Make room, or name another folder with --out."
        ) from cause
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    for one in inputs:
        if path.resolve() in (one.resolve(), *one.resolve().parents):
            raise InvalidRequest(f"{path} is, or holds, what is read ({one}). Name another folder with --out.")
    if not os.path.lexists(path):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        return
    if not force:
        raise InvalidRequest(f"{path} is there already. Name another folder with --out, or replace it with --force.")
    if path.is_symlink() or not any((path / mark).is_file() for mark in _MARKS):
        raise InvalidRequest(
            f"{path} is neither a model's folder nor an adapter's, so --force does not replace it. Name another folder "
            "with --out."
        )


def _put(scratch: Path, path: Path) -> None:
    if not path.exists():
        os.rename(scratch, path)
        return
    old = scratch.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(scratch, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

"""Folders that are there whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from loraplex.errors import InvalidRequest, StorageFull
from loraplex.lora.arithmetic.output import output_folder


def write(path: Path, text: str = "new", **options) -> None:
    with output_folder(path, **options) as folder:
        (folder / "config.json").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(text)


def test_it_appears_when_the_block_ends(tmp_path: Path):
    with output_folder(tmp_path / "deep" / "out") as folder:
        (folder / "config.json").write_text("new")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "config.json").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_it_vanishes_when_the_block_fails(tmp_path: Path):
    write(tmp_path / "out", "old")

    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("new")
        raise RuntimeError

    with pytest.raises(RuntimeError), output_folder(tmp_path / "out", force=True) as folder:
        fail(folder)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_replaced_by_force_only(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")  # an empty folder is in nobody's way
    with pytest.raises(InvalidRequest, match="--force"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_no_folder_of_other_things(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for name in ("home", "link"):
        with pytest.raises(InvalidRequest, match="does not replace it"):
            write(tmp_path / name, force=True)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


@pytest.mark.parametrize("out", ["base", ".", "base/../base"])
def test_an_input_is_never_the_output(tmp_path: Path, out: str):
    (tmp_path / "base").mkdir()
    with pytest.raises(InvalidRequest, match="what is read"):
        write(tmp_path / out, force=True, inputs=[tmp_path / "base"])


def test_a_full_disk_is_said(tmp_path: Path):
    with pytest.raises(StorageFull, match="No space left"), output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())

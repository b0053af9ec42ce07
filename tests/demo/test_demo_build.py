"""Where the build writes. What it trains is in test_train.py, and what it made in test_artifacts.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

import loraplex.demo
from loraplex.demo.build import Layout

DEMO = Path(loraplex.demo.__file__).parent


def test_a_checkout_is_written_where_the_demo_is_read(tmp_path: Path) -> None:
    layout = Layout.of_checkout(tmp_path)
    assert (layout.base / "config.json").is_file()
    assert (layout.adapters / "upper" / "adapter_config.json").is_file()
    assert layout.scores == DEMO / "scores.json"
    assert layout.work == tmp_path


def test_an_installation_is_left_alone(tmp_path: Path) -> None:
    installed = tmp_path / "site-packages" / "loraplex" / "demo"
    installed.mkdir(parents=True)
    with pytest.raises(typer.BadParameter, match="no checkout"):
        Layout.of_checkout(tmp_path, installed)


def test_another_folder_holds_all_of_it(tmp_path: Path) -> None:
    layout = Layout.under(tmp_path / "out", tmp_path)
    assert {layout.base.parent, layout.adapters.parent, layout.scores.parent} == {tmp_path / "out"}

"""The wheel: everything that an installed loraplex reads at run time is inside, and nothing else comes along."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """The names of the files in the wheel, built by the backend itself: no isolated environment, no network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (path,) = folder.glob("loraplex-*.whl")
    with zipfile.ZipFile(path) as archive:
        return frozenset(archive.namelist())


def files_below(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{path.relative_to(folder).as_posix()}"
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_demo_base_is_inside(wheel: frozenset[str]):
    expected = files_below(ROOT / "server" / "loraplex" / "demo" / "base", "loraplex/demo/base")
    assert "loraplex/demo/base/model.safetensors" in expected
    assert expected <= wheel


def test_the_adapters_are_where_the_demo_looks_first(wheel: frozenset[str]):
    expected = files_below(ROOT / "adapters", "loraplex/demo/adapters")
    assert sum(name.endswith("/adapter_model.safetensors") for name in expected) >= 3
    assert expected <= wheel


def test_migrations_and_types_are_inside(wheel: frozenset[str]):
    migrations = files_below(ROOT / "server" / "loraplex" / "lora" / "migrations", "loraplex/lora/migrations")
    assert len(migrations) >= 3
    assert {*migrations, "loraplex/py.typed"} <= wheel


def test_every_module_is_inside(wheel: frozenset[str]):
    modules = {name for name in files_below(ROOT / "server" / "loraplex", "loraplex") if name.endswith(".py")}
    assert modules <= wheel


def test_nothing_else_is_inside(wheel: frozenset[str]):
    foreign = {name for name in wheel if not name.startswith(("loraplex/", "loraplex-"))}
    assert not foreign
    assert not {name for name in wheel if "__pycache__" in name or name.endswith((".nbc", ".nbi"))}

"""The wheel: everything that an installed loraplex reads at run time is inside, nothing else comes along, and from an
environment of its own, outside the checkout, the demo meets its bars.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend itself: no isolated environment, no network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=60,
    )
    (path,) = folder.glob("loraplex-*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_file: Path) -> frozenset[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(wheel_file) as archive:
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


# -- installed ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new environment with the wheel in it.

    Its dependencies are this environment's, by a .pth file. The .pth files of a folder that is added so are not read:
    an editable loraplex stays invisible.
    """
    folder = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel_file)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run_installed(folder: Path, program: str, *arguments: str, home: Path) -> str:
    """What a program of the environment prints: with nothing of this process's environment, `home` as its home and
    current folder."""
    env = {"HOME": str(home), "PATH": os.defpath, "TMPDIR": str(home), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        [folder / "bin" / program, *arguments], cwd=home, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path):
    code = "import loraplex, loraplex.demo.paths as p; print(loraplex.__file__, p.BASE_FOLDER, p.adapters_folder())"
    paths = [Path(path) for path in run_installed(installed, "python", "-c", code, home=tmp_path).split()]
    assert len(paths) == 3
    assert all(path.exists() and path.is_relative_to(installed) for path in paths)


def test_the_installed_demo_meets_its_bars(installed: Path, tmp_path: Path):
    result = json.loads(run_installed(installed, "loraplex", "demo", "--json", "--prompts", "200", home=tmp_path))
    rows = result["adapters"]
    assert len(rows) >= 5
    for row in rows:
        assert row["prompts"] >= 200
        assert row["exact_match"] >= 0.95, row
        assert row["base_exact_match"] <= 0.30, row
    assert result["meets_bars"] is True
    assert result["max_distinct"] >= 5
    assert not list(tmp_path.glob("loraplex-demo-*")), "the demo leaves its data behind"

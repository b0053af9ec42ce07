"""The house: import floors, file sizes, and what must import on a bare machine."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "server" / "loraplex"
MAX_LINES = 500

# A room may import the rooms of lower floors, and its own. Rooms on one floor do not know each other.
FLOORS = {
    "cli": 7,
    "api": 6,
    "bench": 6,
    "service": 5,
    "serving": 4.5,
    "sources": 2.5,
    "text": 4.3,
    "engine": 4,
    "model": 3,
    "ops": 2,
    "lora": 2,
    "evaluation": 1,
    "routing": 1,
    "config": 1.5,
    "errors": 0,
}
# The demo's exam drives the service; its build is a program of its own. Both stand outside the server's floors.
OUTSIDE = {"demo", "__init__", "__main__"}
# What engine/ and model/ may know of lora/.
LORA_FOR_ENGINE = {"loraplex.lora.weights", "loraplex.lora.reader"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports_of(path: Path) -> list[str]:
    """Every loraplex module that `path` imports at run time, as dotted names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in found if name.startswith("loraplex")]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    room = room_of(path)
    if room in OUTSIDE:
        return
    for name in imports_of(path):
        target = name.split(".")[1] if "." in name else ""
        if target in ("", "__version__", room) or target not in FLOORS:
            if target in OUTSIDE - {"__init__"}:
                assert room == "cli", f"{path} imports the demo"
            continue
        assert FLOORS[target] < FLOORS[room], f"{room} imports {name}: an import points down only"
        if target == "lora" and room in ("engine", "model", "ops") and name != "loraplex.lora":
            is_allowed = name in LORA_FOR_ENGINE or name.rpartition(".")[0] in LORA_FOR_ENGINE
            assert is_allowed, f"{room} may know only {sorted(LORA_FOR_ENGINE)} of lora, not {name}"


def test_serving_has_no_circles():
    """Its files depend on each other in one direction, too."""
    graph = {
        path.stem: {name.split(".")[2] for name in imports_of(path) if name.startswith("loraplex.serving.")}
        for path in (PACKAGE / "serving").glob("*.py")
    }
    assert len(graph) > 10
    list(TopologicalSorter(graph).static_order())  # CycleError names the circle


@pytest.mark.parametrize("folder", ["server", "tests"])
def test_no_file_is_too_long(folder: str):
    for path in (ROOT / folder).rglob("*.py"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines; the limit is {MAX_LINES}"


def test_every_room_is_on_a_floor():
    rooms = {room_of(path) for path in modules()}
    assert rooms <= set(FLOORS) | OUTSIDE, f"unknown rooms: {rooms - set(FLOORS) - OUTSIDE}"


def run_python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "server")}, timeout=120)


def test_the_engine_imports_on_a_bare_machine():
    """ops, model, the engine's runner and bench step need no fastapi, pydantic, SQLAlchemy or cachetools."""
    run_python(
        "import sys\n"
        "for name in ('fastapi', 'pydantic', 'sqlalchemy', 'cachetools', 'structlog'): sys.modules[name] = None\n"
        "import loraplex.ops.torch_ops, loraplex.model.loader, loraplex.lora.weights, loraplex.bench.step\n"
    )


def test_bookkeeping_imports_no_torch():
    run_python(
        "import sys\n"
        "import loraplex.engine.scheduler, loraplex.engine.block_manager, loraplex.engine.waiting_queue\n"
        "import loraplex.routing.guard, loraplex.routing.document, loraplex.routing.router\n"
        "assert 'torch' not in sys.modules\n"
    )


def test_nothing_prints_but_the_command_line():
    for path in modules():
        if room_of(path) in ("cli", "demo"):
            continue
        calls = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not calls, f"{path} prints"


def test_the_confined_programs_start_light():
    """They start while a request waits; and what they do not import cannot be turned against the server."""
    run_python(
        "import sys\n"
        "import loraplex.text.template_worker, loraplex.text.tokenizer_reader\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'fastapi', 'sqlalchemy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )


def test_no_two_test_files_share_a_name():
    """pytest imports them by name alone."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), sorted({name for name in names if names.count(name) > 1})

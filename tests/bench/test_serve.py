"""`bench serve` and `bench bars` against a real server of a tiny random base, and their command lines."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fake_server import FakeServer
from typer.testing import CliRunner, Result

from loraplex.bench import bars as bars_module
from loraplex.bench import serve as serve_module
from loraplex.bench.arrivals import ClosedLoop
from loraplex.bench.bars import Bars, BarsSettings
from loraplex.bench.own_server import OwnServer
from loraplex.bench.popularity import Popularity
from loraplex.bench.random_model import letters_tokenizer, save_random_base
from loraplex.bench.serve import ServeBench, ServeSettings, Watcher
from loraplex.bench.server import BenchFailed
from loraplex.bench.tables import bars_notes, bars_table
from loraplex.cli import app

TINY = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_base(tmp_path_factory.mktemp("base") / "tiny", **TINY)


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    folder = tmp_path_factory.mktemp("server")
    arguments = [str(base), "--data-dir", str(folder / "data"), "--threads", "1", "--adapter-cache-bytes", "32MiB"]
    # a proof would leave in RAM what is to be cold
    with OwnServer([*arguments, "--device", "cpu", "--proof", "off"], folder) as running:
        yield running
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(running.url + "/health", trust_env=False)


@pytest.fixture
def run_app(monkeypatch: pytest.MonkeyPatch):
    for name in list(os.environ):
        if name.startswith("LORAPLEX_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(app, ["bench", *map(str, arguments)])

    return run


def settings(server: OwnServer, limits, **changes) -> ServeSettings:
    sizes = {"arrivals": ClosedLoop(4), "requests": 8, "prompt_tokens": 20, "output_tokens": 6, "limits": limits}
    return ServeSettings(**{"url": server.url, **sizes, **changes})


class Recorder(Watcher):
    def __init__(self):
        self.phases, self.steps, self.outcomes = [], 0, 0

    def phase(self, name, total):
        self.phases.append((name, total))

    def step(self):
        self.steps += 1

    def done(self, outcome):
        self.outcomes += 1


def test_prepare_and_a_mix_of_adapters(server: OwnServer, limits):
    watcher = Recorder()
    wanted = {"prepare": 5, "rank": 2, "popularity": Popularity("distinct"), "requests": 10}
    run = asyncio.run(ServeBench(settings(server, limits, **wanted), watcher).run())
    report = run.report
    assert run.is_good
    assert report["requests"] | {"errors": {}} == {
        "sent": 10,
        "good": 10,
        "failed": 0,
        "unfinished": 0,
        "errors": {},
        "answered_by_another_model": 0,
        "without_usage": 0,
        "shorter_than_asked": 0,
        "cold": 0,
        "models_seen": 5,
    }
    assert report["output_tokens"] == 60
    assert report["prompt_tokens"] == 200, "lengths are exact: the server names its tokens"
    assert report["cached_prompt_tokens"] == 0
    assert report["rates"]["ram_hit_rate"] == 1, "the warm-up loaded them"
    assert report["rates"]["generated_tokens"] == 60
    assert report["ttft_ms"]["count"] == len([outcome for outcome in run.result.outcomes if outcome.events]) > 0
    assert report["limits"]["mean_distinct_adapters"] > 1
    assert report["server"]["threads"] == 1
    assert watcher.phases == [("push adapters", 5), ("warm up", None), ("requests", 10)]
    assert watcher.steps == 15
    assert watcher.outcomes == 10
    rows = {row["name"]: row for row in httpx2.get(server.url + "/v1/adapters", trust_env=False).json()["data"]}
    assert set(rows) == {f"bench-{index:04d}" for index in range(5)}
    assert {row["rank"] for row in rows.values()} == {2}
    assert len({row["digest"] for row in rows.values()}) == 5


def test_preparing_again_pushes_only_what_is_missing(server: OwnServer, limits):
    def versions() -> dict[str, int]:
        rows = httpx2.get(server.url + "/v1/adapters", trust_env=False).json()["data"]
        return {row["name"]: row["version"] for row in rows}

    asyncio.run(ServeBench(settings(server, limits, prepare=2, rank=2, requests=1)).run())
    before = versions()
    asyncio.run(ServeBench(settings(server, limits, prepare=3, rank=2, requests=1)).run())
    after = versions()
    assert {name: after[name] for name in before} == before


def test_the_base_alone_over_chat_is_refused_without_a_template(server: OwnServer, limits):
    with pytest.raises(BenchFailed, match="template"):
        asyncio.run(ServeBench(settings(server, limits, adapters=0, is_chat=True)).run())


def test_cold_requests_load_from_disk(server: OwnServer, limits):
    names = {"prepare": 24, "rank": 3, "pattern": "cold-{}"}
    wanted = {**names, "cold_share": 0.5, "requests": 16, "popularity": Popularity("identical"), "warm_up": 1}
    run = asyncio.run(ServeBench(settings(server, limits, **wanted)).run())
    report = run.report
    assert report["requests"]["cold"] >= 3
    assert report["rates"]["adapter_loads"] == report["requests"]["cold"]
    # an answer of nothing but half characters or end tokens has no text, and so no first piece of it
    spoke = [outcome for outcome in run.result.outcomes if outcome.is_cold and outcome.events]
    assert report["requests"]["failed"] == 0
    assert report["ttft_cold_ms"]["count"] == len(spoke) > 0


def test_adapters_that_are_not_there_are_named(server: OwnServer, limits):
    with pytest.raises(BenchFailed, match=r"'none-0' among them.*--prepare 3"):
        asyncio.run(ServeBench(settings(server, limits, adapters=3, pattern="none-{}")).run())
    with pytest.raises(BenchFailed, match="same name twice"):
        asyncio.run(ServeBench(settings(server, limits, adapters=3, pattern="none")).run())


def test_another_server_than_loraplex(run_app, limits, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(serve_module, "measure_limits", lambda *_: limits)
    with FakeServer(models=("good", "other")) as fake:
        asked = ("--url", fake.url, "--model", "good", "--clients", 2, "--requests", 4, "--output-tokens", 2)
        done = run_app("serve", *asked, "--json", "--base", base, "--threads", 1, "--plot", tmp_path / "p.svg")
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout)
        assert report["rates"] is None
        assert not report["server"]["is_loraplex"]
        assert report["limits"]["ttft_ms"] > 0
        assert (tmp_path / "p.svg").exists()
        done = run_app("serve", *asked)
        assert "4 requests in" in done.stdout
        assert "no limits: the base's folder is not known" in done.stdout
        done = run_app("serve", *asked, "--prepare", 2, "--base", base)
        assert isinstance(done.exception, BenchFailed)
        assert "no loraplex server" in done.exception.message


def test_errors_are_shown_and_the_exit_code_says_so(run_app):
    with FakeServer() as fake:
        asked = ("--url", fake.url, "--model", "good", "--model", "broken", "--popularity", "distinct", "--warm-up", 1)
        done = run_app("serve", *asked, "--clients", 2, "--requests", 4, "--output-tokens", 2)
    assert done.exit_code == 1
    assert "ERROR 2 × RemoteProtocolError" in done.stdout
    assert "2 requests in" in done.stdout


def test_ctrl_c_shows_what_there_is(run_app):
    with FakeServer() as fake:

        def interrupt() -> None:
            deadline = time.monotonic() + 20
            while len(fake.seen) < 8 and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        asked = ("--url", fake.url, "--model", "good", "--clients", 2, "--requests", 500, "--json")
        done = run_app("serve", *asked, "--output-tokens", 3)
        thread.join()
    assert done.exit_code == 130, done.output
    report = json.loads(done.stdout)
    assert report["is_interrupted"]
    assert 0 < report["requests"]["good"] < 20
    assert report["requests"]["unfinished"] <= 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("serve", "--popularity", "zap"), "--popularity 'zap'"),
        (("serve", "--plot", "x.nothing"), "known are"),
        (("step", "--batches", "0"), "--batches '0'"),
        (("step", "--adapters", "0,merge"), "--adapters '0,merge'"),
        (("serve", "--url", "http://127.0.0.1:9"), "No server answers"),
    ],
)
def test_wrong_options_are_named(run_app, arguments: tuple[str, ...], says: str):
    done = run_app(*arguments)
    assert done.exception is not None
    assert says in str(done.exception)


def test_a_server_that_does_not_start_says_why(tmp_path: Path):
    with pytest.raises(BenchFailed, match=r"exit code 2.*not a folder"), OwnServer([str(tmp_path / "no")], tmp_path):
        pass


def test_bars(server: OwnServer, limits, monkeypatch: pytest.MonkeyPatch):
    """The server that runs already stands in for those that it would start."""
    started = []

    @contextmanager
    def own_server(arguments, folder, cores):
        assert Path(arguments[0]).is_dir()
        started.append(arguments)
        yield server

    monkeypatch.setattr(bars_module, "OwnServer", own_server)
    sizes = {"rounds": 1, "requests": 4, "repeats": 1, "clients": 2, "adapters": 3, "many": 12}
    shown = []
    result = Bars(BarsSettings(**sizes, shape=TINY), shown.append, limits).run()
    assert result["errors"] == []
    assert len(started) == 2
    assert started[1][started[1].index("--adapter-cache-bytes") + 1] == str(
        100 * 16 * 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    )
    by_name = {bar["bar"]: bar for bar in result["bars"]}
    assert len(by_name) == len(result["bars"]) == 18
    assert by_name["LoRA ops in a base-only step"]["is_met"] is True
    assert all(bar["measured"] is not None for bar in by_name.values())
    few, many = (result["serve"][name][0]["tokens_per_second"] for name in ("few", "many"))
    assert by_name["HTTP 12 adapters, Zipf 1.0 / 8 adapters"]["measured"] == pytest.approx(many / few)
    assert {name: len(runs) for name, runs in result["serve"].items()} == dict.fromkeys(
        ("mix", "base", "one_client", "few", "many"), 1
    )
    assert result["serve"]["mix"][0]["requests"]["models_seen"] == 3
    assert json.loads(json.dumps(result))["bars"] == result["bars"]
    assert bars_table(result).row_count == 18
    assert "another machine" in bars_notes(result)[1]
    assert "bench serve: mix, 1 of 1" in shown


def test_tokens_are_texts_of_their_own():
    tokenizer = letters_tokenizer(1200)
    assert len(tokenizer) == 1200
    texts = [tokenizer.decode([index]) for index in range(257, 1200)]
    assert len(set(texts)) == len(texts)
    assert all(text.isalpha() for text in texts)

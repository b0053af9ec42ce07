"""One server's three tiers in one thread: the real service, catalogue, store, registry, engine and pool, whose steps,
loads, clock and disk are a test's to move. Two of its kind may share a folder."""

import asyncio
import atexit
import errno
import functools
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from folders import make_tokenizer
from safetensors.torch import save

from harness import Driver, request
from loraplex.config import Settings
from loraplex.engine import adapter_proofs
from loraplex.engine import engine as engine_module
from loraplex.engine.async_engine import AsyncEngine
from loraplex.engine.build import EngineInfo, EngineSpec, assemble_engine
from loraplex.engine.engine import Engine
from loraplex.engine.messages import AdapterUse, Composition
from loraplex.lora.digest import CONFIG_NAME, WEIGHTS_NAME, adapter_digest, file_sha256
from loraplex.lora.facts import AdapterFacts
from loraplex.lora.files import CONFIG, WEIGHTS
from loraplex.lora.reader import AdapterReader
from loraplex.lora.staging import Staging
from loraplex.lora.store import AdapterStore
from loraplex.model.loader import BaseModel, load_base
from loraplex.model.tokenizer import Tokenizer
from loraplex.service import Service
from loraplex.serving.catalog import AdapterCatalog
from loraplex.text.adapter_texts import AdapterTexts
from loraplex.text.sampling_defaults import SamplingDefaults
from tiny import make_model

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 128}
RANKS = (1, 1, 2, 2, 3, 4)
POISON = len(RANKS)
"""The content that gives NaN: its upload is refused by the proof."""
PLACES, SEQUENCES, WAITING = 2, 3, 4
TTL = 60.0
PROMPTS = ((5, 6, 7), (9, 8, 7, 6, 5, 11, 12, 13, 14), tuple(range(20, 41)))
MAX_TOKENS = 6


@dataclass(frozen=True, eq=False)
class Content:
    """An adapter's two files, and what there is in them: A and B by module and letter."""

    config: bytes
    weights: bytes
    tensors: Mapping[str, torch.Tensor]
    digest: str
    facts: AdapterFacts
    nbytes: int


@dataclass(frozen=True, eq=False)
class Bench:
    """What all examples share: a tiny base twice (one to serve, one to ask for what is right), and the contents."""

    folder: Path
    tokenizer: Tokenizer
    base: BaseModel
    engine: Engine  # its runner is lent to the server of the moment
    info: EngineInfo
    other: Engine
    contents: tuple[Content, ...]

    @functools.cached_property
    def content_of(self) -> dict[str, int]:
        return {content.digest: number for number, content in enumerate(self.contents)}

    @functools.cache  # noqa: B019 (there is one Bench)
    def tokens(self, composition: Composition, prompt: tuple[int, ...]) -> list[int]:
        """What a request gives when it runs alone."""
        driver = Driver(self.other)
        driver.add(request("a", prompt, composition, max_tokens=MAX_TOKENS))
        return driver.run()["a"].tokens


def make_bench(folder: Path) -> Bench:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "base")
    make_model("llama", vocab_size=len(tokenizer), **SIZES).save_pretrained(folder / "base")
    spec = EngineSpec(
        model=folder / "base",
        device="cpu",
        max_loras=PLACES,
        max_lora_rank=8,
        adapter_cache_bytes=1 << 20,
        kv_cache_bytes=1 << 20,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=8,
        max_waiting=SEQUENCES + WAITING,
    )
    pristine = folder / "pristine"
    base = load_base(folder / "base", torch.float32)
    engine, info = assemble_engine(base, spec, lambda *_: lambda digest, on_files: None)  # type: ignore
    reader = AdapterReader(pristine, base.targets, base.dtype, spec.max_lora_rank)
    contents = tuple(make_content(pristine, base, reader, number) for number in range(POISON + 1))
    budget = contents[POISON - 1].nbytes + contents[2].nbytes  # the largest, and another
    config = type(info.config)(**{**vars_of(info.config), "adapter_cache_bytes": budget, "fairness_quantum": 3})
    engine.runner.config = config
    info = type(info)(**{**vars_of(info), "config": config})
    other = load_base(folder / "base", torch.float32)
    right, _ = assemble_engine(other, spec, lambda *_: reader.read)
    return Bench(folder, Tokenizer.load(folder / "base"), base, engine, info, right, contents)


def vars_of(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def make_content(pristine: Path, base: BaseModel, reader: AdapterReader, number: int) -> Content:
    rank = 1 if number == POISON else RANKS[number]
    generator = torch.Generator().manual_seed(number)
    tensors = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"):
        shape = base.targets[name]
        tensors[f"{name}.A"] = torch.randn(rank, shape.in_features, generator=generator)
        tensors[f"{name}.B"] = torch.randn(shape.out_features, rank, generator=generator)
        if number == POISON:
            tensors[f"{name}.B"] *= 1e38
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    config_bytes = json.dumps({**config, "target_modules": ["q_proj", "v_proj"]}).encode()
    weights = save(
        {f"base_model.model.{key[:-2]}.lora_{key[-1]}.weight": tensor.contiguous() for key, tensor in tensors.items()}
    )
    folder = pristine / str(number)
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_bytes(config_bytes)
    (folder / WEIGHTS_NAME).write_bytes(weights)
    digest = adapter_digest(file_sha256(folder / CONFIG_NAME), file_sha256(folder / WEIGHTS_NAME))
    folder.rename(pristine / digest)
    checked = reader.check(pristine / digest, digest)
    return Content(config_bytes, weights, tensors, digest, checked.facts, checked.weights.nbytes)


@functools.cache
def bench() -> Bench:
    folder = Path(tempfile.mkdtemp(prefix="loraplex-tiers-"))
    atexit.register(shutil.rmtree, folder)
    return make_bench(folder)


class Clock:
    """In the place of the module `time`: a moment that a test moves, and a counter that ticks by itself."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._ticks = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        self._ticks += 0.001
        return self._ticks


class Inline(ThreadPoolExecutor):
    """Worker threads that are this one: what they do is done at once, in order."""

    def submit(self, function, /, *args, **kwargs):  # type: ignore[override]
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


class LoadsByHand:
    """In the place of the loads' threads: a read happens when a test says so."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], object]] = deque()

    def submit(self, function: Callable[..., object], *args: Any) -> None:
        self.waiting.append(functools.partial(function, *args))

    def shutdown(self, **_: bool) -> None:
        self.waiting.clear()


class SteppedEngine(AsyncEngine):
    """An AsyncEngine without its thread: a test takes the steps."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop):
        super().__init__(lambda wake: (engine, bench().info))
        self._loop = loop
        self.engine = engine
        self.is_stopped = False

    @property
    def is_alive(self) -> bool:
        return not self.is_stopped

    @property
    def has_mail(self) -> bool:
        return not self._inbox.empty()

    def drain(self) -> None:
        self._drain_inbox(self.engine, block=False)

    def step(self) -> None:
        self.drain()
        if self.engine.has_work:
            self._post(self._deliver, self.engine.step())

    def die(self, *, is_crash: bool) -> None:
        self.is_stopped = True
        if not is_crash:
            self._fail_all("The server is shutting down.")


class Disk:
    """The Step of a store whose disk refuses once, at the step `refusing`."""

    def __init__(self) -> None:
        self.refusing = ""
        self.num_refused = 0

    def __call__(self, name: str) -> None:
        if name == self.refusing:
            self.refusing = ""
            self.num_refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Server:
    """The service over `root`, opened as `Service.running` does, without what watches the time. `on_evict(digest)` is
    called before an adapter leaves RAM."""

    def __init__(self, root: Path, loop: asyncio.AbstractEventLoop, clock: Clock, on_evict: Callable[[str], None]):
        one = bench()
        self._loop = loop
        self._stack = ExitStack()
        self.disk = Disk()
        self.clock = clock
        self.bad_loads: list[str] = []  # the digests of loads that failed
        self.num_bad_told = 0  # of these the engine has been told
        self.fails_next = False
        settings = Settings.load(
            {
                "model": one.folder / "base",
                "data_dir": root,
                "max_num_seqs": SEQUENCES,
                "max_waiting": WAITING,
                "adapter_ttl": TTL,
                "device": "cpu",
                "dtype": "float32",
            }
        )
        for module in (adapter_proofs, engine_module):
            self._stack.enter_context(mock.patch.object(module, "time", clock))
        self.store = self._stack.enter_context(AdapterStore(root, step=self.disk))
        reader = AdapterReader(
            self.store.blobs, one.base.targets, one.base.dtype, 8, one.base.tensor_of, one.base.weights_fingerprint
        )
        self._read = reader.read
        runner = one.engine.runner
        for place in range(runner.pool.num_places):
            runner.pool.clear(place)
        self.engine = Engine(runner, self._load, clock=clock.monotonic)
        self._stack.callback(self.engine.close)
        self.loads = LoadsByHand()
        self.engine.loads._executor.shutdown()
        self.engine.loads._executor = self.loads  # type: ignore[assignment]
        forget = self.engine.cache._on_evict

        def leave(digest: str) -> None:
            on_evict(digest)
            forget(digest)

        self.engine.cache._on_evict = leave
        self.client = SteppedEngine(self.engine, loop)
        url = f"sqlite:///{root.parent / 'registry.sqlite'}"
        self.catalog = self._stack.enter_context(AdapterCatalog(self.store, url, one.info, reader, settings.base_name))
        texts = AdapterTexts(one.tokenizer, one.info.vocab_size)
        self.service = Service(settings, one.tokenizer, self.client, one.info, self.catalog, texts, SamplingDefaults())
        for pool in (self.service.background, self.service.fetching):
            self._stack.callback(pool.close)
        self.service.background._executor.shutdown()
        self.service.background._executor = Inline(1)
        self.service.routes.load()
        self.catalog.sweep()

    def _load(self, digest: str, on_files: Callable[[], object]) -> Any:
        try:
            if self.fails_next:
                self.fails_next = False
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self._read(digest, on_files)
        except Exception:
            self.bad_loads.append(digest)
            raise

    # -- time -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Until nobody can do anything but the engine's next step."""

        async def turn() -> None:
            for _ in range(8):
                await asyncio.sleep(0)

        self._loop.run_until_complete(turn())
        quiet = 0
        while quiet < 3:
            had_mail = self.client.has_mail
            self.client.drain()
            self._loop.run_until_complete(turn())
            quiet = 0 if had_mail or self.client.has_mail else quiet + 1

    def step(self) -> None:
        num_bad = len(self.bad_loads)
        self.client.step()
        self.num_bad_told = num_bad
        self.engine.check_integrity()
        self.settle()

    def finish_load(self) -> None:
        if self.loads.waiting:
            self.loads.waiting.popleft()()

    def advance(self) -> None:
        """A step, and what it waits for."""
        self.step()
        if self.engine.is_stalled:
            if self.loads.waiting:
                self.finish_load()
            else:
                self.clock.now += 1

    def finish(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The outcome of a verb, whatever steps it takes."""
        task = self._loop.create_task(coroutine)
        self.settle()
        for _ in range(2000):
            if task.done():
                return task.result()
            self.advance()
        raise AssertionError("a verb has no end")

    async def upload(self, name: str, number: int) -> Any:
        """As the HTTP side does it."""
        with self.store.stage() as staging:
            write(staging, number)
            return await self.service.accept_upload(name, staging, "me")

    def close(self, *, is_crash: bool = False) -> None:
        """A crash leaves everything where it is, but for what the system takes: its locks. What still runs must have
        been cancelled, or must not run on before it is."""
        self.client.die(is_crash=is_crash)
        self.settle()
        self._stack.close()
        if is_crash:
            self.store.sweep = lambda live: []  # type: ignore[method-assign]


def write(staging: Staging, number: int) -> None:
    content = bench().contents[number]
    for file, data in ((CONFIG, content.config), (WEIGHTS, content.weights)):
        with staging.open(file) as stream:
            stream.write(data)


def use(number: int, scale: float = 1.0) -> AdapterUse:
    content = bench().contents[number]
    return AdapterUse(content.digest, content.nbytes, scale)

"""`loraplex serve MODEL`: start the server and show what it serves."""

import asyncio
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import structlog
import typer
import uvicorn
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from structlog.tracebacks import ExceptionDictTransformer

from loraplex import __version__
from loraplex.config import Settings, prepare_process
from loraplex.demo import paths
from loraplex.errors import StartupError

if TYPE_CHECKING:
    from loraplex.model.quantization import Quantization
    from loraplex.service import Service


def serve(
    model: Annotated[Path | None, typer.Argument(help="Folder of the base model; without it, the demo.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of PEFT adapter folders to serve by name.")] = None,
    lora_modules: Annotated[list[str] | None, typer.Option(help="name=path of a PEFT folder; repeatable.")] = None,
    watch: Annotated[
        bool | None, typer.Option("--watch", help="Take new and changed folders of --adapters while running.")
    ] = None,
    allow_adapter_root: Annotated[
        list[Path] | None, typer.Option(help="Folder below which clients may name adapters to load; repeatable.")
    ] = None,
    allow_bucket: Annotated[
        list[str] | None, typer.Option(help="s3://, gs:// or az:// address clients may fetch from; repeatable.")
    ] = None,
    allow_hub: Annotated[
        list[str] | None, typer.Option(help="Hub repository clients may fetch: owner/name or owner/*; repeatable.")
    ] = None,
    fetch_timeout: Annotated[
        float | None, typer.Option(help="Seconds to fetch one adapter from a source. [default: 600]")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Uploads and the registry.")] = None,
    registry_url: Annotated[
        str | None, typer.Option(help="Database of the registry. [default: SQLite in the data folder]")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. [default: 8000]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, bfloat16, float16 or float32.")] = None,
    max_loras: Annotated[
        int | None, typer.Option(help="Adapters in one batch. [default: 8; CPU: max-num-seqs]")
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Largest rank accepted. [default: 64]")] = None,
    max_adapter_depth: Annotated[
        int | None, typer.Option(help="Adapters on a path from the root of a tree. [default: 4]")
    ] = None,
    adapter_cache_bytes: Annotated[str | None, typer.Option(help="RAM for adapters. [default: 2GiB]")] = None,
    eviction: Annotated[str | None, typer.Option(help="What leaves it first: lrfu or lru. [default: lrfu]")] = None,
    quantization: Annotated[str | None, typer.Option(help="Quantise the base: int8, int4 (CUDA) or nf4.")] = None,
    adapter_ttl: Annotated[
        float | None, typer.Option(help="Seconds after which an idle adapter leaves it. [default: when room is needed]")
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(help="Merged weights for steps of one adapter: off, manual (by request) or auto. [default: off]"),
    ] = None,
    proof: Annotated[
        str | None, typer.Option(help="on: run an adapter before it is accepted; off. [default: on]")
    ] = None,
    proof_timeout: Annotated[
        float | None, typer.Option(help="Seconds that a proof may take, waiting included. [default: 30]")
    ] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help="KV cache. [default: by free memory]")] = None,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory to plan with, weights included. [default: 0.9]")
    ] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences in one batch. [default: 32]")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens in one step. [default: 512]")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and output of one request.")] = None,
    threads: Annotated[int | None, typer.Option(help="Compute threads. [default: all cores but one]")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the base in requests.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file used instead of the model's.")] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: sampling defaults of the model's generation_config.json; none.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key that every request must bring.")] = None,
    insecure: Annotated[bool | None, typer.Option("--insecure", help="Allow other machines without a key.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Start information and log as JSON.")] = False,
) -> None:
    """Serve a base model and its LoRA adapters over HTTP. Every flag is also LORAPLEX_NAME in the environment."""
    flags = {
        name: value
        for name, value in locals().items()
        if name not in ("config", "json_output") and value not in (None, [])
    }
    started = time.perf_counter()
    settings = Settings.load(flags, config, demo_settings)
    prepare_process(settings.resolved_data_dir)
    configure_logging(settings.log_level, as_json=json_output or not sys.stderr.isatty())
    exit_code = asyncio.run(_serve(settings, started, as_json=json_output))
    raise typer.Exit(exit_code)


def demo_settings() -> dict:
    """The demo: its base and, in a checkout or a wheel, its adapters."""
    chosen = {"model": paths.BASE_FOLDER, "served_model_name": paths.BASE_NAME}
    folder = paths.adapters_folder()
    return chosen if folder is None else {**chosen, "adapters": folder}


async def _serve(settings: Settings, started: float, *, as_json: bool) -> int:
    with _bind(settings) as listener:
        return await _serve_on(listener, settings, started, as_json=as_json)


async def _serve_on(listener: socket.socket, settings: Settings, started: float, *, as_json: bool) -> int:
    from loraplex.api.app import create_app  # seconds of imports: what can be refused without them is refused before
    from loraplex.service import Service

    exit_code = 0
    server: _Server | None = None

    def on_death(reason: str) -> None:
        nonlocal exit_code
        exit_code = 1
        if server is not None:
            server.should_exit = True

    async with Service.running(settings, on_death) as service:
        config = uvicorn.Config(
            create_app(service),
            http="h11",  # caps the size of headers
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=round(settings.shutdown_timeout) + 5,  # streams are ended before
            server_header=False,
            lifespan="off",
        )
        port = listener.getsockname()[1]
        server = _Server(config, service, lambda: _show(service, port, time.perf_counter() - started, as_json=as_json))
        server.should_exit = not service.engine.is_alive
        await server.serve(sockets=[listener])
    return exit_code


class _Server(uvicorn.Server):
    """uvicorn's server with our way to stop.

    From the first signal on, /health says 503 and new requests are refused; those under way have `shutdown_timeout`
    seconds, then they end with an error. A second signal ends everything now. Either way the process returns and
    exits with its own code: uvicorn alone would raise the signal again and die of it.
    """

    def __init__(self, config: uvicorn.Config, service: "Service", on_listening: Callable[[], None]):
        super().__init__(config)
        self._service = service
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()  # not before: whoever reads "ready" may connect at once

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._service.is_draining = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_requests(self) -> None:
        await asyncio.sleep(self._service.settings.shutdown_timeout)
        await self._service.engine.stop()


def _bind(settings: Settings) -> socket.socket:
    """Take the port before the model is loaded: a taken one is known at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on: an answer's body then waits 40 ms for its header's ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartupError(
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}). Choose another --port, or stop "
            "what uses it."
        ) from error
    return listener


def _show(service: "Service", port: int, seconds: float, *, as_json: bool) -> None:
    facts = start_facts(service, port, seconds)
    if as_json:
        sys.stdout.write(json.dumps({"event": "ready", **facts}) + "\n")
        sys.stdout.flush()
        return
    console = Console()
    if not console.is_terminal:
        for name, value in facts.items():
            console.print(f"{name}={value}", highlight=False, markup=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        if name not in ("try", "push"):
            table.add_row(f"[bold]{name}[/]", str(value))
    console.print(Panel(table, title=f"loraplex {__version__}", title_align="left", expand=False))
    console.print(f"[bold]try[/]   {facts['try']}\n[bold]push[/]  {facts['push']}", highlight=False, soft_wrap=True)


def start_facts(service: "Service", port: int, seconds: float) -> dict[str, str]:
    """What a person wants to know when the server is up, in the order of the panel."""
    settings, info = service.settings, service.info
    memory, config = info.memory, info.config
    names = service.catalog.names()
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    auth = "" if settings.api_key is None else " -H 'Authorization: Bearer '$LORAPLEX_API_KEY"
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    example = service.tokenizer.chat_template is not None
    name = names[0] if names else service.base_name
    text = "Once upon a time"
    if service.base_name == paths.BASE_NAME and paths.EXAMPLE[0] in names:
        name, text = paths.EXAMPLE
    body = {"model": name, "max_tokens": 48, "temperature": 0}
    body |= {"messages": [{"role": "user", "content": text}]} if example else {"prompt": text}
    path = "/v1/chat/completions" if example else "/v1/completions"
    return {
        "ready": f"in {seconds:.1f} s",
        "model": f"{service.base_name} ({info.model_type}, {info.num_parameters / 1e6:.1f} M parameters, {info.dtype}, "
        f"{info.device}, {info.threads} threads, context {config.max_model_len})",
        "proof": f"paged path equals the model's own to {info.proof_error:.1g} of its range; "
        f"batch invariant: {'yes' if info.is_batch_invariant else 'no'}",
        **_quantization(info.quantization),
        "adapters": f"{len(names)} ({shown or 'none yet'}); {config.max_loras} in one batch",
        "memory": f"weights {_size(memory.weights_bytes)} + {_size(memory.packed_bytes)} packed, "
        f"KV {_size(memory.kv_bytes)} = {memory.kv_tokens} tokens = "
        f"{memory.kv_tokens // config.max_model_len} full requests, adapters in RAM up to {_size(memory.ram_bytes)}"
        + (f", device pool {_size(memory.pool_bytes)}" if memory.pool_bytes else ""),
        "data": str(settings.resolved_data_dir),
        "API": f"{url}/v1",
        "metrics": f"{url}/metrics",
        "auth": "API key" if settings.api_key else "off (loopback only)" if not settings.insecure else "OFF",
        "try": f"curl {url}{path} -H 'Content-Type: application/json'{auth} -d '{json.dumps(body)}'",
        "push": "loraplex push ./my-adapter --name my-adapter",
    }


def _quantization(quantization: "Quantization | None") -> dict[str, str]:
    if quantization is None:
        return {}
    was, now = quantization.plain_nbytes, quantization.nbytes
    return {
        "quantised": f"{quantization.kind}: {_size(was)} of weights are {_size(now)}; logits differ from the "
        f"unquantised base's by up to {quantization.divergence:.1%} of their range"
    }


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"


def configure_logging(level: str, *, as_json: bool) -> None:
    """structlog for everything, the standard library's loggers included; to stderr."""
    shared = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True)]
    # Tracebacks without the values of variables: those hold prompts and keys.
    plain = structlog.dev.plain_traceback
    renderer = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(exception_formatter=plain)
    )
    tracebacks = structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False))
    structlog.configure(
        processors=[*shared, tracebacks if as_json else _keep, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    foreign = [*shared, tracebacks if as_json else _keep]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=foreign)  # type: ignore[arg-type]
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, getattr(logging, level.upper())))


def _keep(logger, method, event):
    return event

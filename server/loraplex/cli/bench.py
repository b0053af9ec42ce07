"""`loraplex bench`: measurements. `step` runs in process, `serve` asks a server over HTTP, `bars` does all of it, and
`peers` asks other servers the same."""

import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from loraplex.cli.output import Json, console, print_json, progress
from loraplex.config import ClientSettings, prepare_process
from loraplex.errors import InvalidRequest

if TYPE_CHECKING:
    from loraplex.bench.load import Outcome

app = typer.Typer(no_args_is_help=True, help="Measure this machine and a server.")
INTERRUPTED = 130


@app.callback()
def bench() -> None:
    """Measure this machine and a server."""


@app.command("step")
def step(
    rounds: Annotated[int, typer.Option(help="Timed rounds; every variant takes its turn in each.", min=1)] = 12,
    batches: Annotated[str, typer.Option(help="Sequences in a step.")] = "1,8,32,64",
    adapters: Annotated[
        str, typer.Option(help="Distinct adapters in a step; 0: base only; merged: one, on merged weights.")
    ] = "0,1,8,32,64,merged",
    ranks: Annotated[str, typer.Option("--ranks", "--rank", help="Ranks of the adapters.")] = "16",
    context: Annotated[int, typer.Option(help="Tokens each sequence has behind it.", min=1, max=1024)] = 64,
    prefill: Annotated[int, typer.Option(help="Tokens of a prefill step; 0: none.", min=0, max=1024)] = 512,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    quantization: Annotated[str | None, typer.Option(help="Of the base: int8, int4 (CUDA) or nf4.")] = None,
    json_output: Json = False,
) -> None:
    """Steps of a Llama of 124.7 M parameters, base only and with adapters, side by side, as shares of this machine's
    memory bandwidth and arithmetic, which are measured first."""
    prepare_process()
    from loraplex.bench.step import StepBench, StepSettings
    from loraplex.bench.tables import machine_text, step_tables

    settings = StepSettings(
        rounds=rounds,
        batches=_numbers("batches", batches, 1),
        adapters=_numbers("adapters", ",".join(count for count in adapters.split(",") if count != "merged"), 0),
        merged="merged" in adapters.split(","),
        ranks=_numbers("ranks", ranks, 1),
        context=context,
        prefill=prefill,
        dtype=dtype,
        device=device,
        threads=threads,
        quantization=quantization,
    )
    with _progress() as bar:
        task = bar.add_task("limits of the machine", total=None)
        measured = StepBench(settings)
        bar.update(task, description="rounds", total=measured.num_rounds)
        result = measured.run(lambda: bar.advance(task))
    if json_output:
        print_json(result)
        return
    out = console()
    out.print(machine_text(result["machine"]), highlight=False, soft_wrap=True)
    for table in step_tables(result):
        out.print(table)
    out.print(
        "  ".join(f"{name} {value:.3f}" for name, value in result["ratios"].items()), highlight=False, soft_wrap=True
    )


@app.command("serve")
def serve(
    url: Annotated[str | None, typer.Option(help="The server. [default: LORAPLEX_URL]")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model to ask for; repeatable.")] = None,
    adapters: Annotated[int | None, typer.Option(help="So many adapters, by --pattern; 0: the base.", min=0)] = None,
    pattern: Annotated[str, typer.Option(help="Names of adapters, as Python's str.format.")] = "bench-{:04d}",
    prepare: Annotated[
        int, typer.Option(help="Push random adapters first, until so many are served (loraplex only).", min=0)
    ] = 0,
    rank: Annotated[int, typer.Option(help="Rank of the adapters of --prepare.", min=1)] = 16,
    base: Annotated[Path | None, typer.Option(help="Folder of the base. [default: where the server says]")] = None,
    popularity: Annotated[
        str, typer.Option(help="distinct (in turn), identical, uniform, zipf:EXPONENT or hot:SHARE.")
    ] = "uniform",
    requests: Annotated[int | None, typer.Option(help="Requests. [default: 2 a client, or 64]", min=1)] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds after which no more are sent.", min=0.1)] = None,
    clients: Annotated[int, typer.Option(help="Closed loop: so many clients.", min=1)] = 32,
    rate: Annotated[float | None, typer.Option(help="Poisson arrivals: requests a second, instead.", min=1e-3)] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output_tokens: Annotated[int, typer.Option(min=1)] = 32,
    cold: Annotated[float, typer.Option(help="Share of requests for adapters not used before.", min=0, max=1)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="/v1/chat/completions instead of /v1/completions.")] = False,
    warm_up: Annotated[int | None, typer.Option(help="Models asked once before. [default: all, up to 64]")] = None,
    threads: Annotated[int | None, typer.Option(help="The server's compute threads, if it does not say.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds without a byte.", min=0.01)] = 600.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Picture to write, .svg, .png or .pdf.")] = None,
    json_output: Json = False,
) -> None:
    """Load an OpenAI-compatible server and measure times to the first token, between tokens, throughput and fairness.

    Exit codes: 0 well, 1 some request failed, 2 nothing could be measured, 130 interrupted (what there was is shown).
    """
    prepare_process()
    from loraplex.bench.arrivals import ClosedLoop, Poisson
    from loraplex.bench.plot import require_plots, save_plot
    from loraplex.bench.popularity import Popularity
    from loraplex.bench.serve import ServeSettings
    from loraplex.bench.tables import serve_notes, serve_table

    client = ClientSettings()
    if requests is None and duration is None:
        requests = 64 if rate else max(6, 2 * clients)
    settings = ServeSettings(
        url=url or client.url,
        api_key=client.api_key,
        models=tuple(model or ()),
        adapters=adapters,
        pattern=pattern,
        prepare=prepare,
        rank=rank,
        base=base,
        popularity=Popularity.parse(popularity),
        arrivals=Poisson(rate, seed) if rate else ClosedLoop(clients),
        requests=requests,
        seconds=duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cold_share=cold,
        is_chat=chat,
        seed=seed,
        warm_up=warm_up,
        timeout=timeout,
        threads=threads,
    )
    if plot is not None:
        require_plots(plot)
    with _watched() as run:
        done = run(settings)
    if json_output:
        print_json(done.report)
    else:
        out = console()
        out.print(serve_table(done.report))
        for line in serve_notes(done.report):
            style = "bold red" if line.startswith("ERROR") else "yellow" if line[:2].isupper() else None
            out.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
    if plot is not None:
        server = done.report["server"]
        save_plot(done.result, f"{server['base']}: {done.report['workload']['arrivals']}", plot)
    if done.report["is_interrupted"]:
        raise typer.Exit(INTERRUPTED)
    raise typer.Exit(0 if done.is_good else 1)


@app.command("tiers")
def tiers(
    adapters: Annotated[int, typer.Option(help="Adapters to register.", min=1)] = 2000,
    rank: Annotated[int, typer.Option(help="Their rank.", min=1)] = 4,
    in_ram: Annotated[int, typer.Option(help="Adapters that RAM holds.", min=1)] = 100,
    loads: Annotated[int, typer.Option(help="Requests for adapters at random.", min=1)] = 2000,
    repeats: Annotated[int, typer.Option(help="Of each start; medians are shown.", min=1)] = 3,
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    json_output: Json = False,
) -> None:
    """What registered adapters cost a server of its own: its start, pages of the list, memory of an idle one; where the
    time of loads goes, and memory over thousands of them."""
    prepare_process()
    from loraplex.bench.tables import tiers_table
    from loraplex.bench.tiers import TiersBench, TiersSettings

    settings = TiersSettings(adapters=adapters, rank=rank, in_ram=in_ram, loads=loads, repeats=repeats, threads=threads)
    with _progress() as bar:
        task = bar.add_task("", total=None)
        result = TiersBench(settings, lambda text: bar.update(task, description=text)).run()
    if json_output:
        print_json(result)
    else:
        console().print(tiers_table(result))


@app.command("upload")
def upload(
    megabytes: Annotated[float, typer.Option(help="Of the uploaded adapter, about.", min=0.01)] = 100.0,
    streams: Annotated[int, typer.Option(help="Streams beside the uploads.", min=1)] = 8,
    idle: Annotated[int, typer.Option(help="Uploads to an idle server first.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Of streams alone, beside uploads, beside writes.", min=1)] = 4,
    seconds: Annotated[float, typer.Option(help="Of each third of a round.", min=0.1)] = 12.0,
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    proof: Annotated[Literal["on", "off"], typer.Option(help="As for serve.")] = "on",
    json_output: Json = False,
) -> None:
    """How fast a server of its own takes an upload, beside the disk's own speed, and what that costs its streams."""
    prepare_process()
    from loraplex.bench.tables import upload_table
    from loraplex.bench.upload import UploadBench, UploadSettings

    settings = UploadSettings(
        megabytes=megabytes,
        streams=streams,
        idle=idle,
        rounds=rounds,
        seconds=seconds,
        threads=threads,
        proof=proof,
    )
    with _progress() as bar:
        task = bar.add_task("", total=None)
        result = UploadBench(settings, lambda text: bar.update(task, description=text)).run()
    if json_output:
        print_json(result)
    else:
        console().print(upload_table(result))


@app.command("eviction")
def eviction(
    adapters: Annotated[int, typer.Option(help="Adapters registered.", min=1)] = 1000,
    in_ram: Annotated[int, typer.Option(help="Adapters of mean size that RAM holds.", min=1)] = 100,
    requests: Annotated[int, typer.Option(help="Requests of each trace.", min=1)] = 20_000,
    in_flight: Annotated[int, typer.Option(help="Requests at once, whose adapters stay.", min=1)] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_output: Json = False,
) -> None:
    """Replay traces of requests against the RAM tier: hit rates of the policies of --eviction, of the textbook's GDSF,
    and of one that knows the future."""
    prepare_process()
    from loraplex.bench.eviction import EvictionBench, EvictionSettings
    from loraplex.bench.tables import eviction_table

    bench = EvictionBench(
        EvictionSettings(adapters=adapters, in_ram=in_ram, requests=requests, in_flight=in_flight, seed=seed)
    )
    with _progress() as bar:
        task = bar.add_task("traces", total=bench.num_replays)
        result = bench.run(lambda: bar.advance(task))
    if json_output:
        print_json(result)
        return
    out = console()
    out.print(eviction_table(result, "hit_rate", "found in RAM"))
    out.print(eviction_table(result, "byte_hit_rate", "bytes found in RAM"))


@app.command("routing")
def routing(
    decisions: Annotated[int, typer.Option(help="Decisions of each kind.", min=1)] = 20_000,
    routes: Annotated[int, typer.Option(help="Routes kept in the registry.", min=1)] = 1000,
    targets: Annotated[int, typer.Option(help="Targets of each.", min=1, max=64)] = 10,
    json_output: Json = False,
) -> None:
    """Decide, judge, change and load routes, over a registry of its own."""
    prepare_process()
    from loraplex.bench.routing import RoutingBench, RoutingSettings
    from loraplex.bench.tables import routing_table

    with _shown() as show:
        show("routes")
        result = RoutingBench(RoutingSettings(decisions=decisions, routes=routes, targets=targets)).run()
    if json_output:
        print_json(result)
    else:
        console().print(routing_table(result))


@app.command("bars")
def bars(
    rounds: Annotated[int, typer.Option(help="Rounds of bench step.", min=1)] = 12,
    requests: Annotated[int, typer.Option(help="Requests of each run over HTTP with 32 clients.", min=1)] = 64,
    many: Annotated[int, typer.Option(help="Adapters of the run under Zipf traffic; 0: leave it out.", min=0)] = 1000,
    threads: Annotated[int, typer.Option(help="Compute threads.", min=1)] = 1,
    pin: Annotated[
        bool, typer.Option("--pin", help="The server on one core, this client on the others (Linux).")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="File for all figures, as JSON.")] = None,
    json_output: Json = False,
) -> None:
    """Measure every CPU bar of DESIGN §8 that can be measured on this machine, and show them in a table."""
    prepare_process()
    from loraplex.bench.bars import Bars, BarsSettings
    from loraplex.bench.tables import bars_notes, bars_table

    settings = BarsSettings(rounds=rounds, requests=requests, many=many, threads=threads, pin=pin)
    with _shown() as show:
        result = Bars(settings, show).run()
    _finish(result, bars_table, bars_notes, output, json_output)


@app.command("cuda")
def cuda(
    context: Annotated[int, typer.Option(help="Tokens behind each sequence.", min=1)] = 1024,
    rounds: Annotated[int, typer.Option(help="Rounds of bench step.", min=1)] = 12,
    graphs: Annotated[bool, typer.Option("--graphs", help="Decoding as CUDA graphs.")] = False,
    beside: Annotated[bool, typer.Option("--peers/--no-peers", help="transformers' and PEFT's generate, too.")] = True,
    output: Annotated[Path | None, typer.Option(help="File for all figures, as JSON.")] = None,
    json_output: Json = False,
) -> None:
    """Measure the CUDA bars of DESIGN §8 on a random base of the 8B shape, in process, and show them in a table.

    Without this command line, on a machine that lacks its libraries: python -m loraplex.bench.cuda_bars.
    """
    prepare_process()
    from loraplex.bench.cuda_bars import CudaBars, CudaSettings, bars_notes
    from loraplex.bench.tables import bars_table

    settings = CudaSettings(context=context, prefill=2 * context, rounds=rounds, graphs=graphs, peers=beside)
    with _shown() as show:
        result = CudaBars(settings, show).run()
    _finish(result, bars_table, bars_notes, output, json_output)


@app.command("peers")
def peers(
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's llama-server.")] = None,
    llama_source: Annotated[Path | None, typer.Option(help="llama.cpp's source folder: its converters.")] = None,
    llama_python: Annotated[
        Path | None, typer.Option(help="Python with torch, transformers, sentencepiece for them. [default: this one]")
    ] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="Python of vLLM's environment.")] = None,
    peft_python: Annotated[Path | None, typer.Option(help="Python that has peft. [default: this one]")] = None,
    clients: Annotated[str, typer.Option(help="Clients at once.")] = "1,32",
    adapters: Annotated[str, typer.Option(help="Distinct adapters asked for in turn; 0: the base.")] = "0,1,8,32",
    rank: Annotated[int, typer.Option(help="Rank of the adapters.", min=1)] = 16,
    rounds: Annotated[int, typer.Option(help="Requests of each client; at least 8 in all.", min=1)] = 2,
    repeats: Annotated[int, typer.Option(help="Of everything; medians are shown.", min=1)] = 1,
    folder: Annotated[Path | None, typer.Option(help="Keep model, adapters and logs here. [default: none]")] = None,
    pin: Annotated[bool, typer.Option(help="The peer's compute on the last core, this client on the others.")] = True,
    output: Annotated[Path | None, typer.Option(help="File for all figures, as JSON.")] = None,
    json_output: Json = False,
) -> None:
    """The same random Llama of 124.7 M parameters, adapters and workload through this server, llama.cpp's, vLLM's CPU
    build and PEFT, in turn, each on one core with one compute thread. What is not there is skipped, and named.

    64 tokens in, 32 out, greedy, streamed, bfloat16. Exit code 1: some request or peer failed.
    """
    prepare_process()
    from loraplex.bench.peers.comparison import PeersBench, PeersSettings
    from loraplex.bench.peers.llama_cpp import LlamaCpp
    from loraplex.bench.peers.own import Loraplex
    from loraplex.bench.peers.peft_mixed import PeftMixed
    from loraplex.bench.peers.tables import peers_notes, peers_table
    from loraplex.bench.peers.vllm_cpu import VllmCpu

    counts = _numbers("adapters", adapters, 0)
    settings = PeersSettings(
        clients=_numbers("clients", clients, 1),
        adapters=counts,
        num_adapters=max(1, *counts),
        rank=rank,
        rounds=rounds,
        repeats=repeats,
        folder=folder,
        pin=pin,
    )
    others = [LlamaCpp(llama_server, llama_source, llama_python), VllmCpu(vllm_python), PeftMixed(peft_python)]
    with _shown() as show:
        result = PeersBench(settings, [Loraplex(), *others], show).run()
    _finish(result, peers_table, peers_notes, output, json_output)


def _progress() -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn rarely: this process shares the machine with what it measures.
    return progress(*columns, refresh_per_second=2)


@contextmanager
def _shown() -> Iterator[Callable[[str], None]]:
    """Gives a function that shows what is being measured: under a spinner, or line by line on stderr."""
    with _progress() as bar:
        task = bar.add_task("", total=None)

        def show(text: str) -> None:
            bar.update(task, description=text)
            if bar.disable:
                typer.echo(text, err=True)

        yield show


def _finish(
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], Table],
    notes: Callable[[dict[str, Any]], list[str]],
    output: Path | None,
    json_output: bool,
) -> NoReturn:
    """Write and print the result; ends the command, with 1 if it has errors."""
    text = json.dumps(result, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if json_output:
        typer.echo(text)
    else:
        out = console()
        out.print(table(result))
        for line in notes(result):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1 if result["errors"] else 0)


@contextmanager
def _watched() -> Iterator[Callable[[Any], Any]]:
    """Gives a function that runs a ServeBench under a progress bar; the first Ctrl-C ends the sending."""
    from loraplex.bench.serve import ServeBench, Watcher

    with _progress() as bar:
        task = bar.add_task("look", total=None)

        class Bar(Watcher):
            num_failed = num_tokens = 0

            def phase(self, name: str, total: int | None) -> None:
                bar.reset(task, description=name, total=total)

            def step(self) -> None:
                bar.advance(task)

            def done(self, outcome: "Outcome") -> None:
                self.num_failed += outcome.error is not None
                self.num_tokens += outcome.num_tokens
                failed = f", {self.num_failed} failed" if self.num_failed else ""
                bar.update(task, description=f"requests ({self.num_tokens} tokens{failed})")

        def on_start(stop: Callable[[], None]) -> None:
            loop = asyncio.get_running_loop()

            def interrupted() -> None:
                loop.remove_signal_handler(signal.SIGINT)  # a second one ends the process
                stop()

            loop.add_signal_handler(signal.SIGINT, interrupted)

        yield lambda settings: asyncio.run(ServeBench(settings, Bar()).run(on_start))


def _numbers(name: str, text: str, least: int) -> tuple[int, ...]:
    """ "1,8,32" -> (1, 8, 32), each once, in order."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least or numbers[-1] > 1024:
        raise InvalidRequest(f"--{name} {text!r} is not a list of numbers from {least} to 1024, as 1,8,32.", param=name)
    return tuple(numbers)

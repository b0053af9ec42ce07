"""CudaBars: what DESIGN §8 asks of a GPU, for an 8B-shaped random base, measured in one run.

    python -m loraplex.bench.cuda_bars --output figures.json        # the table, as Markdown, on standard output

In process, by `StepBench`, `SwapBench` and `GenerateBench`, so it runs on a bare machine: torch, triton, transformers,
cachetools, and PEFT for the rows beside. On a CPU (`--device cpu`) it shows that the program works; the bars mean
nothing there.
"""

import argparse
import gc
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraplex.bench.bar import Bar
from loraplex.bench.generate import GenerateBench, GenerateSettings
from loraplex.bench.machine import MachineLimits
from loraplex.bench.step import StepBench, StepSettings
from loraplex.bench.swaps import SwapBench, SwapSettings

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
WIDE = (32, 256)
"""Batches, from and to, that share the bar of the base's decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaSettings:
    """`graphs`: decoding runs as CUDA graphs. `peers`: transformers' and PEFT's generate beside, too."""

    batches: tuple[int, ...] = (1, 32, 64, 128, 256)
    adapters: tuple[int, ...] = (0, 1, 32, 64)
    context: int = 1024
    prefill: int = 2048
    rounds: int = 12
    swap_tokens: int = 128
    graphs: bool = False
    peers: bool = True
    dtype: str = "bfloat16"
    device: str = "cuda"
    shape: Mapping[str, Any] = field(default_factory=lambda: LLAMA_8B)


class CudaBars:
    def __init__(
        self,
        settings: CudaSettings,
        show: Callable[[str], object] = lambda _: None,
        limits: MachineLimits | None = None,
    ):
        """`show` is told what is being measured. `limits` None: measured here."""
        self._settings = settings
        self._show = show
        self._limits = limits

    def run(self) -> dict[str, Any]:
        """{"title", "settings", "where", "machine", "bars", "errors", "step", "swaps", "generate"}."""
        settings = self._settings
        common: dict[str, Any] = {"dtype": settings.dtype, "device": settings.device, "shape": settings.shape}
        self._show("the machine's limits, and steps")
        bench = StepBench(
            StepSettings(
                batches=settings.batches,
                adapters=settings.adapters,
                context=settings.context,
                prefill=settings.prefill,
                rounds=settings.rounds,
                graphs=settings.graphs,
                **common,
            ),
            self._limits,
        )
        step = bench.run()
        del bench
        self._let_go()
        self._show("adapters that come while others decode")
        swap = SwapBench(
            SwapSettings(context=settings.context, tokens=settings.swap_tokens, graphs=settings.graphs, **common)
        )
        swaps = swap.run()
        swap.close()
        del swap
        self._let_go()
        generate: list[dict[str, Any]] = []
        if settings.peers:
            batches = tuple(batch for batch in settings.batches if batch in (1, 32)) or settings.batches[:1]
            most = max(1, min(32, max(settings.adapters)))
            generate = GenerateBench(
                GenerateSettings(batches=batches, adapters=most, context=settings.context, **common), self._show
            ).run()
        return {
            "title": "CUDA bars",
            "settings": asdict(settings) | {"shape": dict(settings.shape)},
            "where": self._where(),
            "machine": step["machine"],
            "bars": [bar.to_json() for bar in [*step_bars(step), *swap_bars(swaps)]],
            "errors": [],
            "step": step,
            "swaps": swaps,
            "generate": generate,
        }

    def _let_go(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _where(self) -> dict[str, str]:
        """The device, the versions and the day."""
        versions = {}
        for name in ("torch", "triton", "transformers", "peft"):
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "none"
        is_cuda = self._settings.device.startswith("cuda")
        name = torch.cuda.get_device_name() if is_cuda else "CPU"
        return {"device": name, **versions, "date": time.strftime("%Y-%m-%d")}


def step_bars(step: Mapping[str, Any]) -> list[Bar]:
    """Of `StepBench.run`: those whose variants were measured."""
    rows = {(row["batch"], row["adapters"], row["merged"]): row for row in step["rows"]}
    bars = []
    for batch in sorted({row["batch"] for row in step["rows"]}):
        row = rows.get((batch, 0, False))
        is_wide = WIDE[0] <= batch <= WIDE[1]
        if row is not None and (batch == 1 or is_wide):
            name = f"base at batch {batch}, share of the bandwidth"
            limit = 0.70 if is_wide else 0.60
            bars.append(Bar(bar=name, limit=limit, unit="×", measured=row["share_of_bandwidth"], bound=1.0))
    for count, limit in ((32, 0.78), (64, 0.72)):
        base, row = rows.get((count, 0, False)), rows.get((count, count, False))
        if base is not None and row is not None:
            bound = base["limit_ms"] / row["limit_ms"]
            name = f"{count} adapters in {count} / base only"
            bars.append(Bar(bar=name, limit=limit, unit="×", measured=row["ratio_to_base"], bound=bound))
    for batch in (1, 32):
        row = rows.get((batch, 1, True))
        if row is not None:
            name = f"one merged adapter at batch {batch} / base"
            bars.append(Bar(bar=name, limit=0.99, unit="×", measured=row["ratio_to_base"], bound=1.0))
    return bars


def swap_bars(swaps: Mapping[str, Any]) -> list[Bar]:
    """Of `SwapBench.run`."""
    size = f"{swaps['adapter_bytes'] / 1e6:.0f} MB"
    return [
        Bar(bar=f"an adapter of {size} to the device", limit=8, unit="ms", measured=swaps["copy_ms"], is_least=False),
        Bar(
            bar="p99 between others' tokens, adapters coming / standing",
            limit=1.15,
            unit="×",
            measured=swaps["ratio_p99"],
            is_least=False,
        ),
    ]


def bars_notes(result: Mapping[str, Any]) -> list[str]:
    """Lines beside the table: where it was measured, and the libraries beside it."""
    where = ", ".join(f"{name} {value}" for name, value in result["where"].items())
    beside = [f"{row['library']}, batch {row['batch']}: {_rate(row)}" for row in result["generate"]]
    return [where, *beside]


def markdown(result: Mapping[str, Any]) -> str:
    """The tables for the notes."""
    where, graphs = result["where"], "graphs" if result["settings"]["graphs"] else "no graphs"
    lines = [
        f"{where['date']}, {where['device']}, torch {where['torch']}, triton {where['triton']}, transformers "
        f"{where['transformers']}, peft {where['peft']}; {graphs}; {result['step']['shape']}",
        "",
        "| bar | limit | bound | measured | |",
        "|---|---|---|---|---|",
    ]
    for bar in result["bars"]:
        sign = "≥" if bar["is_least"] else "≤"
        bound = "" if bar["bound"] is None else f"{bar['bound']:.3f}"
        met = "met" if bar["is_met"] else "missed"
        unit = bar["unit"]
        lines.append(
            f"| {bar['bar']} | {sign} {bar['limit']:g} {unit} | {bound} | {bar['measured']:.3f} {unit} | {met} |"
        )
    lines += ["", "| | batch | adapters | ms a token | tokens/s |", "|---|---|---|---|---|"]
    for row in result["step"]["rows"]:
        kind = "loraplex, merged" if row["merged"] else "loraplex"
        lines.append(_line(kind, row["batch"], row["adapters"], row["step_ms"], row["tokens_per_second"]))
    for row in result["generate"]:
        lines.append(_line(row["library"], row["batch"], row["adapters"], row["ms"], row["tokens_per_second"]))
    return "\n".join(lines) + "\n"


def _rate(row: Mapping[str, Any]) -> str:
    return row["note"] or f"{row['tokens_per_second']:.0f} tokens/s"


def _line(kind: str, batch: int, adapters: int | None, milliseconds: float | None, rate: float | None) -> str:
    if milliseconds is None or rate is None:
        return f"| {kind} | {batch} | | not here | |"
    return f"| {kind} | {batch} | {adapters or 'base'} | {milliseconds:.2f} | {rate:.0f} |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m loraplex.bench.cuda_bars", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batches", default="1,32,64,128,256")
    parser.add_argument("--adapters", default="0,1,32,64")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--shape", default=None, help="changes to the 8B shape, as JSON")
    parser.add_argument("--graphs", action="store_true", help="decoding as CUDA graphs")
    parser.add_argument("--no-peers", action="store_true", help="without transformers' and PEFT's generate")
    parser.add_argument("--output", type=Path, default=None, help="file for all figures, as JSON")
    chosen = parser.parse_args(arguments)
    settings = CudaSettings(
        batches=tuple(map(int, chosen.batches.split(","))),
        adapters=tuple(map(int, chosen.adapters.split(","))),
        context=chosen.context,
        prefill=2 * chosen.context,
        rounds=chosen.rounds,
        graphs=chosen.graphs,
        peers=not chosen.no_peers,
        dtype=chosen.dtype,
        device=chosen.device,
        shape={**LLAMA_8B, **json.loads(chosen.shape or "{}")},
    )
    result = CudaBars(settings, lambda text: sys.stderr.write(f"{text}\n")).run()
    if chosen.output is not None:
        chosen.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    sys.stdout.write(markdown(result))


if __name__ == "__main__":
    main()

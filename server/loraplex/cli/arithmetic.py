"""`loraplex merge`, `resize`, `bake`, `extract`: arithmetic on adapters and models in folders, without a server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from loraplex.cli.output import Json, console, print_json, progress
from loraplex.config import prepare_process
from loraplex.errors import InvalidRequest
from loraplex.lora.arithmetic.method import MajoritySign, Method
from loraplex.lora.module_names import group_by_layer

if TYPE_CHECKING:
    from loraplex.lora.arithmetic.checkpoint import Checkpoint
    from loraplex.lora.arithmetic.draft import Draft

Adapter = Annotated[Path, typer.Argument(help="A PEFT folder.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]
Base = Annotated[
    Path | None, typer.Option("--base", help="Folder of the base model: needed for more than plain LoRA on linears.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is in --out.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Largest rank of a module.", min=1)]
Energy = Annotated[
    float | None, typer.Option("--energy", help="Smallest rank that keeps this share of each delta's squared norm.")
]
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName, typer.Option("--dtype", help="Of the adapter written.")]


def merge(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders.")],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="One for each, as 0.7,0.3. [default: 1 each]")] = None,
    method: Annotated[Method, typer.Option(help="How; all names are PEFT's, dare is dare_linear.")] = Method.LINEAR,
    density: Annotated[float | None, typer.Option(help="ties, dare, magnitude_prune: share of values to keep.")] = None,
    majority_sign: Annotated[MajoritySign, typer.Option(help="ties: how signs are elected.")] = MajoritySign.TOTAL,
    seed: Annotated[int, typer.Option(help="dare: of its random choice.", min=0)] = 0,
    rank: Rank = None,
    energy: Energy = None,
    base: Base = None,
    dtype: Dtype = "float32",
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Combine adapters of one base into one. linear is the exact sum of their deltas."""
    prepare_process()
    from loraplex.lora.arithmetic.merge import MergeOptions
    from loraplex.lora.arithmetic.merge import merge as merged
    from loraplex.lora.arithmetic.source import opened

    options = MergeOptions(method, rank, energy, density, majority_sign, seed)
    numbers = _weights(weights, len(adapters))
    checkpoint = _checkpoint(base)
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path, checkpoint)) for path in adapters]
        with _progress("merge") as tick:
            draft = merged(sources, numbers, options, tick)
    _write(draft, out, checkpoint, dtype, force, adapters, json_output, {"method": method.value, "weights": numbers})


def resize(
    adapter: Adapter,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    base: Base = None,
    dtype: Dtype = "float32",
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Cut an adapter to smaller ranks by its singular values, and say what is kept of each module."""
    prepare_process()
    from loraplex.lora.arithmetic.resize import resize as resized
    from loraplex.lora.arithmetic.source import opened

    checkpoint = _checkpoint(base)
    with opened(adapter, checkpoint) as source, _progress("resize") as tick:
        draft = resized(source, rank, energy, tick)
    _write(draft, out, checkpoint, dtype, force, [adapter], json_output, {})


def bake(
    adapter: Adapter,
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    out: Out,
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Write the base with the adapter merged into it, a model folder like the base's."""
    prepare_process()
    from loraplex.lora.arithmetic.bake import bake as baked
    from loraplex.lora.arithmetic.output import output_folder
    from loraplex.lora.arithmetic.source import opened

    checkpoint = _known_checkpoint(base)
    with opened(adapter, checkpoint) as source, output_folder(out, force=force, inputs=[adapter, base]) as folder:
        with _progress("bake") as tick:
            result = baked(source, checkpoint, folder, tick)
    rows = [
        {"parameter": path, "change": change.relative, "rounding": change.lost}
        for path, change in result.changes.items()
    ]
    if json_output:
        reply = {"out": str(out), "parameters": rows, "untied": result.is_untied, "files": list(result.copied)}
        print_json({**reply, "from_adapter": list(result.brought), "notes": list(result.notes)})
        return
    table = Table(Column("parameter", overflow="fold"), "change", "rounding")
    for name, members in group_by_layer(rows, lambda row: row["parameter"]):
        table.add_row(Text(name), _span(members, "change"), _span(members, "rounding"))
    shown = console()
    shown.print(table)
    if result.is_untied:
        news = "The head no longer shares the embedding's weight: it has its own, and config.json says so."
        shown.print(news, soft_wrap=True)
    if result.brought:
        shown.print(f"From the adapter: {', '.join(result.brought)}", markup=False)
    _print_end(shown, result.notes, f"{out}: change is that of the parameter, rounding its share of the change")


def extract(
    tuned: Annotated[Path, typer.Argument(help="Folder of the tuned model.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    out: Out,
    rank: Annotated[int, typer.Option("--rank", help="Largest rank of a module.", min=1)] = 16,
    save_modules: Annotated[
        bool, typer.Option("--save-modules", help="Save norms, embeddings and biases that differ whole.")
    ] = False,
    dtype: Dtype = "float32",
    force: Force = False,
    json_output: Json = False,
) -> None:
    """Make an adapter of a model that was tuned as a whole."""
    prepare_process()
    from loraplex.lora.arithmetic.extract import extract as extracted

    ours, theirs = _known_checkpoint(base), _known_checkpoint(tuned)
    with _progress("extract") as tick:
        found = extracted(ours, theirs, rank, saves=save_modules, name=str(base), tick=tick)
    others: dict[str, Any] = {
        "same": found.num_same,
        "saved": [{"parameter": one.path, "change": one.relative} for one in found.saved],
        "left": [{"parameter": one.path, "change": one.relative} for one in found.left],
    }
    _write(found.draft, out, ours, dtype, force, [tuned, base], json_output, others)
    if not json_output:
        shown = console()
        for label, rows in (("saved whole", others["saved"]), ("differs, and NOT in the adapter", others["left"])):
            for name, members in group_by_layer(rows, lambda row: row["parameter"]):
                shown.print(f"{label}: {name}, changed by {_span(members, 'change')}", highlight=False, markup=False)


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1.0] * count
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidRequest(f"--weights is {text!r}, and numbers with commas are expected, as 0.7,0.3.") from None


def _checkpoint(base: Path | None) -> "Checkpoint | None":
    return None if base is None else _known_checkpoint(base)


def _known_checkpoint(folder: Path) -> "Checkpoint":
    """The model in `folder`, its modules known by its config, or by its weights where that does not suffice."""
    import torch

    from loraplex.lora.arithmetic.checkpoint import Checkpoint
    from loraplex.model.loader import load_base
    from loraplex.model.shapes import ShapesUnknown, read_shapes

    try:
        return Checkpoint(folder, read_shapes(folder).targets)
    except ShapesUnknown:
        return Checkpoint(folder, load_base(folder, torch.bfloat16).targets)


@contextmanager
def _progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with progress(*columns) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _write(
    draft: "Draft",
    out: Path,
    base: "Checkpoint | None",
    dtype: DtypeName,
    force: bool,
    inputs: Sequence[Path],
    json_output: bool,
    facts: dict[str, Any],
) -> None:
    import torch

    from loraplex.lora.arithmetic.output import output_folder
    from loraplex.lora.arithmetic.writer import write_adapter

    with output_folder(out, force=force, inputs=inputs) as folder:
        nbytes = write_adapter(draft, folder, base, getattr(torch, dtype))
    if json_output:
        rows = [
            {"module": r.name, "rank": r.rank, "before": r.before, "energy": r.energy, "norm": r.norm}
            for r in draft.results
        ]
        reply = {"out": str(out), "bytes": nbytes, "energy": draft.energy, "modules": rows, **facts}
        print_json({**reply, "notes": list(draft.notes)})
        return
    table = Table(Column("modules", overflow="fold"), "rank", "before", "energy kept")
    for name, members in group_by_layer(draft.results, lambda one: one.name, lambda one: (one.rank, one.before)):
        least, most = min(one.energy for one in members), max(one.energy for one in members)
        kept = f"{least:.2%}" if f"{least:.2%}" == f"{most:.2%}" else f"{least:.2%} to {most:.2%}"
        table.add_row(Text(name), str(members[0].rank), str(members[0].before), kept)
    shown = console()
    shown.print(table)
    modules = f"{len(draft.results)} modules, {nbytes} bytes, {draft.energy:.2%} of the energy kept"
    _print_end(shown, draft.notes, f"{out}: {modules}")


def _print_end(shown: Console, notes: Sequence[str], line: str) -> None:
    for note in notes:
        shown.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    shown.print(line, highlight=False, markup=False, soft_wrap=True)


def _span(rows: Sequence[dict[str, Any]], field: str) -> str:
    figures = [f"{row[field]:.2e}" for row in rows]
    least, most = min(figures, key=float), max(figures, key=float)
    return least if least == most else f"{least} to {most}"

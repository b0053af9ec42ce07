"""`loraplex check`: what a server would say of an adapter, without a server."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from loraplex.cli.failures import ServerRefused
from loraplex.cli.output import Json, console, print_json
from loraplex.config import prepare_process
from loraplex.errors import AdapterError


def check(
    path: Annotated[Path, typer.Argument(help="A PEFT folder.", exists=True, file_okay=False)],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    prove: Annotated[bool, typer.Option("--prove", help="Load the base and run the adapter on it, too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    max_lora_rank: Annotated[int, typer.Option(help="The server's limit.", min=1)] = 64,
    json_output: Json = False,
) -> None:
    """Check an adapter against a base as `serve` does when it is pushed. Exit code 4: it would be refused."""
    prepare_process()
    from loraplex.serving.offline_check import check_folder

    try:
        found = check_folder(path, base, device=device, dtype=dtype, max_rank=max_lora_rank, proves=prove)
    except AdapterError as error:
        raise ServerRefused(error.message, code=error.code, param=error.param) from error
    report = found.report.to_json()
    if json_output:
        print_json({"report": report, "proof": found.proof})
        return
    console().print(panel_of(path.resolve().name, report, found.proof))


def panel_of(name: str, report: dict[str, Any], proof: dict[str, Any] | None) -> Panel:
    """A report, and what was proven, for a person."""
    base, size = report["base"], report["bytes"]
    facts = Table.grid(padding=(0, 2))
    rows = {
        "base": f"{base['model_type']}, {base['vocab_size']} tokens"
        + (f", fingerprint {base['fingerprint'][:12]}" if base["fingerprint"] else ""),
        "trained on": f"{base['hint']} (says its config)" if base["hint"] else "",
        "modules": f"{report['matched']} of {report['of_modules']}",
        "rank": f"{report['rank']}, alpha {report['alpha']:g}",
        "numbers": f"{report['dtype']} in the file, {report['compute_dtype']} as served",
        "bytes": f"{size['disk']} on disk, {size['ram']} in RAM, {size['device']} more on the device",
        "uses": ", ".join(report["features"]),
        "proof": _proven(proof) if proof is not None else "",
    }
    for label, value in rows.items():
        if value:
            facts.add_row(Text(label, style="bold"), Text(value))
    parts: list[Any] = [facts, _modules(report, proof)]
    if report["ignored"]:
        ignored = Table("ignored", "why", box=None)
        for field, reason in report["ignored"].items():
            ignored.add_row(Text(field), Text(reason))
        parts.append(ignored)
    parts += [Text(f"note: {note}") for note in report["notes"]]
    verdict = "fits" if proof is None else "fits, and is proven"
    return Panel(Group(*parts), title=Text(f"{name} {verdict}"), title_align="left", expand=False)


def _modules(report: dict[str, Any], proof: dict[str, Any] | None) -> Table:
    errors = {} if proof is None else {(row["modules"], row["kind"]): row for row in proof["modules"]}
    table = Table(Column("modules", overflow="fold"), "", "rank", "alpha", "scaling", box=None)
    if proof is not None:
        table.add_column("error", no_wrap=True)
    for row in report["modules"]:
        extras = f" + {', '.join(row['with'])}" if "with" in row else ""
        cells = [row["modules"], row["kind"] + extras, str(row["rank"]), f"{row['alpha']:g}", f"{row['scaling']:g}"]
        if proof is not None:
            cells.append(_error(errors, row["modules"]))
        table.add_row(*map(Text, cells))
    for row in report["own_parameters"]:
        rows = f" ({row['rows']} rows)" if "rows" in row else ""
        cells = [row["parameters"], f"its own{rows}", "", "", ""]
        if proof is not None:
            cells.append(_error(errors, row["parameters"].rpartition(".")[0]))
        table.add_row(*map(Text, cells))
    return table


def _error(errors: dict[tuple[str, str], dict[str, Any]], modules: str) -> str:
    found = [row for (name, _), row in errors.items() if name == modules]
    figures = [row[figure] for row in found for figure in ("delta", "product", "own") if figure in row]
    return f"{max(figures):.1e}" if figures else ""


def _proven(proof: dict[str, Any]) -> str:
    moved = proof["divergence"]
    return (
        f"in {proof['dtype']} on {proof['device']}, largest error {proof['largest_error']:.1e} of its range (allowed "
        f"{proof['tolerance']:g}); moves the logits by {moved['mean_kl']:.3g} nats, another best token at "
        f"{moved['changed_tokens']} of {moved['positions']} positions"
    )

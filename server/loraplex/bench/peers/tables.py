"""The comparison as a table for a terminal (rich), and the lines beside it."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from loraplex.bench.tables import machine_text, number


def peers_table(result: Mapping[str, Any]) -> Table:
    """Of `PeersBench.run`. The last column: the first peer's tokens a second over this one's."""
    table = Table("peer", "C", "K", "tokens/s", "TTFT", "max", "a token", "MB", "load", "behind")
    table.title = "C clients, K adapters (0: base); median and longest time to the first token, ms; ms a token"
    rows = result["rows"]
    reference = {_cell(row): row["tokens_per_second"] for row in rows if row["peer"] == rows[0]["peer"]}
    for index, row in enumerate(rows):
        if index and row["peer"] != rows[index - 1]["peer"]:
            table.add_section()
        ours, theirs = reference.get(_cell(row)), row["tokens_per_second"]
        table.add_row(
            row["peer"],
            str(row["clients"]),
            str(row["adapters"]),
            number(theirs, 1),
            number(row["ttft_p50"], 0),
            number(row["ttft_max"], 0),
            number(row["per_token_p50"], 1),
            number((row["pss_bytes"] or 0) / 1e6, 0),
            number(row["load"], 1),
            number(ours / theirs if ours and theirs and row["peer"] != rows[0]["peer"] else None, 2),
        )
    return table


def _cell(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["clients"], row["adapters"]


def peers_notes(result: Mapping[str, Any]) -> list[str]:
    """What ran, what did not and why, and whether all served the same model."""
    machine = result["machine"]
    lines = [f"{machine['cpu']}, {machine['cores']} cores; {machine_text(machine)}"]
    lines += [f"{name}: {version}" for name, version in result["versions"].items()]
    lines += [f"SKIPPED {name}: {why}" for name, why in result["skipped"].items()]
    agreements = result["agreement"]
    for peer in list(agreements)[1:]:
        equal, asked = agreements[peer]["equal"], agreements[peer]["asked"]
        lines.append(f"{peer}: {equal} of {asked} first tokens equal {next(iter(agreements))}'s")
    return lines + [f"ERROR {error}" for error in result["errors"]]

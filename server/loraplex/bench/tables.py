"""The benchmarks' results as tables for a terminal (rich)."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def machine_text(machine: Mapping[str, Any]) -> str:
    """Of `MachineLimits.to_json`."""
    reads = ", ".join(
        f"{value / 1e9:.1f} GB/s on {threads} thread{'s' if threads != '1' else ''}"
        for threads, value in machine["bytes_per_second"].items()
    )
    cache = f" (the last-level cache is {machine['cache_bytes'] >> 20} MiB)" if machine["cache_bytes"] else ""
    flops = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in machine["flops"].items())
    threads = machine["threads"]
    return (
        f"this machine reads {reads}, over {machine['buffer_bytes'] >> 20} MiB{cache}, and computes {flops} on "
        f"{threads} thread{'s' if threads > 1 else ''}"
    )


def step_tables(result: Mapping[str, Any]) -> list[Table]:
    """Of `StepBench.run`."""
    shape = Table("batch", "adapters", "rank", "step ms", "tokens/s", "× base", "limit ms", "share", "of")
    shape.title = result["shape"]
    for row in result["rows"]:
        shape.add_row(
            str(row["batch"]),
            "1, merged" if row["merged"] else str(row["adapters"]) if row["adapters"] else "base only",
            str(row["rank"]) if row["adapters"] else "",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            number(row["ratio_to_base"], 3),
            f"{row['limit_ms']:.2f}",
            *_bound(row),
        )
    if not result["prefill"]:
        return [shape]
    prefill = Table("prompts", "tokens", "adapters", "step ms", "tokens/s", "limit ms", "share", "of")
    prefill.title = "prefill"
    for row in result["prefill"]:
        prefill.add_row(
            str(row["batch"]),
            str(row["tokens"]),
            str(row["adapters"]) if row["adapters"] else "base only",
            f"{row['step_ms']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{row['limit_ms']:.2f}",
            *_bound(row),
        )
    return [shape, prefill]


def _bound(row: Mapping[str, Any]) -> tuple[str, str]:
    """The share, and of what: of reading, or of arithmetic."""
    kind = "memory" if row["share_of_bandwidth"] >= row["share_of_flops"] else "FLOP/s"
    return f"{row['share_of_limit']:.2f}", kind


def serve_table(report: Mapping[str, Any]) -> Table:
    """Of `serve_report`."""
    table = Table("", "p50", "p90", "p99", "max", "limit", "share")
    table.title = f"{report['server']['base']} at {report['server']['url']}"
    limits, shares = report["limits"] or {}, report["shares"]
    names = {
        "time to first token, ms": ("ttft_ms", "ttft_p50"),
        "  of warm adapters": ("ttft_warm_ms", ""),
        "  of cold adapters": ("ttft_cold_ms", ""),
        "between tokens, ms": ("gap_ms", "gap_p50"),
        "time per token, ms": ("time_per_token_ms", ""),
        "whole request, ms": ("latency_ms", ""),
    }
    for title, (name, share) in names.items():
        spread = report[name]
        if spread is None or (name == "ttft_warm_ms" and report["ttft_cold_ms"] is None):
            continue
        figures = [number(spread[key], 1) for key in ("p50", "p90", "p99", "max")]
        table.add_row(title, *figures, number(limits.get(name) if share else None, 1), number(shares.get(share), 2))
    table.add_section()
    rate = number(report["tokens_per_second"], 1)
    limit, share = number(limits.get("tokens_per_second"), 1), number(shares["tokens_per_second"], 2)
    table.add_row("output tokens/s", rate, "", "", "", limit, share)
    table.add_row("requests/s", number(report["requests_per_second"], 2))
    return table


def serve_notes(report: Mapping[str, Any]) -> list[str]:
    """Lines beside the table: what was asked, and what is not as it should be."""
    workload, requests = report["workload"], report["requests"]
    lines = [
        f"{requests['good']} requests in {report['seconds']:.1f} s, {workload['arrivals']}; "
        f"{workload['prompt_tokens']} tokens in, {workload['output_tokens']} out; seed {workload['seed']}",
        f"popularity {workload['popularity']} over {len(workload['pmf'])} models: {pmf_text(workload['pmf'])}",
    ]
    if report["rates"]:
        rates = report["rates"]
        lines.append(
            f"server: {number(rates['tokens_per_step'], 1)} tokens a step; adapters found in RAM: "
            f"{_percent(rates['ram_hit_rate'])} ({rates['adapter_loads']:.0f} loads, {rates['ram_evictions']:.0f} "
            f"evictions); prefix cache hits: {_percent(rates['prefix_hit_rate'])}; "
            f"{rates['preemptions']:.0f} preemptions"
        )
    if report["starvation"]:
        starving = report["starvation"]
        lines.append(
            f"starvation: worst model {starving['worst_model']} waits {number(starving['ratio'], 2)} × the median "
            f"model's p99 time to first token (of {starving['worst_model_requests']} requests); longest wait "
            f"{starving['longest_wait_ms']:.0f} ms"
        )
    if report["machine"]:
        lines.append(machine_text(report["machine"]))
    client = report["client"]
    lines.append(f"this client: {client['cpu_share']:.0%} of a core, at most {client['late_ms_max']:.0f} ms late")
    if report["why_no_limits"]:
        lines.append(f"no limits: {report['why_no_limits']}")
    return lines + warnings_of(report)


def warnings_of(report: Mapping[str, Any]) -> list[str]:
    """What makes the figures less than they seem. Errors first."""
    workload, requests = report["workload"], report["requests"]
    lines = [f"ERROR {count} × {error}" for error, count in requests["errors"].items()]
    if requests["answered_by_another_model"]:
        lines.append(f"WARNING {requests['answered_by_another_model']} replies name another model than was asked for")
    if requests["without_usage"]:
        lines.append(f"WARNING {requests['without_usage']} replies without usage: pieces of text are counted as tokens")
    if requests["shorter_than_asked"]:
        lines.append(f"WARNING {requests['shorter_than_asked']} replies are shorter than asked for")
    if not workload["ignore_eos"]:
        lines.append("WARNING the server does not take ignore_eos: lengths are the model's own")
    if report["cached_prompt_tokens"]:
        lines.append(f"WARNING {report['cached_prompt_tokens']} prompt tokens came from a prefix cache")
    wanted = workload["cold_share"] * requests["sent"]
    if requests["cold"] < 0.8 * wanted - 2:
        lines.append(
            f"WARNING {requests['cold']} cold requests instead of {wanted:.0f}: there are not enough adapters that "
            "nobody has asked for"
        )
    rates = report["rates"]
    if rates and rates["generated_tokens"] > 1.02 * report["output_tokens"] + 64 and not requests["unfinished"]:
        lines.append("WARNING the server generated more tokens than this client asked for: it served others, too")
    if report["is_interrupted"]:
        lines.append(f"INTERRUPTED: {requests['unfinished']} requests were under way and are not counted")
    return lines


def pmf_text(pmf: Sequence[float]) -> str:
    """ "0.31 0.16 0.10 … 0.0006; the first 10 have 58 %" """
    shown = [f"{p:.2g}" for p in pmf[:4]] + (["…", f"{pmf[-1]:.2g}"] if len(pmf) > 4 else [])
    top = f"; the first 10 have {sum(pmf[:10]):.0%}" if len(pmf) > 10 else ""
    return " ".join(shown) + top


def bars_table(result: Mapping[str, Any]) -> Table:
    """Of `Bars.run` and `CudaBars.run`."""
    table = Table("bar", "limit", "measured", "met", title=result["title"])
    for row in result["bars"]:
        sign = "≥" if row["is_least"] else "≤"
        digits = 0 if row["unit"] in ("tokens/s", "ops") else 3 if row["unit"] == "×" else 2
        star = " *" if row["is_elsewhere"] else ""
        limit = f"{sign} {row['limit']:.{digits}f} {row['unit']}{star}"
        measured = row["note"] if row["measured"] is None else f"{row['measured']:.{digits}f} {row['unit']}"
        is_met = row["is_met"]
        table.add_row(row["bar"], limit, measured, "" if is_met is None else ("yes" if is_met else "NO") + star)
    return table


def bars_notes(result: Mapping[str, Any]) -> list[str]:
    """Lines beside the table."""
    return [
        machine_text(result["machine"]),
        *(f"* {note}" for note in result["notes"]),
        *(f"ERROR {error}" for error in result["errors"]),
    ]


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def eviction_table(result: Mapping[str, Any], name: str, title: str) -> Table:
    """Of `EvictionBench.run`: the figure `name` of every trace and policy."""
    settings = result["settings"]
    table = Table("trace", *result["policies"])
    table.title = f"{title}: {settings['adapters']} adapters, RAM for {settings['in_ram']} of mean size"
    for row in result["rows"]:
        table.add_row(row["trace"], *(f"{row['policies'][policy][name]:.3f}" for policy in result["policies"]))
    return table


def routing_table(result: Mapping[str, Any]) -> Table:
    """Of `RoutingBench.run`."""
    settings = result["settings"]
    table = Table("", "measured", title="routes")
    for count, taken in result["decisions_us"].items():
        for kind, microseconds in taken.items():
            table.add_row(f"a decision among {count} targets, by {kind}", f"{microseconds:.1f} µs")
    table.add_section()
    table.add_row("which revision holds, asked of the registry", f"{result['revision_us']:.0f} µs")
    for of, microseconds in result["judgements_us"].items():
        table.add_row(f"a guard's look at {of}, after ten busy minutes", f"{microseconds:.0f} µs")
    table.add_row("a change, until it is durable", f"{result['change_ms']:.1f} ms")
    of = f"{settings['routes']} routes of {settings['targets']} targets"
    table.add_row(f"loading {of}", f"{result['load_ms']:.0f} ms")
    return table


def tiers_table(result: Mapping[str, Any]) -> Table:
    """Of `TiersBench.run`."""
    settings, start, loads = result["settings"], result["start_seconds"], result["loads"]
    count = settings["adapters"]
    size = f"{result['adapter_bytes'] / 1e6:.2f} MB each"
    table = Table("", "measured", title=f"{count} registered adapters, {size}, RAM for {settings['in_ram']}")
    table.add_row("start, none registered", f"{start['none']:.2f} s")
    table.add_row(f"start, {count} registered", f"{start['all']:.2f} s")
    table.add_row("memory of an idle adapter", f"{result['idle_bytes_per_adapter']:.0f} bytes")
    table.add_row(f"a page of {settings['page']}: median", f"{result['list']['page_p50_ms']:.1f} ms")
    table.add_row("  the slowest", f"{result['list']['page_max_ms']:.1f} ms")
    for path in ("/v1/models", "/metrics"):
        table.add_row(f"{path}, all of them", f"{result['list'][path]:.1f} ms")
    table.add_section()
    for phase, milliseconds in loads["mean_ms"].items():
        table.add_row(f"a load, {phase}", f"{milliseconds:.2f} ms")
    used = [number / 1e6 for number in loads["anonymous"]]
    table.add_row(f"anonymous memory over {loads['count']} loads", " ".join(f"{value:.0f}" for value in used) + " MB")
    return table


def upload_table(result: Mapping[str, Any]) -> Table:
    """Of `UploadBench.run`."""
    settings, disk = result["settings"], result["disk_mb_s"]
    title = f"Uploads of {result['bytes'] / 1e6:.0f} MB (rank {result['rank']})"
    table = Table("", "idle server", f"{settings['streams']} streams", title=title)
    idle, beside = result["idle"], result["beside"]
    for phase in idle["phase_seconds"]:
        table.add_row(phase, *(f"{one['phase_seconds'][phase]:.2f} s" for one in (idle, beside)))
    table.add_row("to the 201, median", *(f"{one['seconds']:.2f} s" for one in (idle, beside)))
    table.add_row("the disk alone", *(f"{disk[name]:.0f} MB/s" for name in ("idle", "beside")))
    for row, rate in (("received and synced", "receive_mb_s"), ("accepted", "mb_s")):
        pairs = ((idle[rate], disk["idle"]), (beside[rate], disk["beside"]))
        table.add_row(row, *(f"{value:.0f} MB/s = {value / limit:.2f} x disk" for value, limit in pairs))
    table.add_section()
    gaps = result["gaps_ms"]
    table.add_row("between tokens, alone", "beside writes", "beside uploads")
    for name in ("p50", "p99", "max"):
        alone = gaps["alone"][name]
        others = (f"{gaps[kind][name]:.1f} ms = {gaps[kind][name] / alone:.2f} x" for kind in ("writes", "beside"))
        table.add_row(f"  {name} {alone:.1f} ms", *others)
    return table

"""save_plot: a load test as a picture (matplotlib, the extra `plot`)."""

from pathlib import Path

import numpy as np

from loraplex.bench.load import LoadResult
from loraplex.bench.server import BenchFailed


def require_plots(path: Path) -> None:
    """Raises BenchFailed when `path` cannot be written as a picture: said before the measurement, not after."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BenchFailed("--plot needs matplotlib: pip install 'loraplex[plot]'.") from None
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in known:
        raise BenchFailed(f"--plot {path}: the ending says the format; known are {', '.join(known)}.")
    if not path.resolve().parent.is_dir():
        raise BenchFailed(f"--plot {path}: the folder does not exist.")


def save_plot(result: LoadResult, title: str, path: Path) -> None:
    """Four panels: times to first token and gaps as cumulative shares, tokens a second over time, and each model's
    longest wait by its popularity."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, 2)
    good = result.good
    times = [1e3 * (outcome.first - outcome.due) for outcome in good if outcome.first is not None]
    for axis, values, name in (
        (axes[0, 0], times, "time to first token, ms"),
        (axes[0, 1], [1e3 * gap for outcome in good for gap in outcome.gaps], "between tokens, ms"),
    ):
        if values:
            axis.ecdf(values)
        axis.set(xlabel=name, ylabel="share of all", xlim=(0, None), ylim=(0, 1))
    arrivals: list[float] = []
    for outcome in good:
        if outcome.first is not None:
            arrivals += (outcome.first - result.started + np.cumsum([0.0, *outcome.gaps])).tolist()
    if arrivals:
        bins = max(1, min(60, round(result.seconds)))
        counts, edges = np.histogram(arrivals, bins=bins, range=(0, result.seconds))
        axes[1, 0].stairs(counts / np.diff(edges), edges)
    axes[1, 0].set(xlabel="seconds since the start", ylabel="pieces of text a second", ylim=(0, None))
    rank = {model: index for index, model in enumerate(result.workload.models, 1)}
    longest: dict[int, float] = {}
    for outcome in good:
        if outcome.first is not None:
            index = rank[outcome.model]
            longest[index] = max(longest.get(index, 0.0), 1e3 * (outcome.first - outcome.due))
    axes[1, 1].plot(list(longest), list(longest.values()), ".")
    axes[1, 1].set(xlabel="model, the most popular first", ylabel="longest time to first token, ms", ylim=(0, None))
    figure.savefig(path)

"""The figures as a picture, if there is matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.jails.figures import SEQUENTIAL, Figures, prefix_of

_SERIES = {
    "pss_mb": "live, after a turn (PSS an instance)",
    "pss_parked_mb": "parked (PSS an instance)",
    "machine_mb": "live, with the kernel's share and the node's own",
}


def draw(figures: Figures, names: list[str], patterns: list[str], files: list[Path]) -> bool:
    """False: there is nothing to draw with."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, (times, memory, daemon) = pyplot.subplots(1, 3, figsize=(17, 5))
    _times(times, figures, names, patterns)
    for key, label in _SERIES.items():
        points = _points(figures, key)
        if points:
            memory.plot(*zip(*points, strict=True), marker="o", label=label)
    memory.set(xscale="log", xlabel="instances on the node", ylabel="MB an instance", title="Memory")
    memory.set_ylim(bottom=0)
    for key in ("daemon_rss_mb", "jailer_rss_mb"):
        points = _points(figures, key)
        if points:
            daemon.plot(*zip(*points, strict=True), marker="o", label=key.removesuffix("_rss_mb"))
    daemon.set(xlabel="live instances", ylabel="RSS in MB", title="The node's own processes")
    daemon.set_ylim(bottom=0)
    for axes in (times, memory, daemon):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.tight_layout()
    for file in files:
        figure.savefig(file)
    pyplot.close(figure)
    return True


def _times(axes: Any, figures: Figures, names: list[str], patterns: list[str]) -> None:
    """Medians as bars, with a line up to p99."""
    width = 0.8 / len(patterns)
    for shift, pattern in enumerate(patterns):
        prefixes = [prefix_of(name, pattern) for name in names]
        shown = [(i, p) for i, p in enumerate(prefixes) if f"{p}.p50_ms" in figures]
        middle = [figures[f"{p}.p50_ms"] for _, p in shown]
        above = [figures[f"{p}.p99_ms"] - m for (_, p), m in zip(shown, middle, strict=True)]
        places = [i + (shift + 0.5) * width - 0.4 for i, _ in shown]
        label = pattern if pattern != SEQUENTIAL else "one after another"
        axes.bar(places, middle, width, yerr=[[0.0] * len(above), above], capsize=2, label=label)
    axes.set(yscale="log", ylabel="ms to the first reply: p50, up to p99", title="A fresh sandbox")
    axes.set_xticks(range(len(names)), names)


def _points(figures: Figures, key: str) -> list[tuple[int, float]]:
    found = [(n.rpartition("."), v) for n, v in figures.items()]
    return sorted((int(count), value) for (name, _, count), value in found if name == key)

"""Figures, their names and their targets: plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Figures = dict[str, float]

SEQUENTIAL = "sequential"
SHARES = {"p50_ms": 0.50, "p95_ms": 0.95, "p99_ms": 0.99}

# What each figure should be at most.
TARGETS = {
    "parked.p50_ms": 2.0,
    "parked.p99_ms": 10.0,
    "zygote.p50_ms": 15.0,
    "pss_parked_mb.1000": 2.0,
    "pss_mb.1000": 4.0,
    "daemon_rss_mb.1000": 80.0,
}
TIMES_FASTER = 100.0  # parked against bwrap, the median of each
FASTER = "bwrap_by_parked"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def prefix_of(name: str, pattern: str) -> str:
    """`parked` for its sequential starts, `parked.burst` for others."""
    return name if pattern == SEQUENTIAL else f"{name}.{pattern}"


def summary(name: str, pattern: str, seconds: Sequence[float | None]) -> Figures:
    """Of starts that took so long, or None if they failed. Percentiles are of those that succeeded."""
    prefix = prefix_of(name, pattern)
    succeeded = [each * 1000 for each in seconds if each is not None]
    found = {f"{prefix}.{key}": percentile(succeeded, share) for key, share in SHARES.items() if succeeded}
    return {**found, f"{prefix}.success": len(succeeded) / len(seconds)}


def faster(figures: Mapping[str, float]) -> Figures:
    """How many times longer the same agent takes in bwrap than in a jail that waited for it."""
    slow, fast = figures.get("bwrap.p50_ms"), figures.get("parked.p50_ms")
    return {FASTER: slow / fast} if slow and fast else {}


def verdicts(figures: Mapping[str, float]) -> list[tuple[str, float, str, bool]]:
    """Each figure that has a target: name, value, target, is it met."""
    found = [
        (name, figures[name], f"<= {most:g}", figures[name] <= most)
        for name, most in TARGETS.items()
        if name in figures
    ]
    if FASTER in figures:
        found.append((FASTER, figures[FASTER], f">= {TIMES_FASTER:g}", figures[FASTER] >= TIMES_FASTER))
    for kind in ("parked", "zygote", "exec"):
        for name, value in figures.items():
            if name.startswith(f"{kind}.") and name.endswith(".success"):
                found.append((name, value, "= 1", value == 1.0))
    return found

"""Figures of state, their names and their targets: plain values."""

from __future__ import annotations

from collections.abc import Mapping

from bench.jails.figures import Figures

# What each figure should be at most.
TARGETS = {
    "commit_by_etcd_txn": 2.0,
    "resume_same_node.p50_ms": 20.0,
    "resume_other_node_10mb.p50_ms": 150.0,
    "growth_same_change": 2.0,
    "growth_1pct": 1000.0,
}


def ratios(figures: Mapping[str, float]) -> Figures:
    """`commit_by_etcd_txn`: a small commit against a bare transaction. `growth_same_change`: how much longer
    the same change takes in 1 GB than in 10 MB. `growth_1pct`: how much longer 1 % of 1 GB takes than 1 % of
    1 MB, a thousandth of it."""
    wanted = {
        "commit_by_etcd_txn": ("commit.p50_ms", "etcd_txn.p50_ms"),
        "growth_same_change": ("commit_1gb_1mb.p50_ms", "commit_10mb_1mb.p50_ms"),
        "growth_1pct": ("commit_1gb_1pct.p50_ms", "commit_1mb_1pct.p50_ms"),
        "borg_by_commit_1gb_1pct": ("borg_1gb_1pct.p50_ms", "commit_1gb_1pct.p50_ms"),
    }
    return {
        name: figures[above] / figures[below]
        for name, (above, below) in wanted.items()
        if above in figures and below in figures
    }


def verdicts(figures: Mapping[str, float]) -> list[tuple[str, float, str, bool]]:
    """Each figure that has a target: name, value, target, is it met."""
    return [
        (name, figures[name], f"<= {most:g}", figures[name] <= most)
        for name, most in TARGETS.items()
        if name in figures
    ]

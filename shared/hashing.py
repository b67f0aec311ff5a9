"""Rendezvous hashing: which of several nodes are responsible for a key, so that all who know them agree."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def ranked(key: str, names: Iterable[str]) -> list[str]:
    """`names`, the most responsible first. One that comes or goes changes nothing among the others."""
    return sorted(names, key=lambda name: (blake3(f"{key}\0{name}".encode()).digest(), name))

"""Durations and sizes as people write them: "30s", "1.5h", "256M", "2G"."""

from __future__ import annotations

import re

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?")


def parse_duration(text: str) -> float:
    """Seconds in `text`. ValueError if it has no unit or an unknown one."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{text!r} is not a duration: write a number and ms, s, m, h or d, like "30s"')
    return float(match[1]) * _SECONDS[match[2]]


def parse_size(text: str) -> int:
    """Bytes in `text`; K, M, G and T are powers of 1024. ValueError if it is no size."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f'{text!r} is not a size: write a number and K, M, G or T, like "256M"')
    return int(float(match[1]) * _BYTES[match[2]])


def format_size(count: int) -> str:
    """The shortest exact-looking form of `count` bytes: 256M, 1.5G, 900K."""
    for unit in ("T", "G", "M", "K"):
        if count >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:.1f}".removesuffix(".0") + unit
    return str(count)

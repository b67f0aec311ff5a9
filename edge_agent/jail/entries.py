"""Entries of a tree of files as they travel to the daemon from who serves them: short JSON lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from edge_agent.state.files import Entry, Kind

_PAGE_BYTES = 256 << 10  # of JSON, at most; well under a frame with one more entry of the greatest length
_NUMBERS = 150  # bytes of an entry's JSON but for its names, at most


def to_list(entry: Entry) -> list[Any]:
    return [
        entry.path,
        entry.kind.value,
        entry.mode,
        entry.size,
        entry.mtime_ns,
        entry.ctime_ns,
        entry.inode,
        entry.target,
    ]


def from_list(values: list[Any]) -> Entry:
    path, kind, mode, size, mtime_ns, ctime_ns, inode, target = values
    return Entry(path, Kind(kind), mode, size, mtime_ns, ctime_ns, inode, target)


def pages(entries: Iterable[Entry]) -> Iterator[list[list[Any]]]:
    """The entries in lists that each fit into a frame."""
    page: list[list[Any]] = []
    size = 0
    for entry in entries:
        page.append(to_list(entry))
        size += _NUMBERS + _most_bytes(entry.path) + _most_bytes(entry.target)
        if size > _PAGE_BYTES:
            yield page
            page, size = [], 0
    if page:
        yield page


def _most_bytes(name: str) -> int:
    """Of JSON. To find out how many they are takes longer than to send them."""
    return len(name) * (2 if name.isascii() and name.isprintable() else 12)

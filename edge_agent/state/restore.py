"""Makes a tree exactly what a manifest says.

What must hold: when `restore` returns, the tree is the target, content verified; when it raises, the tree
must not be used, and nothing has been reported as restored. It may be cut off at any point and run again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from edge_agent.state.files import Entry, Files, Kind
from edge_agent.state.filling import Filling
from edge_agent.state.index import Index, Known, boot_id
from edge_agent.state.source import Source, incomplete
from edge_agent.state.threads import each_of, in_thread
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, Node

_WRITES = 8  # files at a time

_OPEN = 0o700  # what a directory's owner needs to fill and to empty it


@dataclass(frozen=True, slots=True)
class Plan:
    """What it takes, in the order in which it is done."""

    unlock: tuple[Entry, ...]  # existing directories whose mode would be in the way
    remove: tuple[str, ...]
    make_dirs: tuple[Entry, ...]
    write: tuple[FileNode, ...]
    links: tuple[LinkNode, ...]
    lock: tuple[Entry, ...]  # final modes of directories, the deepest first
    keep: tuple[Entry, ...]  # files that are right already


def plan(there: Sequence[Entry], target: Sequence[Node], index: Index | None) -> Plan:
    """What turns a tree that looks like `there` into `target`. A file is kept only if the index knows its
    content; pure, and run again after any part of the plan it leads to the same tree."""
    remove, gone = _in_the_way(there, target)
    found = {entry.path: entry for entry in there if entry.path not in gone}
    make_dirs: list[Entry] = []
    write: list[FileNode] = []
    links: list[LinkNode] = []
    lock: list[Entry] = []
    keep: list[Entry] = []
    for node in target:
        now = found.get(node.path)
        match node:
            case DirNode(path, mode):
                if now is None:
                    make_dirs.append(Entry(path, Kind.DIR, _OPEN))
                if mode != (_OPEN if now is None else now.mode | _OPEN):
                    lock.append(Entry(path, Kind.DIR, mode))
            case FileNode():
                if now is not None and _is_right(now, node, index):
                    keep.append(now)
                else:
                    write.append(node)
            case LinkNode():
                if now is None or now.target != node.target:
                    links.append(node)
            case _:
                assert_never(node)
    unlock = (
        Entry(e.path, Kind.DIR, e.mode | _OPEN)
        for e in there
        if e.kind is Kind.DIR and e.mode & _OPEN != _OPEN
    )
    return Plan(
        tuple(unlock),
        tuple(remove),
        tuple(make_dirs),
        tuple(write),
        tuple(links),
        tuple(reversed(lock)),
        tuple(keep),
    )


async def restore(
    files: Files,
    target: Sequence[Node],
    index: Index | None,
    source: Source,
    later: Filling | None = None,
) -> Index:
    """Carries out the plan. With `later`, of what is large only placeholders are put there, for it to fill.

    Returns the index of the tree. RESTORE_INCOMPLETE names what can't be had; BLOBS_UNAVAILABLE means that
    trying again may help; STATE_TOO_LARGE that what lies there is too much to look through: begin with an
    empty directory.
    """
    steps = plan(await files.scan(), target, index)
    deferred = later.choose(steps.write) if later else []
    paths = {node.path for node in deferred}
    write_now = [node for node in steps.write if node.path not in paths]
    try:
        # First all that may fail for want of the network: the tree is then still what it was.
        await source.fetch_all(write_now)
        for entry in steps.unlock:
            await files.make_dir(entry)
        for path in steps.remove:
            await files.remove(path)
        for entry in steps.make_dirs:
            await files.make_dir(entry)
        known = {}
        if index is not None:
            known = {entry.path: index.files[entry.path] for entry in steps.keep}

        async def write(node: FileNode) -> None:
            made = await _write(files, node, source)
            known[node.path] = Known.of_untouched(made, node.chunks)

        await each_of(write_now, _WRITES, write)

        async def place(node: FileNode) -> None:
            assert later is not None
            known[node.path] = await later.place(node)

        await each_of(deferred, _WRITES, place)
        for link in steps.links:
            await files.make_link(Entry(link.path, Kind.LINK, 0o777, target=link.target))
        for entry in steps.lock:
            await files.make_dir(entry)
    except OSError as error:
        raise RoostError(
            Reason.NODE_FAILED, f"the state can't be put back here: {error}", "is this node's disk full?"
        ) from error
    source.keep_soon()
    return Index(boot_id(), uploaded=True, files=known)


def _in_the_way(there: Sequence[Entry], target: Sequence[Node]) -> tuple[list[str], set[str]]:
    """What must be removed, and all that goes with it."""
    wanted = {node.path: node for node in target}
    remove: list[str] = []
    gone: set[str] = set()
    for entry in there:  # parents come first
        if entry.path.rpartition("/")[0] in gone:
            gone.add(entry.path)
        elif not _same_kind(entry, wanted.get(entry.path)):
            gone.add(entry.path)
            remove.append(entry.path)
    return remove, gone


def _same_kind(entry: Entry, node: Node | None) -> bool:
    match node:
        case None:
            return False
        case FileNode():
            return entry.kind is Kind.FILE
        case DirNode():
            return entry.kind is Kind.DIR
        case LinkNode():
            return entry.kind is Kind.LINK


def _is_right(entry: Entry, node: FileNode, index: Index | None) -> bool:
    if (entry.mode, entry.mtime_ns) != (node.mode, node.mtime_ns) or index is None:
        return False
    return index.knows(entry) == node.chunks


async def _write(files: Files, node: FileNode, source: Source) -> Entry:
    fd = await files.open_write(node.path)
    try:
        size, done = await in_thread(_copy, source, node.chunks, fd)
        for hash in node.chunks[done:]:  # the node's copy was there and proved corrupt
            blob = source.get(hash) or (await source.fetch({hash: node}, [hash]))[hash]
            size += _write_all(fd, blob.plain)
        if size != node.size:
            raise incomplete(node, f"its chunks make {size} bytes, not {node.size}")
    finally:
        os.close(fd)
    return await files.commit_write(Entry(node.path, Kind.FILE, node.mode, mtime_ns=node.mtime_ns))


def _copy(source: Source, hashes: Sequence[str], fd: int) -> tuple[int, int]:
    """Bytes and chunks that were written, up to the first that is not there as it should be."""
    size = 0
    for done, hash in enumerate(hashes):
        blob = source.get(hash)
        if blob is None:
            return size, done
        size += _write_all(fd, blob.plain)
    return size, len(hashes)


def _write_all(fd: int, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)

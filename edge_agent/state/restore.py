"""Makes a tree exactly what a manifest says.

What must hold: when `restore` returns, the tree is the target, content verified; when it raises, the tree
must not be used, and nothing has been reported as restored. It may be cut off at any point and run again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import assert_never

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import Entry, Files, Kind
from edge_agent.state.index import SETTLED_NS, Index, Known, boot_id
from edge_agent.state.threads import each_of, in_thread
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.manifest import DirNode, FileNode, LinkNode, Node, blobs_of

_FETCHED_AT_ONCE = 32  # chunks in one request
_FETCHES = 3  # requests at a time; their chunks are in memory
_WRITES = 8  # files at a time
_HELD = 16 << 20  # plain bytes in memory of what was fetched; the rest goes through the node's copies
_KEEP_SECONDS = 0.5

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
    files: Files, target: Sequence[Node], index: Index | None, chunks: ChunkStore, blobs: Blobs
) -> Index:
    """Carries out the plan; chunks that are not on this node's disk come from `blobs`.

    Returns the index of the tree. RESTORE_INCOMPLETE names what can't be had; BLOBS_UNAVAILABLE means that
    trying again may help; STATE_TOO_LARGE that what lies there is too much to look through: begin with an
    empty directory.
    """
    steps = plan(await files.scan(), target, index)
    source = _Source(chunks, blobs)
    try:
        # First all that may fail for want of the network: the tree is then still what it was.
        await source.fetch_all(steps.write)
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
            # Nothing runs in the tree yet. The first write that could be missed sets the mtime to its own
            # time, which can only be the one just set if that was now.
            racy = made.mtime_ns > made.ctime_ns - SETTLED_NS
            known[node.path] = Known.of(made, node.chunks, racy)

        await each_of(steps.write, _WRITES, write)
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


class _Source:
    """Where the chunks come from: what was just fetched, as far as it is held in memory, the node's copies,
    and the blob store."""

    def __init__(self, chunks: ChunkStore, blobs: Blobs) -> None:
        self._chunks = chunks
        self._blobs = blobs
        self._held: dict[str, Blob] = {}
        self._left = _HELD

    def get(self, hash: str) -> Blob | None:
        return self._held.get(hash) or self._chunks.get(hash)

    async def fetch_all(self, nodes: Sequence[FileNode]) -> None:
        absent = await asyncio.to_thread(self._chunks.missing, blobs_of(nodes))
        wanted: dict[str, FileNode] = {}
        for node in nodes:
            wanted |= {hash: node for hash in node.chunks if hash in absent}
        hashes = list(wanted)
        groups = [hashes[at : at + _FETCHED_AT_ONCE] for at in range(0, len(hashes), _FETCHED_AT_ONCE)]
        await each_of(groups, _FETCHES, lambda some: self.fetch(wanted, some))

    async def fetch(self, wanted: Mapping[str, FileNode], hashes: Sequence[str]) -> dict[str, Blob]:
        """`wanted` by which file; RESTORE_INCOMPLETE names one."""
        try:
            found = await self._blobs.get(hashes)
        except RoostError as error:
            if error.reason in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                blamed = next((hash for hash in hashes if hash[:12] in error.message), hashes[0])
                raise _incomplete(wanted[blamed], error.message) from error
            raise
        self._left -= sum(len(blob.plain) for blob in found.values())
        if self._left >= 0:
            self._held |= found
        else:
            await asyncio.to_thread(_put_all, self._chunks, found.values())
        return found

    def keep_soon(self) -> None:
        """What is held becomes copies of this node, when who waits for the instance has been served."""
        held = list(self._held.values())

        def keep() -> None:
            with suppress(OSError):  # they are only copies
                _put_all(self._chunks, held)

        if held:
            loop = asyncio.get_running_loop()
            loop.call_later(_KEEP_SECONDS, lambda: loop.run_in_executor(None, keep))


def _put_all(chunks: ChunkStore, blobs: Iterable[Blob]) -> None:
    for blob in blobs:
        chunks.put(blob)


async def _write(files: Files, node: FileNode, source: _Source) -> Entry:
    fd = await files.open_write(node.path)
    try:
        size, done = await in_thread(_copy, source, node.chunks, fd)
        for hash in node.chunks[done:]:  # the node's copy was there and proved corrupt
            blob = source.get(hash) or (await source.fetch({hash: node}, [hash]))[hash]
            size += _write_all(fd, blob.plain)
        if size != node.size:
            raise _incomplete(node, f"its chunks make {size} bytes, not {node.size}")
    finally:
        os.close(fd)
    return await files.commit_write(Entry(node.path, Kind.FILE, node.mode, mtime_ns=node.mtime_ns))


def _copy(source: _Source, hashes: Sequence[str], fd: int) -> tuple[int, int]:
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


def _incomplete(node: FileNode, why: str) -> RoostError:
    return RoostError(
        Reason.RESTORE_INCOMPLETE,
        f"{node.path!r} can't be restored: {why}",
        "the instance is not started with less than it had; bring back the blob, then try again",
    )

"""A tree at one point in time, as a manifest's nodes and the chunks that they need.

Two steps, as the jail is frozen during the first only: `capture` reads what changed into the node's chunk
store, `upload` brings what is new to the blob store. After `upload` everything that the manifest needs is
durable, and its root may be published. What is little may go along with the root instead (`new_blobs`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import assert_never

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import MAX_STATE, Entry, Files, Kind
from edge_agent.state.filling import Filling
from edge_agent.state.index import SETTLED_NS, Index, Known, boot_id
from edge_agent.state.threads import in_thread
from edge_agent.state.tree import write_back
from shared.content import Blob, chunks_of, hash_of
from shared.errors import Reason, RoostError
from shared.inline import MAX_BYTES
from shared.manifest import MAX_TIME, DirNode, Encoded, FileNode, LinkNode, Node
from shared.units import format_size

_BLOCK = 4096
_FEW = 16  # new chunks up to which asking what is missing costs more than sending it again
_OPEN_AT_ONCE = 16  # files
_AT_HAND = 64 << 10  # bytes that were just written, and are read from memory


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`new`: the hashes of the chunks that are not known to be durable. `fresh`: those that were read just
    now, if they are little: they need not be read again."""

    nodes: tuple[Node, ...]
    index: Index
    new: frozenset[str]
    fresh: Mapping[str, Blob]

    @property
    def committed(self) -> Index:
        """To capture the next snapshot from, once this one is durable."""
        return replace(self.index, uploaded=True)


@dataclass(frozen=True, slots=True)
class Encoding:
    """A manifest: its root, and those of its blobs that are not known to be durable."""

    root: str
    new: tuple[Blob, ...]

    @classmethod
    def of(cls, encoded: Encoded, durable: Collection[str] = ()) -> Encoding:
        new = (Blob.of(plain) for hash, plain in encoded.blobs.items() if hash not in durable)
        return cls(encoded.root, tuple(new))


class _Fresh:
    """Chunks that were read just now. They are kept in memory too, unless they become too many for that."""

    def __init__(self, chunks: ChunkStore) -> None:
        self.blobs: dict[str, Blob] = {}
        self._chunks = chunks
        self._left = MAX_BYTES

    def add(self, plain: bytes) -> str:
        hash = hash_of(plain)
        if hash not in self.blobs and self._chunks.missing([hash]):
            blob = Blob.of(plain)
            self._left -= len(blob.zstd)
            if self._left >= 0:
                self.blobs[hash] = blob
            else:
                self._chunks.put(blob)
                self.spill()
        return hash

    def spill(self) -> None:
        for blob in self.blobs.values():
            self._chunks.put(blob)
        self.blobs.clear()

    def note(self) -> None:
        """At the end: few as they are, they go where that takes no time."""
        if self.blobs:
            self._chunks.note(list(self.blobs.values()))


async def capture(
    files: Files,
    previous: Index | None,
    chunks: ChunkStore,
    now_ns: Callable[[], int] = time.time_ns,
    most_bytes: int = MAX_STATE,
    filling: Filling | None = None,
) -> Snapshot:
    """Reads the tree, which nothing may change meanwhile: the caller has frozen the jail.

    Only files that do not look as `previous` says are read. STATE_TOO_LARGE for more than `most_bytes`, or
    JAIL_FAILED if the tree did change or the node's disk fails. `now_ns` is the clock that the kernel stamps
    files by. `filling` knows what it has put there; it does nothing meanwhile.
    """
    began_ns = now_ns()
    since_ns = max((file.ctime_ns for file in previous.files.values()), default=0) if previous else began_ns
    if filling is not None:
        since_ns = max(since_ns, filling.filled_ns)
    entries, opened = await files.changed(since_ns)

    def known(entry: Entry) -> Known | None:
        if filling is not None and (known := filling.known(entry)):
            return known
        return previous.files[entry.path] if previous and previous.knows(entry) is not None else None

    try:
        return await _capture(files, entries, opened, previous, known, chunks, began_ns, most_bytes)
    finally:
        for fd in opened.values():
            os.close(fd)


async def _capture(
    files: Files,
    entries: Sequence[Entry],
    opened: dict[str, int],
    previous: Index | None,
    known_as: Callable[[Entry], Known | None],
    chunks: ChunkStore,
    began_ns: int,
    most_bytes: int,
) -> Snapshot:
    """`opened` gets what it opens, and is left with what is still open."""
    total = sum(size_on_disk(entry.size) for entry in entries)
    if total > most_bytes:
        raise RoostError(
            Reason.STATE_TOO_LARGE,
            f"the files in /state take {format_size(total)}; at most {format_size(most_bytes)} can be kept",
            "delete what need not outlive the turn, or raise resources.disk in agent.toml, up to 4G",
        )
    known: dict[str, Known] = {}
    changed: list[Entry] = []
    for entry in entries:
        if entry.kind is Kind.FILE:
            if as_before := known_as(entry):
                known[entry.path] = as_before
            else:
                changed.append(entry)
    fresh = _Fresh(chunks)
    for start in range(0, len(changed), _OPEN_AT_ONCE):
        some = changed[start : start + _OPEN_AT_ONCE]
        for entry, content in zip(some, await _read(files, some, opened, fresh), strict=True):
            racy = max(entry.mtime_ns, entry.ctime_ns) > began_ns - SETTLED_NS
            known[entry.path] = Known.of(entry, content, racy)
    with _disk_errors("what has changed"):
        fresh.note()
    nodes = tuple(_node(entry, known) for entry in entries)
    new = _new_chunks(known, previous)
    return Snapshot(nodes, Index(boot_id(), uploaded=False, files=known), new, fresh.blobs)


def _new_chunks(known: Mapping[str, Known], previous: Index | None) -> frozenset[str]:
    """Without a set of all that there is: most files are as they were."""
    before = previous.files if previous is not None and previous.uploaded else {}
    new: set[str] = set()
    for path, file in known.items():
        if file is not before.get(path):
            new.update(file.chunks)
    for file in before.values() if new else ():
        new.difference_update(file.chunks)
    return frozenset(new)


def _node(entry: Entry, known: Mapping[str, Known]) -> Node:
    match entry.kind:
        case Kind.DIR:
            return DirNode(entry.path, entry.mode)
        case Kind.LINK:
            return LinkNode(entry.path, entry.target)
        case Kind.FILE:
            # Some file systems take any time that an agent makes up.
            mtime_ns = max(-MAX_TIME, min(entry.mtime_ns, MAX_TIME))
            return FileNode(entry.path, entry.mode, mtime_ns, entry.size, known[entry.path].chunks)
        case _:
            assert_never(entry.kind)


def size_on_disk(size: int) -> int:
    """Bytes that a file of `size`, or anything else of 0, takes of a disk: about, and on all nodes alike."""
    return max(_BLOCK, -(-size // _BLOCK) * _BLOCK)


async def upload(
    snapshot: Snapshot, manifest: Encoding, chunks: ChunkStore, blobs: Blobs, again: bool = False
) -> Index:
    """Makes durable what the manifest of this snapshot needs; returns the index to capture the next from.
    `again`: after an attempt that was cut off, only what it did not bring there is sent.

    BLOBS_UNAVAILABLE if the store can't take it (try again: nothing is lost), BLOB_MISSING if the node's own
    copy of a chunk is gone (capture again, without the previous index).
    """
    wanted = set(snapshot.new)
    if again or len(wanted) > _FEW:
        wanted = await blobs.missing(wanted)
    await blobs.put(new_blobs(wanted, snapshot, manifest, chunks))
    return snapshot.committed


def new_blobs(
    wanted: Iterable[str], snapshot: Snapshot, manifest: Encoding, chunks: ChunkStore
) -> Iterator[Blob]:
    """The chunks that are `wanted`, and then what is new of the manifest. BLOB_MISSING, as `upload`."""
    for hash in sorted(wanted):
        blob = snapshot.fresh.get(hash) or chunks.get(hash)
        if blob is None:
            raise RoostError(
                Reason.BLOB_MISSING,
                f"chunk {hash[:12]} is gone from this node's disk before it could be stored",
                "check the node's disk",
            )
        yield blob
    yield from manifest.new


async def _read(
    files: Files, some: Sequence[Entry], opened: dict[str, int], fresh: _Fresh
) -> list[tuple[str, ...]]:
    """The chunks of each. What had to be opened is in `opened`, too."""
    missing = [entry.path for entry in some if entry.path not in opened]
    opening = [asyncio.create_task(files.open_read(path)) for path in missing]
    try:
        for path, one in zip(missing, opening, strict=True):
            try:
                await one
            except FileNotFoundError as error:
                raise _restless(path) from error
    finally:
        for one in opening:
            one.cancel()
        found = await asyncio.gather(*opening, return_exceptions=True)
        opened |= {path: fd for path, fd in zip(missing, found, strict=True) if isinstance(fd, int)}
    fds = [opened[entry.path] for entry in some]
    if not missing and sum(entry.size for entry in some) <= _AT_HAND:
        contents = _store_all(fds, some, fresh, write=False)  # sooner done than a thread would begin
    else:
        contents = await in_thread(_store_all, fds, some, fresh)
    for entry in some:
        os.close(opened.pop(entry.path))
    return contents


def _store_all(
    fds: Sequence[int], some: Sequence[Entry], fresh: _Fresh, write: bool = True
) -> list[tuple[str, ...]]:
    return [_store(fd, entry, fresh, write) for fd, entry in zip(fds, some, strict=True)]


def _store(fd: int, entry: Entry, fresh: _Fresh, write: bool) -> tuple[str, ...]:
    hashes: list[str] = []
    size = 0
    with _disk_errors(repr(entry.path)):
        if write:
            write_back(fd)
        for plain in chunks_of(fd, entry.size + 1):
            hashes.append(fresh.add(plain))
            size += len(plain)
    status = os.fstat(fd)
    now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if size != entry.size or now != (entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode):
        raise _restless(entry.path)
    return tuple(hashes)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RoostError(
            Reason.NODE_FAILED, f"{what} can't be read and kept: {error}", "is this node's disk full?"
        ) from error


def _restless(path: str) -> RoostError:
    return RoostError(
        Reason.JAIL_FAILED,
        f"{path!r} in /state changed while it was read",
        "nothing may write to an instance's files while its jail is frozen",
    )

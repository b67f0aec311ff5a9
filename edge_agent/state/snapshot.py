"""A tree at one point in time, as a manifest's nodes and the chunks that they need.

Two steps, as the jail is frozen during the first only: `capture` reads what changed into the node's chunk
store, `upload` brings what is new to the blob store. After `upload` everything that the manifest needs is
durable, and its root may be published.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import MAX_STATE, Entry, Files, Kind
from edge_agent.state.index import SETTLED_NS, Index, Known, boot_id, write_back
from edge_agent.state.threads import in_thread
from shared.content import Blob, chunks_of, hash_of
from shared.errors import Reason, RoostError
from shared.manifest import MAX_TIME, DirNode, Encoded, FileNode, LinkNode, Node, blobs_of
from shared.units import format_size

_FEW = 16  # new chunks up to which asking what is missing costs more than sending it again


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`new`: the hashes of the chunks that the blob store is not known to have."""

    nodes: tuple[Node, ...]
    index: Index
    new: frozenset[str]


async def capture(
    files: Files, previous: Index | None, chunks: ChunkStore, now_ns: Callable[[], int] = time.time_ns
) -> Snapshot:
    """Reads the tree, which nothing may change meanwhile: the caller has frozen the jail.

    Only files that do not look as `previous` says are read. STATE_TOO_LARGE, or JAIL_FAILED if the tree did
    change or the node's disk fails. `now_ns` is the clock that the kernel stamps files by.
    """
    began_ns = now_ns()
    entries = await files.scan()
    total = sum(entry.size for entry in entries)
    if total > MAX_STATE:
        raise RoostError(
            Reason.STATE_TOO_LARGE,
            f"the files in /state are {format_size(total)}; at most {format_size(MAX_STATE)} can be kept",
            "delete what need not outlive the turn, or put it under /tmp",
        )
    known: dict[str, Known] = {}
    nodes: list[Node] = []
    for entry in entries:
        match entry.kind:
            case Kind.DIR:
                nodes.append(DirNode(entry.path, entry.mode))
            case Kind.LINK:
                nodes.append(LinkNode(entry.path, entry.target))
            case Kind.FILE:
                same = previous.knows(entry) if previous else None
                content = same if same is not None else await _read(files, entry, chunks)
                racy = same is None and max(entry.mtime_ns, entry.ctime_ns) > began_ns - SETTLED_NS
                known[entry.path] = Known.of(entry, content, racy)
                # Some file systems take any time that an agent makes up.
                mtime_ns = max(-MAX_TIME, min(entry.mtime_ns, MAX_TIME))
                nodes.append(FileNode(entry.path, entry.mode, mtime_ns, entry.size, content))
    durable: set[str] = set()
    if previous is not None and previous.uploaded:
        durable = {chunk for file in previous.files.values() for chunk in file.chunks}
    new = frozenset(blobs_of(nodes) - durable)
    return Snapshot(tuple(nodes), Index(boot_id(), uploaded=False, files=known), new)


async def upload(
    snapshot: Snapshot, manifest: Encoded, chunks: ChunkStore, blobs: Blobs, again: bool = False
) -> Index:
    """Makes durable what the manifest of this snapshot needs; returns the index to capture the next from.
    `again`: after an attempt that was cut off, only what it did not bring there is sent.

    BLOBS_UNAVAILABLE if the store can't take it (try again: nothing is lost), BLOB_MISSING if the node's own
    copy of a chunk is gone (capture again, without the previous index).
    """
    wanted = set(snapshot.new)
    if again or len(wanted) > _FEW:
        wanted = await blobs.missing(wanted)
    await blobs.put(_blobs(wanted, manifest, chunks))
    return replace(snapshot.index, uploaded=True)


def _blobs(wanted: set[str], manifest: Encoded, chunks: ChunkStore) -> Iterator[Blob]:
    for hash in sorted(wanted):
        blob = chunks.get(hash)
        if blob is None:
            raise RoostError(
                Reason.BLOB_MISSING,
                f"chunk {hash[:12]} is gone from this node's disk before it could be stored",
                "check the node's disk",
            )
        yield blob
    for plain in manifest.blobs.values():
        yield Blob.of(plain)


async def _read(files: Files, entry: Entry, chunks: ChunkStore) -> tuple[str, ...]:
    try:
        fd = await files.open_read(entry.path)
    except FileNotFoundError as error:
        raise _restless(entry.path) from error
    try:
        return await in_thread(_store, fd, entry, chunks)
    except OSError as error:
        raise RoostError(
            Reason.NODE_FAILED, f"{entry.path!r} can't be read and kept: {error}", "is this node's disk full?"
        ) from error
    finally:
        os.close(fd)


def _store(fd: int, entry: Entry, chunks: ChunkStore) -> tuple[str, ...]:
    write_back(fd)
    hashes: list[str] = []
    size = 0
    for plain in chunks_of(fd, entry.size + 1):
        hashes.append(hash_of(plain))
        size += len(plain)
        if chunks.missing(hashes[-1:]):
            chunks.put(Blob.of(plain))
    status = os.fstat(fd)
    now = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    if size != entry.size or now != (entry.size, entry.mtime_ns, entry.ctime_ns, entry.inode):
        raise _restless(entry.path)
    return tuple(hashes)


def _restless(path: str) -> RoostError:
    return RoostError(
        Reason.JAIL_FAILED,
        f"{path!r} in /state changed while it was read",
        "nothing may write to an instance's files while its jail is frozen",
    )

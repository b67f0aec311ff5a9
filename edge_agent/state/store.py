"""All that the node does with state, in one place: the chunks on its disk, the blob store, and the manifests.

Always true: what `load` and `restore` give is what was committed, or they raise; after `upload` everything
that the manifest names is durable, so its root may be published; so it may be together with all of `little`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio

from edge_agent.state.blobs import Blobs, GrpcBlobs, Nearby
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import SIZE, ChunkStore
from edge_agent.state.files import MAX_STATE, Files
from edge_agent.state.filling import Filling, Guard, Lanes
from edge_agent.state.index import Index, boot_id
from edge_agent.state.peers import near
from edge_agent.state.restore import restore
from edge_agent.state.snapshot import Encoding, Snapshot, capture, new_blobs, upload
from edge_agent.state.source import Source
from shared import inline
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import FileNode, StateManifest, blobs_of, decode, encode, parts_of

log = logging.getLogger(__name__)

_CHANNEL_SECONDS = 2.0
FEW_FILES = 200  # whose manifest or index is encoded sooner than a thread would begin
_SETTLE_SECONDS = 0.3  # after a commit; first its user is told
_LIGHT_NODES, _LIGHT_BYTES = 16, 1 << 20
_SALVAGED_AT_ONCE = 64  # chunks in memory

Channel = Callable[[float], Awaitable[grpc.aio.Channel]]


class LinkedBlobs:
    """The blob store behind whichever coordinator holds the node's link at the moment."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def missing(self, hashes: Collection[str]) -> set[str]:
        return await (await self._blobs()).missing(hashes)

    async def put(self, blobs: Iterable[Blob]) -> None:
        await (await self._blobs()).put(blobs)

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        return await (await self._blobs()).get(hashes)

    async def _blobs(self) -> GrpcBlobs:
        return GrpcBlobs(await self._channel(_CHANNEL_SECONDS))


@dataclass(frozen=True, slots=True)
class StateStore:
    chunks: ChunkStore
    blobs: Blobs
    bundles: BundleStore
    copies: ChunkStore | None = None  # of other nodes' chunks
    lanes: Lanes = field(default_factory=Lanes)

    @classmethod
    def at(cls, data_dir: Path, blobs: Blobs, chunk_cache: int = SIZE) -> StateStore:
        """`chunk_cache`: bytes of chunks that are kept on the node's disk."""
        chunks = ChunkStore(data_dir / "daemon" / "chunks", chunk_cache)
        return cls(chunks, blobs, BundleStore(data_dir / "bundles", chunks, blobs))

    async def load(self, key: InstanceKey, version: int, root: str) -> StateManifest:
        """The manifest of a committed version. RESTORE_INCOMPLETE if it can't be had as it was."""
        if version == 0:
            return StateManifest(str(key), epoch=0, version=0)
        try:
            manifest = await decode(root, lambda hashes: self._fetch(hashes, str(key)))
        except RoostError as error:
            if error.reason in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                raise _incomplete(key, version, error.message) from error
            raise
        if (manifest.key, manifest.version) != (str(key), version):
            raise _incomplete(key, version, f"its manifest is version {manifest.version} of {manifest.key}")
        return manifest

    async def capture(
        self,
        files: Files,
        previous: Index | None,
        most_bytes: int = MAX_STATE,
        filling: Filling | None = None,
    ) -> Snapshot:
        """To be called while nothing can change the files. STATE_TOO_LARGE for more than `most_bytes`."""
        with _disk():
            return await capture(files, previous, self.chunks, most_bytes=most_bytes, filling=filling)

    async def encode(self, manifest: StateManifest, base: StateManifest | None = None) -> Encoding:
        """`base`: the version that it was made from, which is committed as `manifest.parent`. So what both
        have is sound, and durable, and is neither checked nor stored again."""
        if len(manifest.nodes) < FEW_FILES:
            return self._encode(manifest, base)
        return await asyncio.to_thread(self._encode, manifest, base)

    def _encode(self, manifest: StateManifest, base: StateManifest | None) -> Encoding:
        encoded = encode(manifest, base)
        durable: set[str] = set()
        if base is not None and manifest.parent and len(encoded.blobs) > 1:
            with suppress(OSError):  # without a copy of its root here, all is put again
                root = self.chunks.get(manifest.parent)
                durable = parts_of(root.plain) if root else durable
        return Encoding.of(encoded, durable)

    def little(self, snapshot: Snapshot, manifest: Encoding) -> list[Blob] | None:
        """All that a commit of this snapshot has to make durable, if it may go inline; None: `upload` it."""
        if len(snapshot.new) + len(manifest.new) > inline.MAX_BLOBS or not inline.fits(manifest.new):
            return None
        blobs = list(new_blobs(snapshot.new, snapshot, manifest, self.chunks))
        return blobs if inline.fits(blobs) else None

    async def upload(self, snapshot: Snapshot, manifest: Encoding, again: bool = False) -> None:
        """Makes the snapshot and its manifest durable. `again`: an earlier attempt may have brought a part of
        it there."""
        await upload(snapshot, manifest, self.chunks, self.blobs, again)

    async def keep(self, manifest: Encoding) -> None:
        """At hand for when the instance wakes here; and what the turn's files became, soon in files."""
        if len(manifest.new) == 1:
            with suppress(OSError):
                self.chunks.note(manifest.new)
        else:
            await asyncio.to_thread(self._keep, manifest.new)
        loop = asyncio.get_running_loop()
        loop.call_later(_SETTLE_SECONDS, lambda: loop.run_in_executor(None, self._settle))

    def _settle(self) -> None:
        with suppress(OSError):  # it stays where it is, for the next time
            self.chunks.settle()

    def beside(self, at_hand: Iterable[Blob]) -> StateStore:
        """The same, but for `at_hand`, which the blob store may not have yet."""
        return replace(self, blobs=Nearby({blob.hash: blob for blob in at_hand}, self.blobs))

    def is_light(self, manifest: StateManifest) -> bool:
        """Are its files so few and small, and all here, that writing them costs next to nothing?"""
        if len(manifest.nodes) > _LIGHT_NODES:
            return False
        size = sum(node.size for node in manifest.nodes if isinstance(node, FileNode))
        return size <= _LIGHT_BYTES and not self.chunks.missing(blobs_of(manifest.nodes))

    def nothing(self) -> Index:
        """The index of an empty directory: what `restore` of a version 0 into one gives."""
        return Index(boot_id(), uploaded=True)

    async def restore(
        self, files: Files, manifest: StateManifest, index: Index | None, guard: Guard | None = None
    ) -> tuple[Index, Filling | None]:
        """Puts the files back. With `guard` those that are large may be placeholders: then what fills them
        comes too, for the caller to run and close."""
        source = Source(self.chunks, near(self.blobs, manifest.key))
        with _disk():
            if guard is not None:
                filling = Filling(files, guard, source, self.lanes)
                try:
                    index = await restore(files, manifest.nodes, index, source, filling)
                except BaseException as error:
                    await filling.abandon()
                    if not isinstance(error, RoostError) or error.reason is not Reason.JAIL_FAILED:
                        raise
                    log.info("%s: nothing can come later: %s", manifest.key, error.message)
                else:
                    return index, filling if filling.unfinished else None
            return await restore(files, manifest.nodes, index, source), None

    async def tidy(self) -> None:
        """One pass: the node's copies of chunks take no more of its disk than they may."""
        with _disk():
            await asyncio.to_thread(self.chunks.tidy)

    async def salvage(self, hashes: Sequence[str]) -> int:
        """Puts those of which there are copies here into the blob store; how many they were."""
        count = 0
        for start in range(0, len(hashes), _SALVAGED_AT_ONCE):
            some = hashes[start : start + _SALVAGED_AT_ONCE]
            copies = await asyncio.to_thread(list, map(self._copy, some))
            found = [blob for blob in copies if blob is not None]
            await self.blobs.put(found)
            count += len(found)
        return count

    def _copy(self, hash: str) -> Blob | None:
        return self.chunks.get(hash) or (self.copies.get(hash) if self.copies else None)

    def _keep(self, blobs: Iterable[Blob]) -> None:
        """Only a copy, for speed: a disk that can't take it is no reason to fail."""
        with suppress(OSError):
            for blob in blobs:
                self.chunks.put(blob)

    async def _fetch(self, hashes: Sequence[str], key: str) -> dict[str, bytes]:
        found = {hash: blob.plain for hash in hashes if (blob := self.chunks.get(hash))}
        absent = [hash for hash in hashes if hash not in found]
        if absent:
            fetched = await near(self.blobs, key).get(absent)
            await asyncio.to_thread(self._keep, fetched.values())
            found.update((hash, blob.plain) for hash, blob in fetched.items())
        return found


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RoostError(
            Reason.NODE_FAILED, f"this node's disk fails: {error}", "is it full? another node may have room"
        ) from error


def _incomplete(key: InstanceKey, version: int, why: str) -> RoostError:
    return RoostError(
        Reason.RESTORE_INCOMPLETE,
        f"version {version} of {key} can't be restored: {why}",
        "the instance is not started with less than it had; bring back the blob, then try again",
    )

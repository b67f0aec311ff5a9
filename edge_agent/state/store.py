"""All that the node does with state, in one place: the chunks on its disk, the blob store, and the manifests.

Always true: what `load` and `restore` give is what was committed, or they raise; after `upload` everything
that the manifest names is durable, so its root may be published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from edge_agent.state.blobs import Blobs, GrpcBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.files import Files
from edge_agent.state.index import Index, boot_id
from edge_agent.state.restore import restore
from edge_agent.state.snapshot import Snapshot, capture, upload
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest, decode, encode

_CHANNEL_SECONDS = 2.0

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

    @classmethod
    def at(cls, data_dir: Path, channel: Channel) -> StateStore:
        chunks = ChunkStore(data_dir / "daemon" / "chunks")
        blobs = LinkedBlobs(channel)
        return cls(chunks, blobs, BundleStore(data_dir / "bundles", chunks, blobs))

    async def load(self, key: InstanceKey, version: int, root: str) -> StateManifest:
        """The manifest of a committed version. RESTORE_INCOMPLETE if it can't be had as it was."""
        if version == 0:
            return StateManifest(str(key), epoch=0, version=0)
        try:
            manifest = await decode(root, self._fetch)
        except RoostError as error:
            if error.reason in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                raise _incomplete(key, version, error.message) from error
            raise
        if (manifest.key, manifest.version) != (str(key), version):
            raise _incomplete(key, version, f"its manifest is version {manifest.version} of {manifest.key}")
        return manifest

    async def capture(self, files: Files, previous: Index | None) -> Snapshot:
        """To be called while nothing can change the files."""
        with _disk():
            return await capture(files, previous, self.chunks)

    async def upload(
        self, snapshot: Snapshot, manifest: StateManifest, again: bool = False
    ) -> tuple[str, Index]:
        """Makes the snapshot and its manifest durable; returns the manifest's root, and the index to capture
        the next snapshot from. `again`: an earlier attempt may have brought a part of it there."""
        encoded = await asyncio.to_thread(encode, manifest)
        index = await upload(snapshot, encoded, self.chunks, self.blobs, again)
        await asyncio.to_thread(self._keep, [Blob.of(plain) for plain in encoded.blobs.values()])
        return encoded.root, index

    def nothing(self) -> Index:
        """The index of an empty directory: what `restore` of a version 0 into one gives."""
        return Index(boot_id(), uploaded=True)

    async def restore(self, files: Files, manifest: StateManifest, index: Index | None) -> Index:
        with _disk():
            return await restore(files, manifest.nodes, index, self.chunks, self.blobs)

    def _keep(self, blobs: Iterable[Blob]) -> None:
        """Only a copy, for speed: a disk that can't take it is no reason to fail."""
        with suppress(OSError):
            for blob in blobs:
                self.chunks.put(blob)

    async def _fetch(self, hashes: Sequence[str]) -> dict[str, bytes]:
        found = {hash: blob.plain for hash in hashes if (blob := self.chunks.get(hash))}
        absent = [hash for hash in hashes if hash not in found]
        if absent:
            fetched = await self.blobs.get(absent)
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

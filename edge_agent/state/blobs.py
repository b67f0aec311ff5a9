"""The blob store as a node sees it: through the coordinator, never with credentials of its own.

Real: `GrpcBlobs`. Fake: `MemoryBlobs`. Both pass tests/contract/test_blobs.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import grpc.aio

from protos.v1 import blobs_pb2, blobs_pb2_grpc
from shared.content import Blob
from shared.errors import Reason, RoostError, translated

_PEER = "the blob store"
_HASHES_A_CALL = 4096  # about 270 KiB
_BLOBS_A_CALL = 64
_BYTES_A_CALL = 2 << 20  # what a slow uplink still sends within the deadline


class Blobs(Protocol):
    """Every method raises RoostError BLOBS_UNAVAILABLE when the store can't answer in time."""

    async def missing(self, hashes: Collection[str]) -> set[str]:
        """Those that the store does not have."""
        ...

    async def put(self, blobs: Iterable[Blob]) -> None:
        """When it returns, the store has them durably. Putting what is there already is no error."""
        ...

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        """All of them, or BLOB_MISSING or BLOB_CORRUPT naming one. They are held in memory: ask for a few."""
        ...


def missing_blob(hash: str) -> RoostError:
    return RoostError(
        Reason.BLOB_MISSING,
        f"the blob store does not have blob {hash[:12]}",
        "check that the store is the one it was put into, and that nobody has deleted from it",
    )


class GrpcBlobs:
    """Over a channel to a coordinator. `timeout` in seconds bounds each call; large requests make several."""

    def __init__(self, channel: grpc.aio.Channel, timeout: float = 60.0) -> None:
        self._stub = blobs_pb2_grpc.BlobsStub(channel)
        self._timeout = timeout

    async def missing(self, hashes: Collection[str]) -> set[str]:
        found: set[str] = set()
        for some in _grouped(sorted(hashes), _HASHES_A_CALL):
            with translated(Reason.BLOBS_UNAVAILABLE, _PEER):
                reply = await self._stub.Missing(blobs_pb2.MissingRequest(hashes=some), timeout=self._timeout)
            found.update(reply.hashes)
        return found & set(hashes)

    async def put(self, blobs: Iterable[Blob]) -> None:
        for some in _by_size(blobs):
            with translated(Reason.BLOBS_UNAVAILABLE, _PEER):
                await self._stub.Put(_stream(some), timeout=self._timeout)

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        found: dict[str, Blob] = {}
        for some in _grouped(list(dict.fromkeys(hashes)), _BLOBS_A_CALL):
            call = self._stub.Get(blobs_pb2.GetRequest(hashes=some), timeout=self._timeout)
            try:
                with translated(Reason.BLOBS_UNAVAILABLE, _PEER):
                    async for blob in call:
                        if blob.hash in some:  # what nobody asked for is not kept
                            found[blob.hash] = Blob.verified(blob.hash, blob.zstd)
            finally:
                call.cancel()
            for hash in some:
                if hash not in found:
                    raise missing_blob(hash)
        return {hash: found[hash] for hash in hashes}


class Nearby:
    """`blobs`, but those that are at hand already are not asked for. `at_hand` by hash."""

    def __init__(self, at_hand: Mapping[str, Blob], blobs: Blobs) -> None:
        self._at_hand = at_hand
        self._blobs = blobs

    async def missing(self, hashes: Collection[str]) -> set[str]:
        return await self._blobs.missing(hashes)

    async def put(self, blobs: Iterable[Blob]) -> None:
        await self._blobs.put(blobs)

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        found = {hash: self._at_hand[hash] for hash in hashes if hash in self._at_hand}
        if absent := [hash for hash in hashes if hash not in found]:
            found |= await self._blobs.get(absent)
        return found


class MemoryBlobs:
    """In memory. Tests reach into `kept` (compressed bytes by hash) and set `down`."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.down = False

    async def missing(self, hashes: Collection[str]) -> set[str]:
        self._check()
        return {hash for hash in hashes if hash not in self.kept}

    async def put(self, blobs: Iterable[Blob]) -> None:
        for blob in blobs:
            self._check()
            self.kept[blob.hash] = blob.zstd

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        self._check()
        found: dict[str, Blob] = {}
        for hash in hashes:
            if hash not in self.kept:
                raise missing_blob(hash)
            found[hash] = Blob.verified(hash, self.kept[hash])
        return found

    def _check(self) -> None:
        if self.down:
            raise RoostError(Reason.BLOBS_UNAVAILABLE, f"{_PEER} can't be reached")


async def _stream(blobs: list[Blob]) -> AsyncIterator[blobs_pb2.Blob]:
    for blob in blobs:
        yield blobs_pb2.Blob(hash=blob.hash, zstd=blob.zstd)


def _grouped(hashes: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(hashes), size):
        yield hashes[start : start + size]


def _by_size(blobs: Iterable[Blob]) -> Iterator[list[Blob]]:
    group: list[Blob] = []
    left = _BYTES_A_CALL
    for blob in blobs:
        if group and (len(blob.zstd) > left or len(group) == _BLOBS_A_CALL):
            yield group
            group, left = [], _BYTES_A_CALL
        group.append(blob)
        left -= len(blob.zstd)
    if group:
        yield group

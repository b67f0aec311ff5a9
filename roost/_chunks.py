"""The mesh's blobs as a command sees them: through whichever coordinator answers, verified on arrival."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence

import grpc.aio

from protos.v1 import blobs_pb2, blobs_pb2_grpc
from roost._mesh import Coordinators
from shared.content import Blob

_ASK_AT_ONCE = 5_000  # hashes in one question, far below the size limit of a message
_VERIFY_AT_ONCE = 100  # which the coordinator reads within its own deadline, also from far away
_AT_ONCE = 32  # blobs in one call, of 64 KiB on average
_SECONDS = 120.0  # for one call, over a slow line
Tell = Callable[[int], None]  # how many blobs were moved


class Chunks:
    """BLOBS_UNAVAILABLE, BLOB_MISSING, BLOB_CORRUPT, or what `Coordinators.ask` raises."""

    def __init__(self, coordinators: Coordinators) -> None:
        self._coordinators = coordinators

    async def missing(self, hashes: Collection[str]) -> set[str]:
        found: set[str] = set()
        for some in _groups(sorted(hashes), _ASK_AT_ONCE):
            request = blobs_pb2.MissingRequest(hashes=some)

            async def ask(
                channel: grpc.aio.Channel, timeout: float, request: blobs_pb2.MissingRequest = request
            ) -> blobs_pb2.MissingReply:
                return await blobs_pb2_grpc.BlobsStub(channel).Missing(request, timeout=_SECONDS)

            found.update((await self._coordinators.ask(ask, _SECONDS)).hashes)
        return found

    async def damaged(self, hashes: Collection[str]) -> dict[str, str]:
        """Those that are not there as they were put: "missing" or "corrupt"."""
        found: dict[str, str] = {}
        for some in _groups(sorted(hashes), _VERIFY_AT_ONCE):
            request = blobs_pb2.VerifyRequest(hashes=some)

            async def ask(
                channel: grpc.aio.Channel, timeout: float, request: blobs_pb2.VerifyRequest = request
            ) -> blobs_pb2.VerifyReply:
                return await blobs_pb2_grpc.BlobsStub(channel).Verify(request, timeout=_SECONDS)

            reply = await self._coordinators.ask(ask, _SECONDS)
            found |= dict.fromkeys(reply.missing, "missing") | dict.fromkeys(reply.corrupt, "corrupt")
        return found

    async def get(self, hashes: Sequence[str]) -> AsyncIterator[Blob]:
        """In the order asked, a few held in memory at a time."""
        for some in _groups(hashes, _AT_ONCE):
            for blob in await self._get(some):
                yield blob

    async def fetch(self, hashes: Sequence[str]) -> dict[str, bytes]:
        """As `shared.manifest.decode` wants it."""
        return {blob.hash: blob.plain async for blob in self.get(hashes)}

    async def put(self, blobs: Iterable[Blob]) -> None:
        group: list[Blob] = []
        for blob in blobs:
            group.append(blob)
            if len(group) == _AT_ONCE:
                await self._put(group)
                group = []
        if group:
            await self._put(group)

    async def _get(self, hashes: Sequence[str]) -> list[Blob]:
        request = blobs_pb2.GetRequest(hashes=list(dict.fromkeys(hashes)))

        async def call(channel: grpc.aio.Channel, timeout: float) -> dict[str, Blob]:
            stream = blobs_pb2_grpc.BlobsStub(channel).Get(request, timeout=_SECONDS)
            return {blob.hash: Blob.verified(blob.hash, blob.zstd) async for blob in stream}

        found = await self._coordinators.ask(call, _SECONDS)
        return [found[hash] for hash in hashes]

    async def _put(self, blobs: list[Blob]) -> None:
        async def call(channel: grpc.aio.Channel, timeout: float) -> None:
            await blobs_pb2_grpc.BlobsStub(channel).Put(_stream(blobs), timeout=_SECONDS)

        await self._coordinators.ask(call, _SECONDS)


async def _stream(blobs: list[Blob]) -> AsyncIterator[blobs_pb2.Blob]:
    for blob in blobs:
        yield blobs_pb2.Blob(hash=blob.hash, zstd=blob.zstd)


def _groups(hashes: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(hashes), size):
        yield hashes[start : start + size]

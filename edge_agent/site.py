"""The gRPC face to the other nodes of the site: copies of chunks, to keep and to give back.

Every call needs a ticket of the mesh's coordinators that lets its caller ask this very node. What is put is
verified before it is kept, and never takes more of the disk than copies may.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from edge_agent.state.chunks import ChunkStore
from protos.v1 import blobs_pb2, site_pb2_grpc
from shared import peer_tickets
from shared.content import Blob, is_hash
from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

_MOST_HASHES = 4096  # in one call
_MOST_BLOBS = 4096

_Context = grpc.aio.ServicerContext[Any, Any]


class SiteServicer(site_pb2_grpc.SiteServicer):
    def __init__(
        self,
        node: str,
        site: str,
        ticket_keys: Callable[[], Sequence[Ed25519PublicKey]],
        chunks: ChunkStore,
        copies: ChunkStore,
    ) -> None:
        """`chunks` are this node's own, which are given too; what is put goes to `copies`."""
        self._node = node
        self._site = site
        self._ticket_keys = ticket_keys
        self._chunks = chunks
        self._copies = copies

    async def Missing(self, request: blobs_pb2.MissingRequest, context: _Context) -> blobs_pb2.MissingReply:
        try:
            hashes = self._check(context, request.hashes)
            missing = await asyncio.to_thread(self._copies.missing, hashes)
            # The node's own chunks go when it pleases: they are no copies that anybody may count on.
            return blobs_pb2.MissingReply(hashes=[hash for hash in hashes if hash in missing])
        except RoostError as error:
            await error.abort(context)

    async def Put(
        self, request_iterator: AsyncIterator[blobs_pb2.Blob], context: _Context
    ) -> blobs_pb2.PutReply:
        stored = 0
        try:
            self._check(context, ())
            async for blob in request_iterator:
                stored += 1
                _check_count(stored)
                await asyncio.to_thread(self._keep, blob.hash, blob.zstd)
        except RoostError as error:
            await error.abort(context)
        except OSError as error:
            await RoostError(Reason.NODE_FAILED, f"node {self._node} can't keep copies: {error}").abort(
                context
            )
        return blobs_pb2.PutReply(stored=stored)

    async def Get(self, request: blobs_pb2.GetRequest, context: _Context) -> AsyncIterator[blobs_pb2.Blob]:
        try:
            hashes = self._check(context, request.hashes)
        except RoostError as error:
            await error.abort(context)
        for hash in hashes:
            blob = await asyncio.to_thread(self._find, hash)
            if blob is not None:
                yield blobs_pb2.Blob(hash=blob.hash, zstd=blob.zstd)

    def _check(self, context: _Context, hashes: Sequence[str]) -> Sequence[str]:
        """The hashes, if the caller may ask and they are some."""
        metadata = dict(context.invocation_metadata() or ())
        signed = metadata.get(peer_tickets.METADATA, b"")
        if not isinstance(signed, bytes):
            signed = b""
        peer_tickets.verify(signed, self._ticket_keys(), self._node, self._site, time.time())
        if len(hashes) > _MOST_HASHES or not all(map(is_hash, hashes)):
            raise RoostError(
                Reason.BAD_REQUEST, "not hashes, or too many", f"ask for at most {_MOST_HASHES} BLAKE3 hashes"
            )
        return hashes

    def _keep(self, hash: str, zstd: bytes) -> None:
        self._copies.put(Blob.verified(hash, zstd))

    def _find(self, hash: str) -> Blob | None:
        return self._chunks.get(hash) or self._copies.get(hash)


def _check_count(blobs: int) -> None:
    if blobs > _MOST_BLOBS:
        raise RoostError(Reason.BAD_REQUEST, f"more than {_MOST_BLOBS} blobs at once", "send fewer")

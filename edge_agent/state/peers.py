"""Chunks from wherever they are nearest: copies on this disk, a peer of the site, the mesh's blob store.

Always true: whoever gave a blob, it is what its hash says; a copy that is missing, damaged or late costs time
and nothing else, as the next place is asked. What the blob store turns out to lack, and was found elsewhere,
is put back into it. Nothing is durable here: `put` and `missing` speak of the blob store alone.

Who is a peer is what the coordinator says: its names, addresses and tickets. mDNS only hints who can be heard
on this LAN just now; where it is switched off, the coordinator's word is enough.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import grpc
import grpc.aio

from edge_agent.state.blobs import Blobs
from edge_agent.state.chunks import ChunkStore
from protos.v1 import blobs_pb2, site_pb2, site_pb2_grpc
from shared import peer_tickets, rpc
from shared.content import Blob
from shared.errors import Reason, RoostError, translated
from shared.hashing import ranked

log = logging.getLogger(__name__)

_ASKED = 3  # peers that are asked before the blob store
_SECONDS = 5.0  # for one answer of a peer, on a LAN
_CONNECT_SECONDS = 0.5
_AVOIDED = 10.0  # seconds for which one that failed is not asked
_MOST_LACKING = 20_000  # hashes to be looked for in the blob store; more are forgotten

_State = grpc.ChannelConnectivity
ELSEWHERE = frozenset({Reason.BLOB_MISSING, Reason.BLOB_CORRUPT, Reason.BLOBS_UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Peer:
    node: str
    address: str
    ticket: bytes


class Asked(Protocol):
    """One peer. Real: `PeerLine`. All methods raise NODE_UNREACHABLE or what the peer says."""

    async def missing(self, hashes: Sequence[str]) -> set[str]: ...

    async def put(self, blobs: Sequence[Blob]) -> None: ...

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        """Those that it has, and that are what they should be."""
        ...


class PeerLine:
    def __init__(self, peer: Peer, channel: grpc.aio.Channel) -> None:
        self._name = f"node {peer.node}"
        self._stub = site_pb2_grpc.SiteStub(channel)
        self._metadata = ((peer_tickets.METADATA, peer.ticket),)

    async def missing(self, hashes: Sequence[str]) -> set[str]:
        with translated(Reason.NODE_UNREACHABLE, self._name):
            request = blobs_pb2.MissingRequest(hashes=hashes)
            reply = await self._stub.Missing(request, timeout=_SECONDS, metadata=self._metadata)
        return set(reply.hashes) & set(hashes)

    async def put(self, blobs: Sequence[Blob]) -> None:
        async def stream() -> AsyncIterator[blobs_pb2.Blob]:
            for blob in blobs:
                yield blobs_pb2.Blob(hash=blob.hash, zstd=blob.zstd)

        with translated(Reason.NODE_UNREACHABLE, self._name):
            await self._stub.Put(stream(), timeout=_SECONDS * 4, metadata=self._metadata)

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        found: dict[str, Blob] = {}
        wanted = set(hashes)
        request = blobs_pb2.GetRequest(hashes=hashes)
        call = self._stub.Get(request, timeout=_SECONDS * 4, metadata=self._metadata)
        try:
            with translated(Reason.NODE_UNREACHABLE, self._name):
                async for blob in call:
                    if blob.hash in wanted:
                        with suppress(RoostError):  # one that is damaged there is fetched elsewhere
                            found[blob.hash] = await asyncio.to_thread(Blob.verified, blob.hash, blob.zstd)
        finally:
            call.cancel()
        return found


class Peers:
    """Those that there are, and lines to them."""

    def __init__(
        self,
        heard: Callable[[], Collection[str]] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`heard`: nodes that can be heard over mDNS just now; None: it is switched off."""
        self._heard = heard
        self._clock = clock
        self._peers: Mapping[str, Peer] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._avoided: dict[str, float] = {}  # until when

    def told(self, message: site_pb2.SitePeers) -> None:
        """By the coordinator: these, and no others."""
        self._peers = {p.node: Peer(p.node, p.address, p.ticket) for p in message.peers}

    def responsible(self, key: str) -> list[Peer]:
        """Those that answered lately, the most responsible for `key` first."""
        now = self._clock()
        heard = None if self._heard is None else set(self._heard())
        names = [
            name
            for name in self._peers
            if (heard is None or name in heard) and self._avoided.get(name, 0.0) <= now
        ]
        return [self._peers[name] for name in ranked(key, names)]

    def avoid(self, peer: Peer) -> None:
        self._avoided[peer.node] = self._clock() + _AVOIDED

    async def line(self, peer: Peer) -> Asked:
        """NODE_UNREACHABLE if there is no connection soon."""
        channel = self._channels.get(peer.address)
        if channel is None:
            channel = self._channels[peer.address] = rpc.channel(peer.address)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CONNECT_SECONDS):
                # Not `channel_ready`, which waits on when the connection was refused.
                while (state := channel.get_state(try_to_connect=True)) is not _State.TRANSIENT_FAILURE:
                    if state is _State.READY:
                        return PeerLine(peer, channel)
                    await channel.wait_for_state_change(state)
        raise RoostError(Reason.NODE_UNREACHABLE, f"node {peer.node} can't be reached")

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)


class SiteBlobs:
    """Implements Blobs. `lacking`: hashes that were had without the blob store; is it known to have them?"""

    def __init__(self, store: Blobs, copies: ChunkStore, peers: Peers, key: str = "") -> None:
        self.lacking: dict[str, bool] = {}  # True: it certainly lacks them
        self._store = store
        self._copies = copies
        self._peers = peers
        self._key = key

    def near(self, key: str) -> SiteBlobs:
        """The same, as it is best asked for what belongs to the instance `key`."""
        view = SiteBlobs(self._store, self._copies, self._peers, key)
        view.lacking = self.lacking
        return view

    async def missing(self, hashes: Collection[str]) -> set[str]:
        return await self._store.missing(hashes)

    async def put(self, blobs: Iterable[Blob]) -> None:
        await self._store.put(blobs)

    async def get(self, hashes: Sequence[str]) -> dict[str, Blob]:
        found = await asyncio.to_thread(self._copied, hashes)
        await self._ask_peers(hashes, found, _ASKED)
        self._note(found, certain=False)
        if absent := [hash for hash in hashes if hash not in found]:
            try:
                found |= await self._store.get(absent)
            except RoostError as error:
                if error.reason not in ELSEWHERE:
                    raise
                found |= await self._elsewhere(absent, error)
        return {hash: found[hash] for hash in hashes}

    async def _elsewhere(self, hashes: Sequence[str], error: RoostError) -> dict[str, Blob]:
        """What the blob store still gives one by one, and the rest from any peer at all."""
        found: dict[str, Blob] = {}
        lost: list[str] = []
        for hash in hashes:
            try:
                found |= await self._store.get([hash])
            except RoostError as again:
                if again.reason not in ELSEWHERE:
                    raise
                lost.append(hash)
                if again.reason is Reason.BLOBS_UNAVAILABLE:
                    lost = [hash for hash in hashes if hash not in found]
                    break
        repaired: dict[str, Blob] = {}
        await self._ask_peers(lost, repaired, None)
        if any(hash not in repaired for hash in lost):
            raise error
        self._note(repaired, certain=error.reason is not Reason.BLOBS_UNAVAILABLE)
        return found | repaired

    async def _ask_peers(self, hashes: Sequence[str], found: dict[str, Blob], most: int | None) -> None:
        """Adds to `found` what they have."""
        for peer in self._peers.responsible(self._key)[:most]:
            absent = [hash for hash in hashes if hash not in found]
            if not absent:
                return
            try:
                found |= await (await self._peers.line(peer)).get(absent)
            except RoostError as error:
                log.info("no copies from %s: %s", peer.node, error.message)
                self._peers.avoid(peer)

    def _copied(self, hashes: Sequence[str]) -> dict[str, Blob]:
        return {hash: blob for hash in hashes if (blob := self._copies.get(hash))}

    def _note(self, hashes: Iterable[str], certain: bool) -> None:
        for hash in hashes:
            if len(self.lacking) < _MOST_LACKING:
                self.lacking[hash] = certain or self.lacking.get(hash, False)


def near(blobs: Blobs, key: str) -> Blobs:
    """The same blobs, as they are best asked for what belongs to the instance `key`."""
    return blobs.near(key) if isinstance(blobs, SiteBlobs) else blobs

"""Asking any node, whichever coordinator holds its link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc.aio

from coordinator.cache import Cache
from coordinator.records import NodeRecord, coordinator_key
from coordinator.registry import Registry
from protos.v1 import link_pb2, peer_pb2, peer_pb2_grpc
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc, translated

RESERVE_TIMEOUT = 2.0  # seconds for a node to answer
_FORWARD_MARGIN = 0.5  # seconds more for the way through another coordinator


class Reach:
    """Reservations, moves and silence, of nodes linked here or elsewhere."""

    def __init__(self, registry: Registry, cache: Cache) -> None:
        self._registry = registry
        self._cache = cache
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def reserve(self, node: NodeRecord, reserve: link_pb2.Reserve) -> None:
        """Returns if the node keeps room; its refusal or NODE_UNREACHABLE otherwise."""
        if link := self._registry.links.get(node.info.id):
            return await link.reserve(reserve, RESERVE_TIMEOUT)
        request = peer_pb2.ForwardReserveRequest(node=node.info.id, reserve=reserve)
        stub = self._holder(node)
        try:
            await stub.ForwardReserve(request, timeout=RESERVE_TIMEOUT + _FORWARD_MARGIN)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, Reason.NODE_UNREACHABLE, f"coordinator {node.coordinator}") from error
        return None

    async def move(self, node: NodeRecord, step: link_pb2.MoveStep, timeout: float) -> link_pb2.MoveStepReply:
        """The node's part in a move, done; its refusal or NODE_UNREACHABLE otherwise."""
        if link := self._registry.links.get(node.info.id):
            return await link.move(step, timeout)
        request = peer_pb2.ForwardMoveRequest(node=node.info.id, step=step, timeout_ms=round(timeout * 1000))
        with translated(Reason.NODE_UNREACHABLE, f"coordinator {node.coordinator}"):
            call = self._holder(node).ForwardMove(request, timeout=timeout + _FORWARD_MARGIN)
            async for reply in call:
                return reply
        raise RoostError(Reason.NODE_UNREACHABLE, f"coordinator {node.coordinator} said nothing")

    async def is_fresh(self, node: NodeRecord) -> bool:
        """Is its link open at this moment, and was the node heard just now? False if nobody can say."""
        if link := self._registry.links.get(node.info.id):
            return self._registry.is_fresh(link.silence)
        try:
            request = peer_pb2.SilenceRequest(node=node.info.id)
            reply = await self._holder(node).Silence(request, timeout=_FORWARD_MARGIN)
        except (grpc.aio.AioRpcError, RoostError):
            return False
        return bool(reply.linked) and self._registry.is_fresh(reply.seconds)

    async def salvage(self, hashes: Sequence[str]) -> int:
        """Asks all nodes, wherever they are linked. What can't be reached just now is left out."""
        others = [
            c.value for c in self._cache.coordinators.records.values() if c.value.id != self._registry.me
        ]
        request = link_pb2.Salvage(hashes=hashes)
        stubs = [peer_pb2_grpc.PeerStub(self._channel(other.address)) for other in others]
        calls = (stub.ForwardSalvage(request, timeout=RESERVE_TIMEOUT) for stub in stubs)
        await asyncio.gather(*calls, return_exceptions=True)
        return self._registry.salvage(hashes)

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(None)

    def _holder(self, node: NodeRecord) -> peer_pb2_grpc.PeerAsyncStub:
        held = self._cache.coordinators.records.get(coordinator_key(node.coordinator))
        if held is None or node.coordinator == self._registry.me:
            raise RoostError(
                Reason.NODE_UNREACHABLE,
                f"node {node.info.id} is not linked just now",
                "resolve again in a moment",
            )
        return peer_pb2_grpc.PeerStub(self._channel(held.value.address))

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        return self._channels[address]


@asynccontextmanager
async def open_reach(registry: Registry, cache: Cache) -> AsyncIterator[Reach]:
    reach = Reach(registry, cache)
    try:
        yield reach
    finally:
        await reach.close()

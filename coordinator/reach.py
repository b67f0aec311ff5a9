"""Asking any node, whichever coordinator holds its link."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from coordinator.cache import Cache
from coordinator.records import NodeRecord, coordinator_key
from coordinator.registry import Registry
from protos.v1 import link_pb2, peer_pb2, peer_pb2_grpc
from shared import rpc
from shared.errors import Reason, RoostError, from_rpc

RESERVE_TIMEOUT = 2.0  # seconds for a node to answer
_FORWARD_MARGIN = 0.5  # seconds more for the way through another coordinator


class Reach:
    """Reservations and silence, of nodes linked here or elsewhere."""

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
        address = held.value.address
        if address not in self._channels:
            self._channels[address] = rpc.channel(address)
        return peer_pb2_grpc.PeerStub(self._channels[address])


@asynccontextmanager
async def open_reach(registry: Registry, cache: Cache) -> AsyncIterator[Reach]:
    reach = Reach(registry, cache)
    try:
        yield reach
    finally:
        await reach.close()

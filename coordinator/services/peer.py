"""Peer: for the other coordinators."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from coordinator.links import LinkSession
from coordinator.reach import RESERVE_TIMEOUT
from coordinator.registry import Registry
from protos.v1 import link_pb2, peer_pb2, peer_pb2_grpc
from shared.errors import Reason, RoostError


class PeerServicer(peer_pb2_grpc.PeerServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ForwardReserve(
        self, request: peer_pb2.ForwardReserveRequest, context: Any
    ) -> peer_pb2.ForwardReserveReply:
        await self._link(request.node).reserve(request.reserve, RESERVE_TIMEOUT)
        return peer_pb2.ForwardReserveReply()

    async def ForwardMove(
        self, request: peer_pb2.ForwardMoveRequest, context: Any
    ) -> AsyncIterator[link_pb2.MoveStepReply]:
        yield await self._link(request.node).move(request.step, request.timeout_ms / 1000)

    async def ForwardSalvage(self, request: link_pb2.Salvage, context: Any) -> peer_pb2.SalvageReply:
        self._registry.salvage(request.hashes)
        return peer_pb2.SalvageReply()

    async def Silence(self, request: peer_pb2.SilenceRequest, context: Any) -> peer_pb2.SilenceReply:
        link = self._registry.links.get(request.node)
        return peer_pb2.SilenceReply(linked=link is not None, seconds=link.silence if link else 0.0)

    def _link(self, node: str) -> LinkSession:
        """Never one by way of yet another coordinator: two with stale views would send it to and fro."""
        link = self._registry.links.get(node)
        if link is None:
            raise RoostError(
                Reason.NODE_UNREACHABLE, f"node {node} is not linked to {self._registry.me}", "resolve again"
            )
        return link

"""Peer: for the other coordinators."""

from __future__ import annotations

from typing import Any

from coordinator.reach import RESERVE_TIMEOUT
from coordinator.registry import Registry
from protos.v1 import peer_pb2, peer_pb2_grpc
from shared.errors import Reason, RoostError


class PeerServicer(peer_pb2_grpc.PeerServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ForwardReserve(
        self, request: peer_pb2.ForwardReserveRequest, context: Any
    ) -> peer_pb2.ForwardReserveReply:
        # Never forwarded once more: two coordinators with stale views would send it to and fro.
        link = self._registry.links.get(request.node)
        if link is None:
            raise RoostError(
                Reason.NODE_UNREACHABLE,
                f"node {request.node} is not linked to {self._registry.me}",
                "resolve again",
            )
        await link.reserve(request.reserve, RESERVE_TIMEOUT)
        return peer_pb2.ForwardReserveReply()

    async def Silence(self, request: peer_pb2.SilenceRequest, context: Any) -> peer_pb2.SilenceReply:
        link = self._registry.links.get(request.node)
        return peer_pb2.SilenceReply(linked=link is not None, seconds=link.silence if link else 0.0)

"""Resolver: for users' programs."""

from __future__ import annotations

import math
from typing import Any

from coordinator.placement import Client
from coordinator.records import position_of
from coordinator.resolving import Resolving
from coordinator.tickets import Tickets
from protos.v1 import resolver_pb2, resolver_pb2_grpc
from shared.errors import Reason, RoostError
from shared.failpoints import failpoint
from shared.identity import InstanceKey


class ResolverServicer(resolver_pb2_grpc.ResolverServicer):
    def __init__(self, resolving: Resolving, tickets: Tickets) -> None:
        self._resolving = resolving
        self._tickets = tickets

    async def Resolve(self, request: resolver_pb2.ResolveRequest, context: Any) -> resolver_pb2.ResolveReply:
        for node, rtt in request.rtt_ms.items():
            if not (math.isfinite(rtt) and rtt >= 0):
                raise RoostError(
                    Reason.BAD_REQUEST, f"a round trip of {rtt} ms to {node}", "give milliseconds, 0 or more"
                )
        client = Client(
            position_of(request.position) if request.HasField("position") else None,
            dict(request.rtt_ms),
            frozenset(request.exclude),
        )
        found = await self._resolving.resolve(InstanceKey.from_proto(request.key), client)
        failpoint("coordinator.resolve.before_answer")
        return resolver_pb2.ResolveReply(
            node=found.record.node,
            address=found.address,
            epoch=found.record.epoch,
            ticket=self._tickets.issue(found.record),
            why=found.record.why,
        )

"""Tells each node that is linked here which others of its site are up, with a ticket for each.

`reconcile` is to be run every few seconds. A node that hears nothing for long has tickets that no longer
count, and restores from the blob store. Nothing else depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coordinator.cache import Cache
from coordinator.links import LinkSession
from coordinator.records import NodeRecord, NodeState
from coordinator.registry import Registry
from coordinator.tickets import Tickets
from protos.v1 import link_pb2, site_pb2
from shared.hashing import ranked

PERIOD = 2.0  # seconds
LIFETIME = 600.0  # seconds of a ticket; the clocks of two nodes may differ by a good part of it
MOST = 16  # peers that a node is told of


@dataclass(frozen=True, slots=True)
class Told:
    """What a link was last told, and when on the monotonic clock."""

    session: LinkSession
    peers: tuple[tuple[str, str], ...]  # node, address
    at: float


def peers_of(node: NodeRecord, nodes: Iterable[NodeRecord]) -> tuple[tuple[str, str], ...]:
    """The others of its site that are up; of very many, the same ones each time."""
    there = {
        other.info.id: other.info.address
        for other in nodes
        if other.state is NodeState.UP and other.info.site == node.info.site and other.info.id != node.info.id
    }
    return tuple((name, there[name]) for name in sorted(ranked(node.info.id, there)[:MOST]))


class SitePeers:
    def __init__(
        self, cache: Cache, registry: Registry, tickets: Tickets, clock: Callable[[], float]
    ) -> None:
        self._cache = cache
        self._registry = registry
        self._tickets = tickets
        self._clock = clock
        self._told: dict[str, Told] = {}

    async def reconcile(self) -> None:
        now = self._clock()
        nodes = {s.value.info.id: s.value for s in self._cache.nodes.records.values()}
        told: dict[str, Told] = {}
        for name, session in self._registry.links.items():
            if (node := nodes.get(name)) is not None:
                peers = peers_of(node, nodes.values())
                before = self._told.get(name)
                told[name] = self._tell(node, session, peers, before, now)
        self._told = told

    def _tell(
        self,
        node: NodeRecord,
        session: LinkSession,
        peers: tuple[tuple[str, str], ...],
        before: Told | None,
        now: float,
    ) -> Told:
        if before is not None and before.session is session and now - before.at < LIFETIME / 3:
            if before.peers == peers:
                return before
        elif before is None and not peers:
            return Told(session, peers, now)
        message = site_pb2.SitePeers(
            peers=[
                site_pb2.SitePeer(
                    node=name,
                    address=address,
                    ticket=self._tickets.for_peer(node.info.id, name, node.info.site, LIFETIME),
                )
                for name, address in peers
            ]
        )
        session.send(link_pb2.LinkDown(peers=message))
        return Told(session, peers, now)

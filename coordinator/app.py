"""The coordinator, put together. Only this file constructs; everything else receives."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection

from coordinator import site_peers
from coordinator.alarms import Alarms
from coordinator.blobs import BlobsServicer, BlobStore, open_blob_store
from coordinator.cache import Cache
from coordinator.collecting.collector import Collector, Settings
from coordinator.collecting.marking import Marker
from coordinator.collecting.rounds import Rounds
from coordinator.config import CoordinatorConfig
from coordinator.inline import PERIOD as INLINE_PERIOD
from coordinator.inline import InlineCommits
from coordinator.journal import Journals
from coordinator.manifests import Manifests
from coordinator.mover import PERIOD, Mover
from coordinator.moves import Moves
from coordinator.ownership import Ownership
from coordinator.presence import Presence
from coordinator.reach import Reach, open_reach
from coordinator.records import CoordinatorRecord
from coordinator.registry import Registry, Timing
from coordinator.resolving import Resolving
from coordinator.services.admin import AdminServicer
from coordinator.services.guard import Guard
from coordinator.services.link import LinkServicer
from coordinator.services.peer import PeerServicer
from coordinator.services.resolver import ResolverServicer
from coordinator.services.state import StateServicer
from coordinator.site_peers import SitePeers
from coordinator.store.base import Store
from coordinator.store.etcd import open_etcd
from coordinator.tickets import Tickets
from coordinator.timers import Timers
from coordinator.unused import UnusedPlacements
from coordinator.watching import CachedView
from protos.v1 import (
    admin_pb2_grpc,
    blobs_pb2_grpc,
    link_pb2_grpc,
    peer_pb2_grpc,
    resolver_pb2_grpc,
    state_pb2_grpc,
)
from shared import rpc
from shared.config import ConfigError
from shared.errors import Reason, RoostError
from shared.lifecycle import Services, notify, wait_for_stop
from shared.reconcile import ReconcileLoop

log = logging.getLogger(__name__)

_STORE_TIMEOUT = 2.0  # seconds for each answer of etcd, well within the deadline of a call
_START_PAUSE = 0.5  # seconds between attempts to reach etcd at the start
_ALARM_PERIOD = 0.5  # seconds: a timer is that much late at most, if there is room
_LOOK_FOR_GARBAGE = 600.0  # seconds between looks whether it is time to collect
_STOP_GRACE = 1.0  # seconds for calls that are under way when the coordinator stops
_SERVICES = ("Resolver", "Link", "Admin", "Blobs", "State", "Peer")


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs, beside the server."""

    cache: Cache
    presence: Presence
    registry: Registry
    ownership: Ownership
    resolving: Resolving
    reach: Reach
    moves: Moves
    mover: Mover
    site_peers: SitePeers
    tickets: Tickets
    unused: UnusedPlacements
    blobs: BlobStore
    inline: InlineCommits
    manifests: Manifests
    rounds: Rounds
    collector: Collector
    timing: Timing
    journals: Journals
    timers: Timers
    alarms: Alarms


class Readiness:
    """Calls are served once etcd has been heard; healthy is who also holds its lease there."""

    def __init__(self, config: CoordinatorConfig, parts: Parts, address: str) -> None:
        self.reached = asyncio.Event()
        self.servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # public by its own account
        self._config = config
        self._parts = parts
        self._address = address
        self._told: bool | None = None

    async def start(self) -> None:
        """Waits for etcd, saying so. Returns when calls can be served."""
        while True:
            try:
                await self._parts.tickets.load()
                break
            except RoostError as error:
                log.warning("waiting for etcd: %s", error.message)
                await asyncio.sleep(_START_PAUSE)
        await self._parts.cache.wait_listed()
        self.reached.set()

    async def tell(self) -> None:
        """One pass: tells load balancers, the service manager and whoever reads the ready file."""
        serving = self.reached.is_set() and self._parts.presence.vouches(time.monotonic())
        if serving == self._told:
            return
        status = HealthCheckResponse.SERVING if serving else HealthCheckResponse.NOT_SERVING
        for name in ("", *(f"roost.v1.{s}" for s in _SERVICES)):
            await self.servicer.set(name, status)
        if serving and self._config.ready_file is not None:
            partial = self._config.ready_file.with_suffix(".partial")
            partial.write_text(self._address + "\n")
            os.replace(partial, self._config.ready_file)
        if serving:
            notify("READY=1")
        log.info("serving at %s" if serving else "not serving at %s", self._address)
        self._told = serving


@asynccontextmanager
async def running(config: CoordinatorConfig) -> AsyncIterator[str]:
    """A coordinator, for as long as the block lasts; gives the address that it listens on.

    It may not serve yet: its health says so. ConfigError for a bad `blobs`, OSError if the blob store's
    directory can't be made or the address is taken.
    """
    try:
        blobs = open_blob_store(config.blobs)
    except ValueError as error:
        raise ConfigError(f"blobs: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise OSError(f"blobs: {config.blobs} can't be used: {error}") from error
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_etcd(config.etcd))
        # The server asks for readiness before there is any: it is made first, for its port.
        ready: list[Readiness] = []
        server = rpc.server([Guard(lambda: _not_ready(ready[0], config))])
        address = rpc.bind(server, config.listen)
        parts = await _assemble(stack, config, store, blobs, config.advertise or address)
        ready.append(Readiness(config, parts, address))
        await ready[0].tell()
        _add_services(server, store, parts, ready[0])
        services = await stack.enter_async_context(Services())
        _start(services, config, parts, ready[0])
        stack.push_async_callback(_stop, server, parts, ready[0])
        await server.start()
        yield address


async def run(config: CoordinatorConfig) -> None:
    """Until SIGTERM or SIGINT."""
    async with running(config):
        await wait_for_stop(asyncio.Event())
        notify("STOPPING=1")


async def _assemble(
    stack: AsyncExitStack, config: CoordinatorConfig, store: Store, blobs: BlobStore, address: str
) -> Parts:
    timing = Timing(config.heartbeat, config.node_ttl)
    cache = Cache(store)
    presence = Presence(store, CoordinatorRecord(config.id, address), config.lease_ttl, time.monotonic)
    rounds = Rounds(store, cache, _STORE_TIMEOUT)
    ownership = Ownership(store, cache, time.time, _STORE_TIMEOUT, rounds)
    registry = Registry(store, cache, ownership, presence, timing, time.monotonic)
    cache.on_move = registry.evict_moved
    reach = await stack.enter_async_context(open_reach(registry, cache))
    # A node keeps room for as long as the ticket that leads to it is of use.
    resolving = Resolving(store, cache, ownership, reach, hold=config.ticket_lifetime)
    inline = InlineCommits(store, blobs, time.monotonic, _STORE_TIMEOUT)
    moves = Moves(ownership, resolving, reach, inline, config.ticket_lifetime, time.monotonic)
    stack.push_async_callback(moves.close)
    settle = config.rebalance_after if config.rebalance else None
    mover = Mover(cache, presence, resolving, moves, settle, time.monotonic)
    unused = UnusedPlacements(cache, registry, ownership, config.ticket_lifetime, time.monotonic)
    tickets = Tickets(store, config.ticket_lifetime, time.time)
    journals = Journals(store, ownership, _STORE_TIMEOUT)
    timers = Timers(store, cache.timers_of, time.time, _STORE_TIMEOUT)
    view = CachedView(cache, registry)
    alarms = Alarms(config.id, view, timers, resolving, view, time.time)
    stack.push_async_callback(alarms.close)
    peers = SitePeers(cache, registry, tickets, time.monotonic)
    manifests = Manifests(blobs)
    marker = Marker(store, manifests, inline)
    settings = Settings(config.gc.every, config.gc.grace, config.gc.rate)
    collector = Collector(config.id, store, blobs, marker, rounds, settings)
    return Parts(
        cache=cache,
        presence=presence,
        registry=registry,
        ownership=ownership,
        resolving=resolving,
        reach=reach,
        moves=moves,
        mover=mover,
        site_peers=peers,
        tickets=tickets,
        unused=unused,
        blobs=blobs,
        inline=inline,
        manifests=manifests,
        rounds=rounds,
        collector=collector,
        timing=timing,
        journals=journals,
        timers=timers,
        alarms=alarms,
    )


def _add_services(server: grpc.aio.Server, store: Store, parts: Parts, ready: Readiness) -> None:
    resolver = ResolverServicer(parts.resolving, parts.tickets)
    resolver_pb2_grpc.add_ResolverServicer_to_server(resolver, server)
    link = LinkServicer(
        parts.registry,
        parts.ownership,
        parts.resolving,
        parts.tickets,
        parts.timing,
        parts.journals,
        parts.timers,
        parts.inline,
    )
    link_pb2_grpc.add_LinkServicer_to_server(link, server)
    admin = AdminServicer(
        store,
        parts.cache,
        parts.registry,
        parts.resolving,
        parts.moves,
        parts.mover,
        parts.journals,
        parts.rounds,
    )
    admin_pb2_grpc.add_AdminServicer_to_server(admin, server)
    state = StateServicer(
        store,
        parts.ownership,
        parts.resolving,
        parts.manifests,
        parts.inline,
        parts.cache,
        parts.collector,
        parts.reach.salvage,
    )
    state_pb2_grpc.add_StateServicer_to_server(state, server)
    blobs_pb2_grpc.add_BlobsServicer_to_server(
        BlobsServicer(parts.blobs, lambda: parts.cache.gc_round), server
    )
    peer_pb2_grpc.add_PeerServicer_to_server(PeerServicer(parts.registry), server)
    health_pb2_grpc.add_HealthServicer_to_server(ready.servicer, server)
    names = [f"roost.v1.{s}" for s in _SERVICES]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)


def _start(services: Services, config: CoordinatorConfig, parts: Parts, ready: Readiness) -> None:
    parts.cache.start(services)
    registry = ReconcileLoop("registry", parts.registry.reconcile, config.heartbeat)
    parts.registry.on_goodbye = registry.wake
    loops = (
        registry,
        ReconcileLoop("site peers", parts.site_peers.reconcile, site_peers.PERIOD),
        ReconcileLoop("mover", parts.mover.reconcile, PERIOD),
        # Often enough that a renewal which times out can be made good before the lease is over.
        ReconcileLoop("presence", parts.presence.keep, config.lease_ttl / 4),
        ReconcileLoop("unused placements", parts.unused.reconcile, config.ticket_lifetime / 4),
        ReconcileLoop("timers", parts.alarms.reconcile, _ALARM_PERIOD),
        ReconcileLoop("inline commits", parts.inline.reconcile, INLINE_PERIOD),
        ReconcileLoop("health", ready.tell, min(0.25, config.heartbeat)),
    )
    for loop in loops:
        services.start(loop.name, loop.run())
    if config.gc.every > 0:
        services.start("collect", _collect(parts, config.gc.every))
    services.start("pulse", _pulse(parts.registry, config.node_ttl / 10))
    services.start("start", _start_once(ready))


async def _pulse(registry: Registry, every: float) -> None:
    while True:
        registry.beat()
        await asyncio.sleep(every)


async def _collect(parts: Parts, every: float) -> None:
    """Not at once: coordinators often start when there is a lot to do."""
    await parts.cache.wait_listed()
    pause = min(every / 4, _LOOK_FOR_GARBAGE)
    await asyncio.sleep(pause)
    await ReconcileLoop("collect", parts.collector.reconcile, pause).run()


async def _start_once(ready: Readiness) -> None:
    await ready.start()
    await asyncio.Event().wait()  # a service never returns


async def _stop(server: grpc.aio.Server, parts: Parts, ready: Readiness) -> None:
    """Nodes and load balancers are told first, then calls under way may end, then the lease goes."""
    await ready.servicer.enter_graceful_shutdown()
    stopping = RoostError(
        Reason.COORDINATOR_UNREACHABLE, "this coordinator is stopping", "register with another one"
    )
    parts.registry.end_all(stopping)
    await server.stop(_STOP_GRACE)
    await parts.presence.leave()


def _not_ready(ready: Readiness, config: CoordinatorConfig) -> RoostError | None:
    if ready.reached.is_set():
        return None
    return RoostError(
        Reason.STORE_UNAVAILABLE,
        f"coordinator {config.id} is still waiting for etcd at {', '.join(config.etcd)}",
        "check that etcd runs there; the coordinator goes on by itself once it does",
    )

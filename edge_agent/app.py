"""Puts a node's daemon together. The only place that constructs; everything else receives."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_agent import pressure
from edge_agent.attach import AttachServicer
from edge_agent.commits import Commits
from edge_agent.config import CA_FILE, CREDENTIALS, EdgeConfig
from edge_agent.copier import PERIOD as COPIER_PERIOD
from edge_agent.copier import Copier
from edge_agent.discovery import Discovery
from edge_agent.egress.addresses import networks
from edge_agent.egress.credentials import Credentials
from edge_agent.egress.outside import Outside
from edge_agent.egress.proxy import Egress
from edge_agent.jail.client import JailerClient
from edge_agent.link import Link
from edge_agent.packages import Packages
from edge_agent.phases import Parts
from edge_agent.records import Records
from edge_agent.relief import ReliefLoop
from edge_agent.reservations import Reservations
from edge_agent.site import SiteServicer
from edge_agent.starts import PERIOD, Starts
from edge_agent.state.chunks import PERIOD as CHUNKS_PERIOD
from edge_agent.state.copies import CopyStore
from edge_agent.state.peers import Peers, SiteBlobs
from edge_agent.state.store import LinkedBlobs, StateStore
from edge_agent.supervisor import Supervisor
from edge_agent.tasks import Tasks
from edge_agent.tenure import Tenure
from protos.v1 import attach_pb2, attach_pb2_grpc, common_pb2, site_pb2, site_pb2_grpc
from shared import rpc
from shared.identity import InstanceKey
from shared.lifecycle import Services, notify, wait_for_stop
from shared.reconcile import ReconcileLoop
from shared.resources import Resources, devices_of
from shared.wheels import Platform

log = logging.getLogger(__name__)

_TENURE_PERIOD = 0.2
_TIDY_PERIOD = 0.5
_FINISH_TURNS_SECONDS = 10.0


async def run(config: EdgeConfig, jailer: socket.socket) -> None:
    """Until SIGTERM or SIGINT. Jails are left to the jailer, which outlives this process."""
    stop = asyncio.Event()
    server = rpc.server()
    bound = rpc.bind(server, config.listen)
    capacity = _capacity(config)
    info = _node_info(config, config.advertise or bound, capacity)
    records = Records(config.data_dir / "daemon" / "records.db")
    discovery = Discovery(config.node, config.site, bound, info.address)
    tenure = Tenure()
    link = Link(config.node, config.coordinators, tenure)
    async with JailerClient(jailer) as jails:
        site = _site(config, link, discovery)
        state = site.state
        reservations = Reservations(config.node, capacity)
        egress = _egress(config)
        starts = Starts(jails, reservations, egress, time.monotonic, lambda: starting.wake("a start"))
        packages = Packages(jails, config.data_dir / "bundles", config.data_dir / "daemon" / "packages")
        starting = ReconcileLoop("starts", starts.reconcile, PERIOD)
        parts = Parts(
            node=config.node,
            jails=jails,
            state=state,
            commits=Commits(state, link),
            records=records,
            control=link,
            reservations=reservations,
            tenure=tenure,
            clock=time.monotonic,
            starts=starts,
            tasks=Tasks(jails, reservations, tenure, time.monotonic),
            egress=egress,
            packages=packages,
            offer=site.offer,
        )
        supervisor = Supervisor(info, parts, lambda: [peer.node for peer in discovery.peers])
        await supervisor.adopt()
        relief = ReliefLoop(pressure.MachineMemory().read, supervisor, starts, time.monotonic)
        _add_services(
            server, AttachServicer(config.node, supervisor, lambda: link.ticket_keys), site.servicer
        )
        await server.start()
        log.info("node %s serves at %s with room for %s", config.node, bound, capacity)
        notify("READY=1")
        try:
            async with Services() as services:
                services.start("link", link.run(supervisor))
                services.start("tenure", _loop("tenure", supervisor.suspend_or_resume, _TENURE_PERIOD))
                services.start("tidy", _loop("tidy", supervisor.tidy, _TIDY_PERIOD))
                services.start("chunks", _loop("chunks", site.state.tidy, CHUNKS_PERIOD))
                services.start("starts", starting.run())
                services.start("relief", _loop("relief", relief.reconcile, pressure.PERIOD))
                services.start("site", site.copying.run())
                services.start("jailer", jails.closed())
                if config.mdns:
                    services.start("mdns", discovery.run())
                await wait_for_stop(stop)
                notify("STOPPING=1")
                await supervisor.finish_turns(_FINISH_TURNS_SECONDS)
                await link.goodbye()
                await server.stop(grace=1.0)
        finally:
            await egress.aclose()
            await starts.close()
            await packages.close()
            await site.peers.close()
            records.close()


async def _loop(name: str, one_pass: Callable[[], Awaitable[None]], period: float) -> None:
    await ReconcileLoop(name, one_pass, period).run()


@dataclass(frozen=True, slots=True)
class _Site:
    """The node's state, and what it has to do with other nodes of the site."""

    state: StateStore
    peers: Peers
    copier: Copier
    copying: ReconcileLoop
    servicer: SiteServicer

    def offer(self, key: InstanceKey, version: int, root: str) -> None:
        self.copier.offer(key, version, root)
        self.copying.wake("a commit")


def _site(config: EdgeConfig, link: Link, discovery: Discovery) -> _Site:
    def heard() -> list[str]:
        return [peer.node for peer in discovery.peers]

    peers = Peers(heard if config.mdns else None)
    link.on_peers = peers.told
    copies = CopyStore(config.data_dir / "daemon" / "copies", config.peers.disk)
    blobs = SiteBlobs(LinkedBlobs(link.channel), copies, peers)
    state = replace(StateStore.at(config.data_dir, blobs, config.chunk_cache), copies=copies)
    copier = Copier(state, blobs, peers, config.peers.copies, config.peers.bandwidth)
    copying = ReconcileLoop("site", copier.reconcile, COPIER_PERIOD)
    servicer = SiteServicer(config.node, config.site, lambda: link.ticket_keys, state.chunks, copies)
    return _Site(state, peers, copier, copying, servicer)


def _capacity(config: EdgeConfig) -> Resources:
    has = config.capacity
    devices = devices_of({name: device.count for name, device in config.devices.items()})
    return Resources(has.memory, round(has.cpu * 1000), has.pids, devices)


def _egress(config: EdgeConfig) -> Egress:
    """The files are where the jailer put them, in this process's root."""
    ca_file = CA_FILE if config.egress.ca_file else None
    outside = Outside(networks(config.egress.private_networks), ca_file)
    return Egress(outside, Credentials(CREDENTIALS, config.egress.credential))


def _node_info(config: EdgeConfig, address: str, capacity: Resources) -> common_pb2.NodeInfo:
    position = config.position
    return common_pb2.NodeInfo(
        id=config.node,
        role=common_pb2.Role.Value(config.role.value.upper()),
        site=config.site,
        address=address,
        position=common_pb2.Position(latitude=position.latitude, longitude=position.longitude)
        if position
        else None,
        capacity=capacity.to_proto(),
        api_version=rpc.API_VERSION,
        started_id=uuid.uuid4().hex,
        platform=str(Platform.here()),
    )


def _add_services(server: grpc.aio.Server, attach: AttachServicer, site: SiteServicer) -> None:
    attach_pb2_grpc.add_AttachServicer_to_server(attach, server)
    site_pb2_grpc.add_SiteServicer_to_server(site, server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    name = attach_pb2.DESCRIPTOR.services_by_name["Attach"].full_name
    copies = site_pb2.DESCRIPTOR.services_by_name["Site"].full_name
    reflection.enable_server_reflection([name, copies, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

"""Puts a node's daemon together. The only place that constructs; everything else receives."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import uuid
from collections.abc import Awaitable, Callable

import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edge_agent.attach import AttachServicer
from edge_agent.commits import Commits
from edge_agent.config import EdgeConfig
from edge_agent.discovery import Discovery
from edge_agent.jail.client import JailerClient
from edge_agent.link import Link
from edge_agent.phases import Parts
from edge_agent.records import Records
from edge_agent.reservations import Reservations
from edge_agent.starts import PERIOD, Starts
from edge_agent.state.store import StateStore
from edge_agent.supervisor import Supervisor
from edge_agent.tenure import Tenure
from protos.v1 import attach_pb2, attach_pb2_grpc, common_pb2
from shared import rpc
from shared.lifecycle import Services, notify, wait_for_stop
from shared.reconcile import ReconcileLoop
from shared.resources import Resources

log = logging.getLogger(__name__)

_TENURE_PERIOD = 0.2
_TIDY_PERIOD = 0.5
_FINISH_TURNS_SECONDS = 10.0


async def run(config: EdgeConfig, jailer: socket.socket) -> None:
    """Until SIGTERM or SIGINT. Jails are left to the jailer, which outlives this process."""
    stop = asyncio.Event()
    server = rpc.server()
    bound = rpc.bind(server, config.listen)
    capacity = Resources(config.capacity.memory, round(config.capacity.cpu * 1000), config.capacity.pids)
    info = _node_info(config, config.advertise or bound, capacity)
    records = Records(config.data_dir / "daemon" / "records.db")
    discovery = Discovery(config.node, config.site, bound, info.address)
    tenure = Tenure()
    link = Link(config.node, config.coordinators, tenure)
    async with JailerClient(jailer) as jails:
        state = StateStore.at(config.data_dir, link.channel)
        reservations = Reservations(config.node, capacity)
        starts = Starts(jails, reservations, time.monotonic, lambda: starting.wake("a start"))
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
        )
        supervisor = Supervisor(info, parts, lambda: [peer.node for peer in discovery.peers])
        await supervisor.adopt()
        _add_services(server, AttachServicer(config.node, supervisor, lambda: link.ticket_keys))
        await server.start()
        log.info("node %s serves at %s with room for %s", config.node, bound, capacity)
        notify("READY=1")
        try:
            async with Services() as services:
                services.start("link", link.run(supervisor))
                services.start("tenure", _loop("tenure", supervisor.suspend_or_resume, _TENURE_PERIOD))
                services.start("tidy", _loop("tidy", supervisor.tidy, _TIDY_PERIOD))
                services.start("starts", starting.run())
                services.start("jailer", jails.closed())
                if config.mdns:
                    services.start("mdns", discovery.run())
                await wait_for_stop(stop)
                notify("STOPPING=1")
                await supervisor.finish_turns(_FINISH_TURNS_SECONDS)
                await server.stop(grace=1.0)
        finally:
            await starts.close()
            records.close()


async def _loop(name: str, one_pass: Callable[[], Awaitable[None]], period: float) -> None:
    await ReconcileLoop(name, one_pass, period).run()


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
    )


def _add_services(server: grpc.aio.Server, attach: AttachServicer) -> None:
    attach_pb2_grpc.add_AttachServicer_to_server(attach, server)
    healthy = health.aio.HealthServicer()  # type: ignore[attr-defined]  # not in its stubs
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    name = attach_pb2.DESCRIPTOR.services_by_name["Attach"].full_name
    reflection.enable_server_reflection([name, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

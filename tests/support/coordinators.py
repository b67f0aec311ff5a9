"""Coordinators for system tests: in this process or as their own, and the calls that tests make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from coordinator.app import running
from coordinator.config import CoordinatorConfig
from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2, resolver_pb2, resolver_pb2_grpc
from shared import rpc
from shared.config import Duration
from shared.errors import Reason, RoostError, from_rpc
from tests.support.eventually import eventually
from tests.support.fake_node import FakeNode
from tests.support.process import Process

HEARTBEAT, TTL = 0.3, 1.5
POLICY = """
[agent]
name = "chef"
[run]
entry = "chef:agent"
[resources]
memory = "100M"
cpu = 0.1
pids = 10
"""


def key(user: str, agent: str = "chef") -> common_pb2.InstanceKey:
    return common_pb2.InstanceKey(tenant="acme", agent=agent, user=user)


@dataclass
class Caller:
    """A client of one coordinator. Errors come as RoostError."""

    address: str
    channel: grpc.aio.Channel

    async def resolve(
        self, user: str, timeout: float = 10.0, agent: str = "chef", **options: object
    ) -> resolver_pb2.ResolveReply:
        request = resolver_pb2.ResolveRequest(key=key(user, agent), **options)  # type: ignore[arg-type]
        return await self._call(resolver_pb2_grpc.ResolverStub(self.channel).Resolve, request, timeout)

    async def deploy(
        self, policy: str = POLICY, name: str = "chef", root: str = "ab" * 32
    ) -> admin_pb2.DeployReply:
        agent = common_pb2.AgentSpec(tenant="acme", name=name, policy_toml=policy, bundle_root=root)
        return await self.admin("Deploy", admin_pb2.DeployRequest(agent=agent))

    async def status(self) -> admin_pb2.StatusReply:
        return await self.admin("Status", admin_pb2.StatusRequest())

    async def node(self, node: str) -> admin_pb2.NodeStatus:
        found = [n for n in (await self.status()).nodes if n.node.id == node]
        return found[0] if found else admin_pb2.NodeStatus(state="absent")

    async def instance(self, user: str) -> admin_pb2.InstanceStatus:
        return next(i for i in (await self.status()).instances if i.key.user == user)

    async def admin(self, method: str, request: object, timeout: float = 5.0) -> object:
        return await self._call(getattr(admin_pb2_grpc.AdminStub(self.channel), method), request, timeout)

    async def _call(self, method: object, request: object, timeout: float) -> object:
        try:
            return await method(request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, Reason.COORDINATOR_UNREACHABLE, self.address) from error

    async def wait_nodes(self, *nodes: FakeNode, timeout: float = 10.0) -> None:
        """Until this coordinator sees all of them up."""

        async def up() -> bool:
            try:
                return all([(await self.node(n.id)).state == "up" for n in nodes])
            except RoostError:
                return False

        await eventually(up, timeout, f"nodes {[n.id for n in nodes]} up")


def config(
    name: str,
    etcd: str,
    directory: Path,
    listen: str = "127.0.0.1:0",
    ttl: float = TTL,
    ticket_lifetime: float = 60.0,
) -> CoordinatorConfig:
    return CoordinatorConfig(
        id=name,
        etcd=(etcd,),
        blobs=f"file://{directory}/blobs",
        listen=listen,
        heartbeat=Duration(min(HEARTBEAT, ttl / 4)),
        node_ttl=Duration(ttl),
        lease_ttl=Duration(max(1.0, ttl)),
        ticket_lifetime=Duration(ticket_lifetime),
    )


@asynccontextmanager
async def calling(address: str) -> AsyncIterator[Caller]:
    async with rpc.channel(address) as channel:
        yield Caller(address, channel)


@asynccontextmanager
async def in_process(settings: CoordinatorConfig) -> AsyncIterator[Caller]:
    """A coordinator in this process, that serves."""
    async with running(settings) as address, calling(address) as caller:
        await eventually(lambda: serves(caller), 10.0, f"{settings.id} serves")
        yield caller


async def serves(caller: Caller) -> bool:
    try:
        await caller.status()
    except RoostError:
        return False
    return True


class CoordinatorProcess(Process):
    """A coordinator in a process of its own."""

    def __init__(self, settings: CoordinatorConfig, directory: Path) -> None:
        self._ready = directory / f"{settings.id}.ready"
        file = directory / f"{settings.id}.toml"
        file.write_text(
            f"""
id = "{settings.id}"
listen = "{settings.listen}"
etcd = ["{settings.etcd[0]}"]
blobs = "{settings.blobs}"
heartbeat = "{settings.heartbeat}s"
node_ttl = "{settings.node_ttl}s"
lease_ttl = "{settings.lease_ttl}s"
ready_file = "{self._ready}"
"""
        )
        super().__init__("coordinator", ["--config", str(file)], directory / f"{settings.id}.log")

    async def ready(self) -> str:
        """Its address, once it serves."""
        try:
            await eventually(self._ready.exists, 15.0, "the coordinator's ready file")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()[-2000:]}") from None
        return self._ready.read_text().strip()


@asynccontextmanager
async def own_process(settings: CoordinatorConfig, directory: Path) -> AsyncIterator[CoordinatorProcess]:
    process = CoordinatorProcess(settings, directory)
    await process.start()
    try:
        yield process
    finally:
        if process.running:
            process.resume()
            await asyncio.shield(process.kill())

"""A whole mesh of real parts for system tests: etcd, coordinators, nodes with jails. Root only."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from coordinator.records import SIGNING_KEY, InstanceRecord, Phase, decode_signing_key, instance_key
from coordinator.store.base import Expect, Put
from coordinator.store.etcd import open_etcd
from protos.v1 import admin_pb2, admin_pb2_grpc, resolver_pb2, resolver_pb2_grpc
from roost.cli.deploy import deploy
from roost.client import AsyncClient
from shared import rpc
from shared.identity import InstanceKey
from tests.support.etcd import Etcd, free_ports, running_etcd
from tests.support.eventually import eventually
from tests.support.process import Process

AGENTS = Path(__file__).parent / "agents"
TTL = 6.0  # seconds; short, yet a machine that stands still for 3 s moves no instance

_uid_ranges = itertools.count(2_000_200_000, 65_536)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    name: str
    role: str = "edge"
    site: str = "lab"
    position: tuple[float, float] | None = None
    memory: str = "1G"
    cpu: float = 8.0
    pids: int = 1000
    coordinators: tuple[int, ...] = ()  # indices; empty: all, in order
    more: str = ""  # of its edge.toml


NORTH = NodeSpec("edge-north", site="north", position=(59.9, 10.8))
SOUTH = NodeSpec("edge-south", site="south", position=(41.4, 2.2))
CLOUD = NodeSpec("cloud-1", role="cloud", site="cloud", position=(50.1, 8.7))


@dataclass(frozen=True, slots=True)
class Store:
    """Where a mesh's blobs lie, and what its coordinators need to know to get there."""

    url: str
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Mesh:
    directory: Path
    etcd: Etcd
    store: Store
    coordinators: list[Process] = field(default_factory=list)
    nodes: dict[str, Process] = field(default_factory=dict)
    addresses: list[str] = field(default_factory=list)  # of the coordinators

    def client(self, position: tuple[float, float] | None = None) -> AsyncClient:
        return AsyncClient(self.addresses, position=position)

    def data_dir(self, node: str) -> Path:
        return self.directory / node

    def used_directories(self, node: str) -> list[str]:
        """Of jails in whose state there is something: zygotes and jails that wait for a user have nothing."""
        states = self.data_dir(node).glob("jails/*/state")
        return [state.parent.name for state in states if any(state.iterdir())]

    def occupied(self, node: str) -> bool:
        """Has an instance with state a process there? The agent's uid owns it; init's is the one below."""
        try:
            states = [self.data_dir(node) / "jails" / used / "state" for used in self.used_directories(node)]
            uids = {state.stat().st_uid - of_init for state in states for of_init in (0, 1)}
        except FileNotFoundError:  # one was removed meanwhile: look again
            return self.occupied(node)
        return any(process.uids().real in uids for process in self.nodes[node].tree())

    async def status(self) -> admin_pb2.StatusReply:
        for address in self.addresses:
            async with rpc.channel(address) as channel:
                stub = admin_pb2_grpc.AdminStub(channel)
                try:
                    return await stub.Status(admin_pb2.StatusRequest(), timeout=2.0)
                except Exception:
                    if address == self.addresses[-1]:
                        raise
        raise AssertionError("a mesh without coordinators")

    async def node_state(self, name: str) -> str:
        return next((n.state for n in (await self.status()).nodes if n.node.id == name), "absent")

    async def instance(self, agent: str, user: str) -> admin_pb2.InstanceStatus | None:
        for instance in (await self.status()).instances:
            if (instance.key.agent, instance.key.user) == (agent, user):
                return instance
        return None

    async def drain(self, node: str, undo: bool = False) -> None:
        async with rpc.channel(self.addresses[0]) as channel:
            await admin_pb2_grpc.AdminStub(channel).Drain(
                admin_pb2.DrainRequest(node=node, undo=undo), timeout=5.0
            )

    async def take_away(self, agent: str, user: str) -> None:
        """Gives the instance to another node, as if a client had said that its owner does not answer."""
        instance = await self.instance(agent, user)
        assert instance is not None
        request = resolver_pb2.ResolveRequest(key=instance.key, exclude=[instance.node])
        async with rpc.channel(self.addresses[0]) as channel:
            reply = await resolver_pb2_grpc.ResolverStub(channel).Resolve(request, timeout=5.0)
        assert reply.epoch == instance.epoch + 1, reply

    async def take_away_silently(self, agent: str, user: str, node: str) -> None:
        """Gives the instance to `node` in etcd, and nobody tells the owner."""
        async with open_etcd([self.etcd.endpoint]) as store:
            stored = await store.get(instance_key(InstanceKey("default", agent, user)))
            assert stored is not None
            old = InstanceRecord.decode(stored).value
            new = replace(old, node=node, epoch=old.epoch + 1, phase=Phase.PLACED)
            result = await store.txn([Expect(stored.key, stored.revision)], [Put(stored.key, new.encode())])
            assert result.succeeded

    async def signing_key(self) -> bytes:
        """The mesh's private key, as only something with etcd's address can get it."""
        async with open_etcd([self.etcd.endpoint]) as store:
            record = await store.get(SIGNING_KEY)
        assert record is not None
        return decode_signing_key(record)

    def daemon(self, node: str) -> psutil.Process:
        """The node's daemon: the process beside the jailer that is in no jail."""
        for process in self.nodes[node].tree():
            if "edge_agent.daemon" in process.cmdline():
                return process
        raise AssertionError(f"node {node} has no daemon:\n{self.nodes[node].log()[-2000:]}")

    async def between_turns(self, node: str, timeout: float = 10.0) -> None:
        """Waits until the node has written down what it has answered: if its daemon dies now, the next one
        finds no instance in the middle of a turn."""

        def none_busy() -> bool:
            with closing(sqlite3.connect(self.data_dir(node) / "daemon" / "records.db")) as records:
                found = records.execute("SELECT version, busy FROM instances").fetchall()
            return bool(found) and all(version and not busy for version, busy in found)

        await eventually(none_busy, timeout, f"the instances of {node} are between turns")

    async def clean(self, node: str) -> None:
        await clean_node(self.directory, node)

    async def wait_up(self, *names: str, timeout: float = 20.0) -> None:
        async def all_up() -> bool:
            try:
                return all([await self.node_state(name) == "up" for name in names])
            except Exception:
                return False

        try:
            await eventually(all_up, timeout, f"nodes {names} up")
        except AssertionError as error:
            logs = "\n".join(p.log()[-1500:] for p in (*self.coordinators, *self.nodes.values()))
            raise AssertionError(f"{error}\n{logs}") from error

    async def deploy(self, directory: Path, **replacements: str) -> None:
        """Deploys a copy of an agent; each `old=new` in `replacements` is changed in its agent.toml."""
        copy = self.directory / "agents" / directory.name
        shutil.copytree(directory, copy, dirs_exist_ok=True)
        toml = copy / "agent.toml"
        text = toml.read_text()
        for key, value in replacements.items():
            lines = [f"{key} = {value}" if line.startswith(f"{key} ") else line for line in text.splitlines()]
            text = "\n".join(lines) + "\n"
        toml.write_text(text)
        await deploy(self.addresses, "default", copy, lambda text: None)


async def clean_node(directory: Path, node: str) -> None:
    """What an operator runs after a node was killed and is not to be started again."""
    config = directory / f"{node}.toml"
    cleaner = Process("edge_agent", ["--config", str(config), "--clean"], directory / "log")
    await cleaner.start()
    await cleaner.wait(20.0)


def next_uid_base() -> int:
    """For a node's jails, apart from all others of this process."""
    return next(_uid_ranges)


@asynccontextmanager
async def running_mesh(
    directory: Path,
    nodes: Sequence[NodeSpec] = (NORTH, SOUTH, CLOUD),
    coordinators: int = 1,
    ttl: float = TTL,
    store: Store | None = None,
    coordinator_toml: str = "",
) -> AsyncIterator[Mesh]:
    """All of it, up. Whatever happens, nothing of it is left when the block ends. `store`: where blobs go,
    else into a directory; `coordinator_toml` is added to each coordinator's configuration."""
    (directory / "etcd").mkdir(parents=True)
    async with running_etcd(directory / "etcd") as etcd:
        mesh = Mesh(directory, etcd, store or Store(f"file://{directory}/blobs"))
        try:
            for i, port in enumerate(free_ports(coordinators)):
                mesh.addresses.append(f"127.0.0.1:{port}")
                mesh.coordinators.append(_coordinator(mesh, i, ttl, coordinator_toml))
                await mesh.coordinators[-1].start()
            for spec in nodes:
                mesh.nodes[spec.name] = node(mesh, spec)
                await mesh.nodes[spec.name].start()
            await mesh.wait_up(*mesh.nodes)
            yield mesh
        finally:
            for process in (*mesh.nodes.values(), *mesh.coordinators):
                if process.running:
                    await process.stop()
            for name in mesh.nodes:
                await mesh.clean(name)


def _coordinator(mesh: Mesh, index: int, ttl: float, more_toml: str) -> Process:
    config = mesh.directory / f"coordinator-{index}.toml"
    config.write_text(f"""
id = "c{index}"
listen = "{mesh.addresses[index]}"
etcd = ["{mesh.etcd.endpoint}"]
blobs = "{mesh.store.url}"
heartbeat = "{ttl / 6:.2f}s"
node_ttl = "{ttl}s"
lease_ttl = "{ttl}s"
{more_toml}""")
    log = mesh.directory / f"coordinator-{index}.log"
    return Process("coordinator", ["--config", str(config)], log, mesh.store.environment)


def node(mesh: Mesh, spec: NodeSpec) -> Process:
    """A node's process, not yet started."""
    addresses = [mesh.addresses[i] for i in spec.coordinators] or mesh.addresses
    config = mesh.directory / f"{spec.name}.toml"
    position = ""
    if spec.position:
        position = f"[position]\nlatitude = {spec.position[0]}\nlongitude = {spec.position[1]}\n"
    config.write_text(f"""
node = "{spec.name}"
site = "{spec.site}"
role = "{spec.role}"
listen = "127.0.0.1:0"
coordinators = [{", ".join(f'"{a}"' for a in addresses)}]
data_dir = "{mesh.data_dir(spec.name)}"
mdns = false
{position}
[capacity]
memory = "{spec.memory}"
cpu = {spec.cpu}
pids = {spec.pids}

[jailer]
uid_base = {next_uid_base()}
stop_grace = "15s"
{spec.more}
""")
    return Process("edge_agent", ["--config", str(config)], mesh.directory / f"{spec.name}.log")

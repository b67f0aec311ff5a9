"""A mesh whose every part can be harmed: three etcds, two coordinators, three nodes, and between any two of
them (and before each, for clients) a wire that can be cut.

    client ─▶ c0, c1          client ─▶ e0, e1, cloud
    e0, e1, cloud ─▶ c0, c1   c0, c1 ─▶ etcd0, etcd1, etcd2

The observer of the tests goes to etcd directly. All of it ends with the block.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from roost.client import AsyncClient
from tests.faults.clock import faked_clock
from tests.faults.plan import COORDINATORS, ETCDS, NODES
from tests.support.etcd import Etcd, free_ports, running_cluster
from tests.support.failpoints import Failpoints
from tests.support.mesh import Mesh, Store, clean_node, next_uid_base
from tests.support.process import Process
from tests.support.proxy import Proxy, running_proxy

TTL = 2.0  # seconds until a silent node is lost
GC_RATE = 1000  # blobs that are moved or deleted a second, when somebody has it collected
AGENT = Path(__file__).parent / "agents" / "ledger"
CLIENT = "client"


@dataclass(frozen=True, slots=True)
class Programs:
    """What is started as a coordinator and as a node: arguments of `python -m`."""

    coordinator: tuple[str, ...] = ("coordinator",)
    node: tuple[str, ...] = ("tests.faults.node_with_clock",)


@dataclass(frozen=True, slots=True)
class Size:
    etcds: tuple[str, ...] = ETCDS
    coordinators: tuple[str, ...] = COORDINATORS
    nodes: tuple[str, ...] = NODES

    def wires(self) -> list[tuple[str, str]]:
        return [
            *((CLIENT, name) for name in (*self.coordinators, *self.nodes)),
            *((node, c) for node in self.nodes for c in self.coordinators),
            *((c, etcd) for c in self.coordinators for etcd in self.etcds),
        ]


REAL, FULL = Programs(), Size()
SMALL = Size(("etcd0",), ("c0",), ("e0", "e1"))


@dataclass
class Cluster:
    directory: Path
    etcds: dict[str, Etcd]
    coordinators: dict[str, Process] = field(default_factory=dict)
    nodes: dict[str, Process] = field(default_factory=dict)
    wires: dict[tuple[str, str], Proxy] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    @property
    def blobs(self) -> Path:
        return self.directory / "blobs"

    def client(self, first: str = "") -> AsyncClient:
        """`first`: the coordinator that it asks before any other."""
        order = sorted(self.coordinators, key=lambda c: c != first)
        return AsyncClient([self.wires[CLIENT, c].address for c in order])

    def mesh(self) -> Mesh:
        """For what `tests.support.mesh` can ask. By wires as a client has them."""
        addresses = [self.wires[CLIENT, c].address for c in self.coordinators]
        etcd = next(iter(self.etcds.values()))
        nodes, coordinators = dict(self.nodes), list(self.coordinators.values())
        return Mesh(self.directory, etcd, Store(f"file://{self.blobs}"), coordinators, nodes, addresses)

    def process(self, name: str) -> Process:
        return self.coordinators.get(name) or self.nodes[name]

    def failpoints(self, name: str) -> Failpoints:
        return Failpoints(self.points_directory(name))

    def points_directory(self, name: str) -> Path:
        """A node's must lie where its daemon can write."""
        if name in NODES:
            return self.directory / name / "daemon" / "failpoints"
        return self.directory / f"{name}-failpoints"

    def clock_file(self, name: str) -> Path:
        return (
            self.directory / name / "daemon" / "clock" if name in NODES else self.directory / f"{name}-clock"
        )

    def wires_of(self, name: str) -> list[Proxy]:
        """Those that lead from it, and for a node those by which clients reach it."""
        return [wire for ends, wire in self.wires.items() if ends[0] == name or ends == (CLIENT, name)]

    def daemon(self, name: str) -> psutil.Process | None:
        """The process that does the talking; None if there is none now."""
        if name in COORDINATORS:
            tree = self.process(name).tree()
            return tree[0] if tree else None
        for process in self.process(name).tree():
            try:
                command = process.cmdline()
            except psutil.Error:
                continue
            if any(word.endswith("daemon") for word in command[:6]):
                return process
        return None

    async def heal(self) -> None:
        """Everything runs, and is connected, and no failpoint is armed."""
        for wire in self.wires.values():
            wire.heal()
        for etcd in self.etcds.values():
            etcd.resume()
            if not etcd.running:
                await etcd.launch()
        for name, process in (*self.coordinators.items(), *self.nodes.items()):
            for file in self.points_directory(name).glob("*"):
                file.unlink(missing_ok=True)
            self.clock_file(name).unlink(missing_ok=True)
            if process.running:
                process.resume()
            else:
                await process.start()


@asynccontextmanager
async def running_cluster_of(
    directory: Path, programs: Programs = REAL, size: Size = FULL
) -> AsyncIterator[Cluster]:
    """All of it up, and the agent deployed."""
    async with AsyncExitStack() as stack:
        etcds = await stack.enter_async_context(running_cluster(directory, len(size.etcds)))
        cluster = Cluster(directory, dict(zip(size.etcds, etcds, strict=True)))
        daemons = (*size.coordinators, *size.nodes)
        cluster.ports = dict(zip(daemons, free_ports(len(daemons)), strict=True))
        for ends in size.wires():
            wire = running_proxy(lambda to=ends[1]: _address(cluster, to))  # type: ignore[misc]
            cluster.wires[ends] = await stack.enter_async_context(wire)
        stack.push_async_callback(_end, cluster)
        for name in size.coordinators:
            cluster.coordinators[name] = _coordinator(cluster, name, programs)
        for name in size.nodes:
            cluster.nodes[name] = _node(cluster, name, programs)
        for process in (*cluster.coordinators.values(), *cluster.nodes.values()):
            await process.start()
        mesh = cluster.mesh()
        await mesh.wait_up(*size.nodes, timeout=40.0)
        await mesh.deploy(AGENT)
        yield cluster


async def _end(cluster: Cluster) -> None:
    for wire in cluster.wires.values():
        wire.heal()
    for etcd in cluster.etcds.values():
        etcd.resume()
    for process in (*cluster.nodes.values(), *cluster.coordinators.values()):
        process.resume()
    nodes = [p.stop() for p in cluster.nodes.values() if p.running]
    await asyncio.gather(*nodes, return_exceptions=True)
    await asyncio.gather(*(p.kill() for p in cluster.coordinators.values()), return_exceptions=True)
    for name, process in cluster.nodes.items():
        await process.kill()
        await clean_node(cluster.directory, name)
        shutil.rmtree(cluster.directory / name, ignore_errors=True)  # hundreds of jails' files


def _address(cluster: Cluster, name: str) -> str:
    return cluster.etcds[name].endpoint if name in ETCDS else f"127.0.0.1:{cluster.ports[name]}"


def _coordinator(cluster: Cluster, name: str, programs: Programs) -> Process:
    config = cluster.directory / f"{name}.toml"
    etcds = ", ".join(f'"{cluster.wires[name, etcd].address}"' for etcd in cluster.etcds)
    config.write_text(f"""
id = "{name}"
listen = "127.0.0.1:{cluster.ports[name]}"
etcd = [{etcds}]
blobs = "file://{cluster.blobs}"
heartbeat = "{TTL / 6:.2f}s"
node_ttl = "{TTL}s"
lease_ttl = "{TTL}s"
[gc]
every = "0s"
grace = "0s"
rate = {GC_RATE}
""")
    environment = {"ROOST_FAILPOINTS": str(cluster.points_directory(name))}
    environment |= faked_clock(cluster.clock_file(name))
    module, *more = programs.coordinator
    log = cluster.directory / f"{name}.log"
    return Process(module, [*more, "--config", str(config)], log, environment)


def _node(cluster: Cluster, name: str, programs: Programs) -> Process:
    config = cluster.directory / f"{name}.toml"
    # Some begin with the one, some with the other.
    order = sorted(cluster.coordinators, reverse=name == "e1")
    coordinators = ", ".join(f'"{cluster.wires[name, c].address}"' for c in order)
    config.write_text(f"""
node = "{name}"
site = "{name}"
role = "{"cloud" if name == "cloud" else "edge"}"
listen = "127.0.0.1:{cluster.ports[name]}"
advertise = "{cluster.wires[CLIENT, name].address}"
coordinators = [{coordinators}]
data_dir = "{cluster.directory / name}"
mdns = false
[capacity]
memory = "2G"
cpu = 8.0
pids = 1000
[jailer]
uid_base = {next_uid_base()}
stop_grace = "15s"
""")
    environment = {"ROOST_FAILPOINTS": str(cluster.points_directory(name)), "PATH": os.environ["PATH"]}
    module, *more = programs.node
    log = cluster.directory / f"{name}.log"
    return Process(module, [*more, "--config", str(config)], log, environment)

"""What `roost up` runs: pure, from a directory and free ports to processes and their configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_ETCD_STAGE, _COORDINATOR_STAGE, _NODE_STAGE = range(3)
_FIRST_UID = 2_000_000_000
_UIDS = 65_536  # of each node, so that no two nodes' jails share one


@dataclass(frozen=True, slots=True)
class Process:
    """One process. Those of a stage are started together, when all of the stages below serve."""

    name: str
    stage: int
    argv: tuple[str, ...]
    address: str  # host:port where it will serve
    log: Path
    directories: tuple[Path, ...] = ()
    files: Mapping[Path, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    clean: tuple[str, ...] = ()  # what to run once it did not end well, to remove what it left


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    role: str
    site: str
    latitude: float
    longitude: float
    memory: str
    cpu: float
    pids: int


NODES = (
    Node("edge-north", "edge", "north", 59.91, 10.75, "1G", 2.0, 500),
    Node("edge-south", "edge", "south", 41.39, 2.17, "1G", 2.0, 500),
    Node("cloud-1", "cloud", "cloud", 50.11, 8.68, "2G", 4.0, 1000),
)
PORTS = 3 + len(NODES)  # how many `layout` needs


def layout(data: Path, ports: Sequence[int], python: str, etcd: str, machine: str) -> tuple[Process, ...]:
    """Etcd, a coordinator and the nodes, with all their data and logs beneath `data`. `python` and `etcd` are
    paths, `machine` is as `uname -m` says it."""
    client, peer, control, *rest = (f"127.0.0.1:{port}" for port in ports)
    nodes = [
        _node(data, python, index, node, address, control)
        for index, (node, address) in enumerate(zip(NODES, rest, strict=True))
    ]
    return (_etcd(data, etcd, client, peer, machine), _coordinator(data, python, control, client), *nodes)


def _etcd(data: Path, etcd: str, client: str, peer: str, machine: str) -> Process:
    argv = (
        etcd,
        "--name=up",
        f"--data-dir={data / 'etcd'}",
        f"--listen-client-urls=http://{client}",
        f"--advertise-client-urls=http://{client}",
        f"--listen-peer-urls=http://{peer}",
        f"--initial-advertise-peer-urls=http://{peer}",
        f"--initial-cluster=up=http://{peer}",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=10m",
        "--logger=zap",
        "--log-level=warn",
    )
    # Debian's etcd refuses to run on 64-bit Arm unless it is told to.
    env = {"ETCD_UNSUPPORTED_ARCH": "arm64"} if machine == "aarch64" else {}
    return Process("etcd", _ETCD_STAGE, argv, client, _log(data, "etcd"), env=env)


def _coordinator(data: Path, python: str, address: str, etcd: str) -> Process:
    config = data / "config" / "coordinator.toml"
    blobs = data / "blobs"
    text = _toml(
        {
            "id": "coordinator-1",
            "listen": address,
            "advertise": address,
            "etcd": [etcd],
            "blobs": f"file://{blobs}",
        }
    )
    return Process(
        "coordinator",
        _COORDINATOR_STAGE,
        (python, "-m", "coordinator", "--config", str(config)),
        address,
        _log(data, "coordinator"),
        directories=(blobs,),
        files={config: text},
    )


def _node(data: Path, python: str, index: int, node: Node, address: str, coordinator: str) -> Process:
    config = data / "config" / f"{node.name}.toml"
    home = data / "nodes" / node.name
    tables: dict[str, dict[str, object]] = {
        "position": {"latitude": node.latitude, "longitude": node.longitude},
        "capacity": {"memory": node.memory, "cpu": node.cpu, "pids": node.pids},
        "jailer": {"uid_base": _FIRST_UID + index * _UIDS, "stop_grace": "5s"},
    }
    text = _toml(
        {
            "node": node.name,
            "site": node.site,
            "role": node.role,
            "listen": address,
            "advertise": address,
            "coordinators": [coordinator],
            "data_dir": str(home),
        },
        tables,
    )
    argv = (python, "-m", "edge_agent", "--config", str(config))
    return Process(
        node.name,
        _NODE_STAGE,
        argv,
        address,
        _log(data, node.name),
        directories=(home,),
        files={config: text},
        clean=(*argv, "--clean"),
    )


def _log(data: Path, name: str) -> Path:
    return data / "logs" / f"{name}.log"


def _toml(keys: Mapping[str, object], tables: Mapping[str, Mapping[str, object]] | None = None) -> str:
    lines = [f"{key} = {_value(value)}" for key, value in keys.items()]
    for name, table in (tables or {}).items():
        lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: object) -> str:
    """TOML's strings, numbers, booleans and flat lists of them are written as JSON writes them."""
    return json.dumps(value)

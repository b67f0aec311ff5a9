"""coordinator.toml."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from shared.config import Duration
from shared.names import NAME_RULE, is_name


@dataclass(frozen=True, slots=True)
class GcConfig:
    """`every`: time from one round of collecting in the blob store to the next; 0: only when somebody asks.
    `grace`: how long a blob is left alone after it was put. `rate`: blobs moved or deleted a second."""

    every: Duration = Duration(6 * 3600.0)
    grace: Duration = Duration(3600.0)
    rate: int = 1000

    def __post_init__(self) -> None:
        if self.every < 0 or self.grace < 0:
            raise ValueError("gc: every and grace can't be less than 0")
        if self.rate < 1:
            raise ValueError("gc: rate must be at least 1")


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """`etcd`: endpoints as host:port. `advertise`: where nodes and the other coordinators reach this one;
    empty: where it listens. `ready_file` is written with that address once calls are served. `rebalance`:
    instances move by themselves to where they are better off, `rebalance_after` they came where they are."""

    id: str
    etcd: tuple[str, ...]
    blobs: str
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    heartbeat: Duration = Duration(1.0)
    node_ttl: Duration = Duration(6.0)
    lease_ttl: Duration = Duration(6.0)
    ticket_lifetime: Duration = Duration(60.0)
    ready_file: Path | None = None
    rebalance: bool = True
    rebalance_after: Duration = Duration(60.0)
    gc: GcConfig = field(default_factory=GcConfig)

    def __post_init__(self) -> None:
        if not is_name(self.id):
            raise ValueError(f"id {self.id!r}: {NAME_RULE}")
        self._check_addresses()
        if self.heartbeat <= 0 or self.ticket_lifetime <= 0 or self.rebalance_after <= 0:
            raise ValueError("heartbeat, ticket_lifetime and rebalance_after must be more than 0")
        if self.heartbeat * 3 > self.node_ttl:
            raise ValueError(
                f"node_ttl ({self.node_ttl:g} s) must be at least 3 times heartbeat ({self.heartbeat:g} s): "
                "otherwise one late heartbeat loses a node"
            )
        if self.lease_ttl < 1:
            raise ValueError("lease_ttl must be at least 1s: etcd counts leases in seconds")

    def _check_addresses(self) -> None:
        listen_host = _host("listen", self.listen)
        if self.advertise:
            _host("advertise", self.advertise)
        elif listen_host in ("0.0.0.0", "[::]", "::"):
            raise ValueError(f'listen = "{self.listen}" needs advertise: the address that others reach it at')
        if not self.etcd:
            raise ValueError('etcd is empty: name at least one endpoint, like ["127.0.0.1:2379"]')
        hosts = [_host("etcd", endpoint) for endpoint in self.etcd]
        if len(hosts) > 1 and not all(_is_ipv4(host) for host in hosts):
            raise ValueError(
                "etcd: several endpoints must be IPv4 addresses; or give one name that has several addresses"
            )


def _host(what: str, address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "/" in host:
        raise ValueError(f'{what}: {address!r} is no address: write host:port, like "127.0.0.1:2379"')
    return host


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return host == "localhost"
    return True

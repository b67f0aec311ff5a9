"""edge.toml: the node's configuration, which the daemon and its jailer share."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shared.config import Duration, Size
from shared.names import NAME_RULE, is_name
from shared.network_policy import check_url

_DEVICE_PATH = re.compile(r"/dev/[A-Za-z0-9_.:+@/-]{1,200}")
# What every jail has, or has of its own.
_TAKEN = frozenset(("null", "zero", "full", "random", "urandom", "shm", "fd", "stdin", "stdout", "stderr"))
_IDS = 65_536  # ids that a node's jails take from `uid_base` on
# In the daemon's root: copies that the jailer makes of what may be readable by root alone.
CREDENTIALS = Path("/run/roost/credentials")
CA_FILE = Path("/run/roost/ca.pem")
MAX_CREDENTIAL = 8 << 10  # bytes
_FRAMING = ("host", "content-length", "transfer-encoding", "connection", "upgrade", "te", "trailer", "expect")


class Role(Enum):
    EDGE = "edge"
    CLOUD = "cloud"


@dataclass(frozen=True, slots=True)
class PositionConfig:
    """WGS 84, in degrees."""

    latitude: float
    longitude: float

    def __post_init__(self) -> None:
        if not -90 <= self.latitude <= 90 or not -180 <= self.longitude <= 180:
            raise ValueError("position: latitude is from -90 to 90 and longitude from -180 to 180 degrees")


def _machine_memory() -> Size:
    return Size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 3 // 4)


def _machine_cpu() -> float:
    return float(len(os.sched_getaffinity(0)))


def _machine_pids() -> int:
    return int(Path("/proc/sys/kernel/pid_max").read_text()) // 2


@dataclass(frozen=True, slots=True)
class CapacityConfig:
    """What all instances of this node may use together. Default: three quarters of the machine's memory,
    all cores that this process may use, half of the machine's process ids."""

    memory: Size = field(default_factory=_machine_memory)
    cpu: float = field(default_factory=_machine_cpu)
    pids: int = field(default_factory=_machine_pids)

    def __post_init__(self) -> None:
        if self.memory <= 0 or self.cpu <= 0 or self.pids <= 0:
            raise ValueError("capacity: memory, cpu and pids must be more than 0")


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What an instance that asks for the device gets into its /dev; so many at a time may have it."""

    paths: tuple[str, ...]
    count: int = 1

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError('paths is empty: name at least one, like ["/dev/ttyUSB0"]')
        for path in self.paths:
            if not _DEVICE_PATH.fullmatch(path) or ".." in path:
                raise ValueError(f"paths: {path!r} is not below /dev, or not written plainly")
            if path.split("/")[2] in _TAKEN:
                raise ValueError(f"paths: a jail has a {path} of its own")
        if not 1 <= self.count <= 1_000_000:
            raise ValueError("count must be from 1 to 1000000")


@dataclass(frozen=True, slots=True)
class JailerSection:
    """`uid_base`: the first of 65,536 uids and gids that nothing else on this machine may use."""

    uid_base: int = 2_000_000_000
    daemon_user: str = "roost"
    stop_grace: Duration = Duration(20.0)

    def __post_init__(self) -> None:
        if not 100_000 <= self.uid_base <= 2**32 - 2 - _IDS:
            raise ValueError(f"uid_base must be between 100000 and {2**32 - 2 - _IDS}")
        if self.stop_grace <= 0:
            raise ValueError("stop_grace must be more than 0")


@dataclass(frozen=True, slots=True)
class CredentialConfig:
    """A secret that the egress proxy adds to requests: the file `name` in `credentials_dir`. It is sent only
    below `url`, only for `agents` ("tenant/agent", or "tenant/*"), as `header` with `{}` in `format` replaced
    by it."""

    name: str
    url: str
    agents: tuple[str, ...]
    header: str = "Authorization"
    format: str = "Bearer {}"

    def __post_init__(self) -> None:
        if not is_name(self.name):
            raise ValueError(f"name {self.name!r}: {NAME_RULE}")
        check_url(self.url)
        if not self.url.startswith("https:"):
            raise ValueError(f"url {self.url!r}: a credential is sent over https alone")
        for agent in self.agents:
            tenant, _, name = agent.partition("/")
            if not is_name(tenant) or not (is_name(name) or name == "*"):
                raise ValueError(
                    f'agents: {agent!r}: write "tenant/agent", or "tenant/*" for all of a tenant'
                )
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,63}", self.header) or self.header.lower() in _FRAMING:
            raise ValueError(f"header {self.header!r} can't carry a credential")
        if self.format.count("{}") != 1 or not (self.format.isascii() and self.format.isprintable()):
            raise ValueError(f'format {self.format!r}: write "{{}}" once, where the credential goes')


@dataclass(frozen=True, slots=True)
class EgressConfig:
    """`credentials_dir`: files by name, copied into the daemon's root when it starts, never into a jail's.
    `ca_file`: certificates to trust besides the system's. `private_networks`: where agents that ask for it
    may go though it is not the internet, like "10.1.0.0/16"."""

    credentials_dir: Path | None = None
    ca_file: Path | None = None
    private_networks: tuple[str, ...] = ()
    credential: tuple[CredentialConfig, ...] = ()

    def __post_init__(self) -> None:
        for network in self.private_networks:
            ipaddress.ip_network(network)  # ValueError names it
        names = [credential.name for credential in self.credential]
        if len(names) != len(set(names)):
            raise ValueError("credential: each name may be there once")
        if names and self.credentials_dir is None:
            raise ValueError("credentials_dir is missing: the directory with the credentials' files")


@dataclass(frozen=True, slots=True)
class PeersConfig:
    """`copies` of what instances of this node commit go to as many other nodes of its site (0: none), with at
    most `bandwidth` bytes a second. `disk`: what this node keeps of theirs, in bytes."""

    copies: int = 1
    bandwidth: Size = Size(8 << 20)
    disk: Size = Size(2 << 30)

    def __post_init__(self) -> None:
        if not 0 <= self.copies <= 8:
            raise ValueError("copies must be from 0 to 8")
        if self.bandwidth < 1024:
            raise ValueError('bandwidth must be at least "1K", a second')


@dataclass(frozen=True, slots=True)
class EdgeConfig:
    """`listen` and `advertise` are host:port; port 0 means any free one. `advertise` is what others connect
    to, and empty means the address that was bound. `chunk_cache`: what copies of users' state in pieces may
    take of the disk; what is needed just now is kept in any case."""

    node: str
    data_dir: Path
    coordinators: tuple[str, ...]
    site: str = "default"
    role: Role = Role.EDGE
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    mdns: bool = True
    chunk_cache: Size = Size(8 << 30)
    position: PositionConfig | None = None
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    jailer: JailerSection = field(default_factory=JailerSection)
    devices: dict[str, DeviceConfig] = field(default_factory=dict)
    egress: EgressConfig = field(default_factory=EgressConfig)
    peers: PeersConfig = field(default_factory=PeersConfig)

    def __post_init__(self) -> None:
        for name in ("listen", "advertise"):
            value = getattr(self, name)
            if value and not _is_address(value):
                raise ValueError(f'{name} {value!r}: write host:port, like "127.0.0.1:7400"')
        if not self.advertise and self.listen.rpartition(":")[0] in ("0.0.0.0", "[::]"):
            raise ValueError(f'listen = "{self.listen}" needs advertise: the address that others reach it at')
        for name in self.devices:
            if not is_name(name):
                raise ValueError(f"devices: {name!r}: {NAME_RULE}")
        if self.chunk_cache < 0:
            raise ValueError("chunk_cache can't be less than 0")
        if not self.coordinators:
            raise ValueError('coordinators is empty: name at least one, like ["10.0.0.1:7300"]')
        for address in self.coordinators:
            if not _is_address(address):
                raise ValueError(f'coordinators: {address!r}: write host:port, like "10.0.0.1:7300"')


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isdecimal() and int(port) < 65_536

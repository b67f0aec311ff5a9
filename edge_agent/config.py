"""edge.toml: the node's configuration, which the daemon and its jailer share."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from shared.config import Duration, Size

_IDS = 65_536  # ids that a node's jails take from `uid_base` on


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
class EdgeConfig:
    """`listen` and `advertise` are host:port; port 0 means any free one. `advertise` is what others connect
    to, and empty means the address that was bound."""

    node: str
    data_dir: Path
    coordinators: tuple[str, ...]
    site: str = "default"
    role: Role = Role.EDGE
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    mdns: bool = True
    position: PositionConfig | None = None
    capacity: CapacityConfig = field(default_factory=CapacityConfig)
    jailer: JailerSection = field(default_factory=JailerSection)

    def __post_init__(self) -> None:
        for name in ("listen", "advertise"):
            value = getattr(self, name)
            if value and not _is_address(value):
                raise ValueError(f'{name} {value!r}: write host:port, like "127.0.0.1:7400"')
        if not self.advertise and self.listen.rpartition(":")[0] in ("0.0.0.0", "[::]"):
            raise ValueError(f'listen = "{self.listen}" needs advertise: the address that others reach it at')
        if not self.coordinators:
            raise ValueError('coordinators is empty: name at least one, like ["10.0.0.1:7300"]')
        for address in self.coordinators:
            if not _is_address(address):
                raise ValueError(f'coordinators: {address!r}: write host:port, like "10.0.0.1:7300"')


def _is_address(text: str) -> bool:
    host, colon, port = text.rpartition(":")
    return bool(host and colon) and port.isdecimal() and int(port) < 65_536

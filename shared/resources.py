"""What an instance needs and a node has, and the one function that says whether it fits.

Coordinator and node both decide with `fits`, so that they never disagree about what room is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from protos.v1 import common_pb2
from shared.units import format_size


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory in bytes, CPU in thousandths of a core, a count of processes, and of devices by name: in order,
    and none with a count of 0, so that what is equal looks alike."""

    memory_bytes: int = 0
    cpu_millis: int = 0
    pids: int = 0
    devices: tuple[tuple[str, int], ...] = ()

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.memory_bytes + other.memory_bytes,
            self.cpu_millis + other.cpu_millis,
            self.pids + other.pids,
            _sum(self.devices, other.devices, 1),
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            self.memory_bytes - other.memory_bytes,
            self.cpu_millis - other.cpu_millis,
            self.pids - other.pids,
            _sum(self.devices, other.devices, -1),
        )

    def sized(self, size: Resources | None) -> Resources:
        """With the memory, CPU and processes of `size`, if there is one."""
        if size is None:
            return self
        return replace(self, memory_bytes=size.memory_bytes, cpu_millis=size.cpu_millis, pids=size.pids)

    def with_at_least(self, other: Resources) -> Resources:
        """The larger of the two in each."""
        return replace(
            self,
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
            cpu_millis=max(self.cpu_millis, other.cpu_millis),
            pids=max(self.pids, other.pids),
        )

    def __str__(self) -> str:
        plain = f"{format_size(self.memory_bytes)} memory, {self.cpu_millis / 1000:g} cores, {self.pids} pids"
        return plain + "".join(f", {count} {name}" for name, count in self.devices)

    def to_proto(self) -> common_pb2.Resources:
        return common_pb2.Resources(
            memory_bytes=self.memory_bytes,
            cpu_millis=self.cpu_millis,
            pids=self.pids,
            devices=dict(self.devices),
        )

    @classmethod
    def from_proto(cls, proto: common_pb2.Resources) -> Resources:
        return cls(proto.memory_bytes, proto.cpu_millis, proto.pids, devices_of(proto.devices))


def devices_of(counts: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted((name, count) for name, count in counts.items() if count))


def _sum(
    a: tuple[tuple[str, int], ...], b: tuple[tuple[str, int], ...], sign: int
) -> tuple[tuple[str, int], ...]:
    if not b:
        return a
    counts = dict(a)
    for name, count in b:
        counts[name] = counts.get(name, 0) + sign * count
    return devices_of(counts)


@dataclass(frozen=True, slots=True)
class Disk:
    """What an instance may do to its node's disk: bytes of /state, and bytes a second, 0 for no limit. No
    node reserves it, and placement does not count it."""

    state_bytes: int = 1 << 30
    read_bps: int = 0
    write_bps: int = 0


def fits(need: Resources, reserved: Resources, capacity: Resources) -> bool:
    """Is there room for `need` in what `reserved` leaves of `capacity`?"""
    total = reserved + need
    return (
        total.memory_bytes <= capacity.memory_bytes
        and total.cpu_millis <= capacity.cpu_millis
        and total.pids <= capacity.pids
        and not lacking(need, reserved, capacity)
    )


def lacking(need: Resources, reserved: Resources, capacity: Resources) -> list[str]:
    """The devices of `need` that `reserved` leaves none of."""
    if not need.devices:
        return []
    taken, there = dict(reserved.devices), dict(capacity.devices)
    return [name for name, count in need.devices if taken.get(name, 0) + count > there.get(name, 0)]

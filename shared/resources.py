"""What an instance needs and a node has, and the one function that says whether it fits.

Coordinator and node both decide with `fits`, so that they never disagree about what room is.
"""

from __future__ import annotations

from dataclasses import dataclass

from protos.v1 import common_pb2
from shared.units import format_size


@dataclass(frozen=True, slots=True)
class Resources:
    """Memory in bytes, CPU in thousandths of a core, and a count of processes."""

    memory_bytes: int = 0
    cpu_millis: int = 0
    pids: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(
            self.memory_bytes + other.memory_bytes,
            self.cpu_millis + other.cpu_millis,
            self.pids + other.pids,
        )

    def __sub__(self, other: Resources) -> Resources:
        return Resources(
            self.memory_bytes - other.memory_bytes,
            self.cpu_millis - other.cpu_millis,
            self.pids - other.pids,
        )

    def __str__(self) -> str:
        return f"{format_size(self.memory_bytes)} memory, {self.cpu_millis / 1000:g} cores, {self.pids} pids"

    def to_proto(self) -> common_pb2.Resources:
        return common_pb2.Resources(
            memory_bytes=self.memory_bytes, cpu_millis=self.cpu_millis, pids=self.pids
        )

    @classmethod
    def from_proto(cls, proto: common_pb2.Resources) -> Resources:
        return cls(proto.memory_bytes, proto.cpu_millis, proto.pids)


def fits(need: Resources, reserved: Resources, capacity: Resources) -> bool:
    """Is there room for `need` in what `reserved` leaves of `capacity`?"""
    total = reserved + need
    return (
        total.memory_bytes <= capacity.memory_bytes
        and total.cpu_millis <= capacity.cpu_millis
        and total.pids <= capacity.pids
    )

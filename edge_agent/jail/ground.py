"""What a jail is made on: its directory, its uids, its control groups. The jailer's part, as operations."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.directories import Directories
from edge_agent.jail.operations import Do, Operation
from edge_agent.jail.protocol import Make, Way
from shared.units import format_size


@dataclass(slots=True)
class Ground:
    """`slot`: -1 until there is one."""

    slot: int = -1

    def take(self, slot: int) -> None:
        self.slot = slot


def ground_steps(
    request: Make, directories: Directories, cgroups: Cgroups, ground: Ground
) -> tuple[Operation, ...]:
    jail_id, limits = request.jail_id, request.limits
    uids: tuple[Operation, ...]
    if request.way is Way.TASK:
        uids = (Do("lend it two uids that no other jail has", lambda: ground.take(directories.lend())),)
    else:
        where = f"{directories.path_of(jail_id)}/state"
        uids = (
            Do(
                f"make {where} if it is not there, and give it two uids that no other jail has",
                lambda: ground.take(directories.ensure(jail_id)),
            ),
        )
        if directories.quota is not None:
            size = format_size(limits.disk_bytes)
            uids += (
                Do(
                    f"limit what it may have on the disk to {size}",
                    lambda: directories.limit(ground.slot, limits.disk_bytes),
                ),
            )
    what = (
        f"{format_size(limits.memory_bytes)} memory, {limits.cpu_millis / 1000:g} cores, {limits.pids} pids"
    )
    return (*uids, Do(f"make its control groups: {what}", lambda: cgroups.create(jail_id, limits)))

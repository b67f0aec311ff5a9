"""The seam to control groups: limits, freezers and accounting of one jail.

Real: `v1` (one tree a controller) and `v2` (one tree). A jail's group holds its init and has the limits; its
subgroup `agent` holds everything that the agent runs, so that freezing it leaves init free. The
daemon freezes it (see `freezing`).
Only the jailer calls these, as root. Methods raise OSError for what the kernel refuses.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.jail.protocol import Limits


@dataclass(frozen=True, slots=True)
class Usage:
    memory_bytes: int
    cpu_seconds: float
    pids: int
    oom_kills: int  # processes that the kernel killed for the memory limit


class Cgroups(Protocol):
    """The groups of one node's jails, all under one parent whose name belongs to the node's data."""

    def sweep(self) -> None:
        """Kills whatever a predecessor left in its groups, removes them, and makes the parent ready."""
        ...

    @property
    def limits_io(self) -> bool:
        """Can reading and writing be limited?"""
        ...

    @property
    def starts_inside(self) -> bool:
        """Can a process be started in a group? Else it joins by itself."""
        ...

    def create(self, jail_id: str, limits: Limits) -> None: ...

    def limit(self, jail_id: str, limits: Limits) -> None:
        """Sets the limits of a jail that there is. Memory must not be above the new one: see `shrink`."""
        ...

    def shrink(self, jail_id: str, limits: Limits) -> bool:
        """Presses the jail's memory below a smaller limit, without killing. False: not there yet."""
        ...

    def clone_into(self, jail_id: str) -> int | None:
        """A directory to start init in, which the caller closes; None unless `starts_inside`."""
        ...

    def join(self, jail_id: str) -> None:
        """Moves the calling process, which was not started there, into the jail's group."""
        ...

    def open_init(self, jail_id: str) -> tuple[int, ...]:
        """As `open_agent`, of the jail's group itself, for an init that was not started there."""
        ...

    def open_agent(self, jail_id: str) -> tuple[int, ...]:
        """Descriptors through which a process moves itself into `agent` by writing 0 to each. They work for
        an unprivileged process because the kernel checks who opened them."""
        ...

    def open_from_outside(self, jail_id: str) -> tuple[int, ...]:
        """As `open_agent`, for a process that is in none of the jail's groups yet."""
        ...

    def open_freezer(self, jail_id: str) -> tuple[int, ...]:
        """Descriptors for a `Freezing` of the jail's `agent`, in whatever process; the caller closes them."""
        ...

    def kill(self, jail_id: str) -> None:
        """SIGKILL to every process in the jail, frozen or not. On v1 one that is frozen again at once, by
        whoever has its `open_freezer`, dies only of a later call."""
        ...

    def usage(self, jail_id: str) -> Usage: ...

    def oom_kills(self, jail_id: str) -> int:
        """How often the kernel killed a process of the jail for its memory limit."""
        ...

    def remove(self, jail_id: str) -> bool:
        """Removes the jail's groups. False: something still ends in there, try again. None there is fine."""
        ...

    def close(self) -> None:
        """Removes the parent, if it is empty."""
        ...


def high_of(limits: Limits) -> int:
    """Bytes of memory from which on the kernel takes back what it can, before it kills."""
    return limits.memory_bytes - limits.memory_bytes // 16


def kill_members(group: Path) -> None:
    """SIGKILL to every process that is in `group` itself. No such group is fine."""
    with suppress(FileNotFoundError):
        for pid in map(int, (group / "cgroup.procs").read_text().split()):
            if pid > 0:  # 0 stands for one that lives outside of our pid namespace
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

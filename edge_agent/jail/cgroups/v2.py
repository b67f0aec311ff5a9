"""Control groups v2: one tree. Its files are declared with cgroupspy's descriptors, as it knows none."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, DictFile, IntegerFile
from cgroupspy.nodes import Node

from edge_agent.jail.cgroups.base import Usage, high_of, kill_members
from edge_agent.jail.protocol import Limits

AGENT = "agent"
SUPERVISOR = "supervisor"
_ENABLED = "+memory +cpu +pids"
_IO = "+io"  # which is not delegated everywhere
_PERIOD_US = 100_000
_SWEEP_SECONDS = 10.0


class Group(Controller):  # type: ignore[misc]
    """The files of one group, of all controllers."""

    subtree_control = BaseFileInterface("cgroup.subtree_control")
    kill = IntegerFile("cgroup.kill", writeonly=True)
    memory_max = IntegerFile("memory.max")
    memory_high = IntegerFile("memory.high")
    memory_swap_max = IntegerFile("memory.swap.max")
    memory_current = IntegerFile("memory.current", readonly=True)
    memory_events = DictFile("memory.events", readonly=True)
    cpu_max = BaseFileInterface("cpu.max")
    cpu_weight = IntegerFile("cpu.weight")
    cpu_stat = DictFile("cpu.stat", readonly=True)
    pids_max = IntegerFile("pids.max")
    io_max = BaseFileInterface("io.max")
    pids_current = IntegerFile("pids.current", readonly=True)


class V2:
    """See `Cgroups`. `base` is the group under which this node may make its own; `supervised`: it is the
    jailer's own group (delegated to it), which it has to leave before controllers can be enabled there.
    `disk`: the numbers ("8:0") of the one that reading and writing is limited on, if it can be."""

    def __init__(self, base: Path, parent: str, supervised: bool, disk: str | None = None) -> None:
        self._base = base
        self._parent = base / parent
        self._supervised = supervised
        self._disk = disk

    @property
    def limits_io(self) -> bool:
        return self._disk is not None

    @property
    def starts_inside(self) -> bool:
        return True

    def sweep(self) -> None:
        if self._supervised:
            leaf = self._base / SUPERVISOR
            leaf.mkdir(exist_ok=True)
            (leaf / "cgroup.procs").write_text("0")
        _group(self._base).subtree_control = _ENABLED
        self._parent.mkdir(exist_ok=True)
        _group(self._parent).subtree_control = _ENABLED
        self._enable_io()
        deadline = time.monotonic() + _SWEEP_SECONDS
        while left := [child.name for child in self._parent.iterdir() if child.is_dir()]:
            for jail_id in left:
                self.kill(jail_id)
                self.remove(jail_id)
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes in {self._parent} do not end")
            time.sleep(0.01)

    def create(self, jail_id: str, limits: Limits) -> None:
        # Enables no controller below, so the jail's group may hold init itself beside its subgroup.
        (self._parent / jail_id / AGENT).mkdir(parents=True, exist_ok=True)
        self.limit(jail_id, limits)
        if self._disk and (limits.read_bps or limits.write_bps):
            read, write = (str(bps or "max") for bps in (limits.read_bps, limits.write_bps))
            self._group(jail_id).io_max = f"{self._disk} rbps={read} wbps={write}"

    def limit(self, jail_id: str, limits: Limits) -> None:
        group = self._group(jail_id)
        group.memory_max = limits.memory_bytes
        group.memory_high = high_of(limits)
        with suppress(FileNotFoundError):  # a kernel without swap
            group.memory_swap_max = 0
        group.cpu_max = f"{limits.cpu_millis * _PERIOD_US // 1000} {_PERIOD_US}"
        group.cpu_weight = min(10_000, max(1, limits.cpu_millis // 10))
        group.pids_max = limits.pids + 1  # init

    def shrink(self, jail_id: str, limits: Limits) -> bool:
        # Above `high` the kernel takes back what it can; above `max` it would kill.
        group = self._group(jail_id)
        group.memory_high = high_of(limits)
        return bool(group.memory_current <= limits.memory_bytes - limits.memory_bytes // 32)

    def clone_into(self, jail_id: str) -> int | None:
        return os.open(self._parent / jail_id, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def join(self, jail_id: str) -> None:
        raise AssertionError("it was started there")

    def open_init(self, jail_id: str) -> tuple[int, ...]:
        return (os.open(self._parent / jail_id / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC),)

    def open_agent(self, jail_id: str) -> tuple[int, ...]:
        procs = self._parent / jail_id / AGENT / "cgroup.procs"
        return (os.open(procs, os.O_WRONLY | os.O_CLOEXEC),)

    def open_from_outside(self, jail_id: str) -> tuple[int, ...]:
        return self.open_agent(jail_id)

    def open_freezer(self, jail_id: str) -> tuple[int, ...]:
        agent = self._parent / jail_id / AGENT
        freeze = os.open(agent / "cgroup.freeze", os.O_WRONLY | os.O_CLOEXEC)
        try:
            return freeze, os.open(agent / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            os.close(freeze)
            raise

    def kill(self, jail_id: str) -> None:
        path = self._parent / jail_id
        if (path / "cgroup.kill").exists():
            with suppress(FileNotFoundError):
                self._group(jail_id).kill = 1
            return
        # Before Linux 5.14. A frozen process dies of SIGKILL on v2.
        kill_members(path)
        kill_members(path / AGENT)

    def usage(self, jail_id: str) -> Usage:
        group = self._group(jail_id)
        cpu_seconds = group.cpu_stat["usage_usec"] / 1e6
        return Usage(group.memory_current, cpu_seconds, group.pids_current, self.oom_kills(jail_id))

    def oom_kills(self, jail_id: str) -> int:
        try:
            events: dict[str, int] = self._group(jail_id).memory_events
        except FileNotFoundError:
            return 0
        return events.get("oom_kill", 0)

    def remove(self, jail_id: str) -> bool:
        try:
            for path in (self._parent / jail_id / AGENT, self._parent / jail_id):
                with suppress(FileNotFoundError):
                    path.rmdir()
        except OSError:
            return False
        return True

    def close(self) -> None:
        with suppress(OSError):
            self._parent.rmdir()

    def _enable_io(self) -> None:
        try:
            if self._disk is not None:
                for group in (self._base, self._parent):
                    _group(group).subtree_control = _IO
        except OSError:
            self._disk = None

    def _group(self, jail_id: str) -> Group:
        return _group(self._parent / jail_id)


def _group(path: Path) -> Group:
    return Group(Node(str(path)))

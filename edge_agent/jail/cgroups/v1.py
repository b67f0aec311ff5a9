"""Control groups v1: one tree for each controller, through cgroupspy's nodes and file interfaces."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, IntegerFile
from cgroupspy.nodes import Node

from edge_agent.jail.cgroups.base import Usage, high_of, kill_members
from edge_agent.jail.protocol import Limits
from edge_agent.jail.wire import close_all

CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")
BLKIO = "blkio"  # only for jails with limits on it: joining one more group takes time
AGENT = "agent"
# A thread that moves itself through this file spares the kernel a lock over all processes, and us the 1 to 15
# ms that `cgroup.procs` takes. Who joins here has one thread.
_TASKS = "tasks"
_PERIOD_US = 100_000
_SWEEP_SECONDS = 10.0


class PidsController(Controller):  # type: ignore[misc]
    """What cgroupspy does not know of."""

    max = IntegerFile("pids.max")
    current = IntegerFile("pids.current", readonly=True)


class FreezerController(Controller):  # type: ignore[misc]
    state = BaseFileInterface("freezer.state")  # THAWED, FREEZING or FROZEN


class BlkioController(Controller):  # type: ignore[misc]
    """Of writes, only those count that do not go through the page cache."""

    read = BaseFileInterface("blkio.throttle.read_bps_device")
    write = BaseFileInterface("blkio.throttle.write_bps_device")


class V1:
    """See `Cgroups`. `mounts` is where the controllers' trees are; `parent` the node's group in each; `disk`
    the numbers ("8:0") of the one that reading and writing is limited on, if it can be."""

    def __init__(self, mounts: Path, parent: str, disk: str | None = None) -> None:
        self._parents: dict[str, Node] = {}
        self._disk = disk if (mounts / BLKIO / "cgroup.procs").exists() else None
        root = Node(str(mounts))
        for name in (*CONTROLLERS, *([BLKIO] if self._disk else [])):
            self._parents[name] = Node(parent, parent=Node(name, parent=root))

    @property
    def limits_io(self) -> bool:
        return self._disk is not None

    @property
    def starts_inside(self) -> bool:
        return False

    def sweep(self) -> None:
        deadline = time.monotonic() + _SWEEP_SECONDS
        for parent in self._parents.values():
            path = _path(parent)
            path.mkdir(exist_ok=True)
            while left := [child.name for child in path.iterdir() if child.is_dir()]:
                for jail_id in left:
                    self.kill(jail_id)
                    self.remove(jail_id)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"processes in {path} do not end")
                time.sleep(0.01)

    def create(self, jail_id: str, limits: Limits) -> None:
        for name in CONTROLLERS:
            _path(self._parents[name], jail_id).mkdir(exist_ok=True)
        _path(self._parents["freezer"], jail_id, AGENT).mkdir(exist_ok=True)
        if self._disk and (limits.read_bps or limits.write_bps):
            _path(self._parents[BLKIO], jail_id).mkdir(exist_ok=True)
            blkio = BlkioController(self._node(BLKIO, jail_id))
            blkio.read = f"{self._disk} {limits.read_bps}"
            blkio.write = f"{self._disk} {limits.write_bps}"
        self.limit(jail_id, limits)

    def limit(self, jail_id: str, limits: Limits) -> None:
        memory = self._node("memory", jail_id).controller
        names = ["limit_in_bytes", "memsw_limit_in_bytes"]  # the first may never be above the second
        if limits.memory_bytes > _number(memory, names[0]):
            names.reverse()
        for name in names:
            with suppress(FileNotFoundError):  # a kernel that does not account for swap
                setattr(memory, name, limits.memory_bytes)
        with suppress(OSError):  # a real-time kernel has none
            memory.soft_limit_in_bytes = high_of(limits)
        cpu = self._node("cpu", jail_id).controller
        cpu.cfs_period_us = _PERIOD_US
        cpu.cfs_quota_us = limits.cpu_millis * _PERIOD_US // 1000
        cpu.shares = max(2, limits.cpu_millis * 1024 // 1000)
        PidsController(self._node("pids", jail_id)).max = limits.pids + 1  # init

    def shrink(self, jail_id: str, limits: Limits) -> bool:
        try:
            self._node("memory", jail_id).controller.limit_in_bytes = limits.memory_bytes
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    def clone_into(self, jail_id: str) -> int | None:
        return None

    def join(self, jail_id: str) -> None:
        for group in self._groups(jail_id).values():
            (group / _TASKS).write_text("0")

    def open_init(self, jail_id: str) -> tuple[int, ...]:
        return _open_tasks(self._groups(jail_id).values())

    def open_agent(self, jail_id: str) -> tuple[int, ...]:
        return _open_tasks([_path(self._parents["freezer"], jail_id, AGENT)])

    def open_from_outside(self, jail_id: str) -> tuple[int, ...]:
        groups = self._groups(jail_id)
        freezer = groups.pop("freezer")
        return _open_tasks([*groups.values(), freezer / AGENT])

    def open_freezer(self, jail_id: str) -> tuple[int, ...]:
        state = _path(self._parents["freezer"], jail_id, AGENT) / "freezer.state"
        return (os.open(state, os.O_RDWR | os.O_CLOEXEC),)

    def kill(self, jail_id: str) -> None:
        # Signals first, while the frozen ones can't fork; they die when they are thawed. What was forked
        # meanwhile by those that are not frozen dies with init, or in the next call.
        for parent in self._parents.values():
            kill_members(_path(parent, jail_id))
            kill_members(_path(parent, jail_id, AGENT))
        with suppress(FileNotFoundError):
            FreezerController(Node(AGENT, parent=self._node("freezer", jail_id))).state = "THAWED"

    def usage(self, jail_id: str) -> Usage:
        return Usage(
            memory_bytes=self._node("memory", jail_id).controller.usage_in_bytes,
            cpu_seconds=self._node("cpuacct", jail_id).controller.usage / 1e9,
            pids=PidsController(self._node("pids", jail_id)).current,
            oom_kills=self.oom_kills(jail_id),
        )

    def oom_kills(self, jail_id: str) -> int:
        try:
            counts: dict[str, int] = self._node("memory", jail_id).controller.oom_control
        except FileNotFoundError:
            return 0
        return counts.get("oom_kill", 0)

    def remove(self, jail_id: str) -> bool:
        try:
            for parent in self._parents.values():
                for path in (_path(parent, jail_id, AGENT), _path(parent, jail_id)):
                    with suppress(FileNotFoundError):
                        path.rmdir()
        except OSError:
            return False
        return True

    def close(self) -> None:
        for parent in self._parents.values():
            with suppress(OSError):
                _path(parent).rmdir()

    def _groups(self, jail_id: str) -> dict[str, Path]:
        groups = {name: _path(parent, jail_id) for name, parent in self._parents.items()}
        return {name: group for name, group in groups.items() if name != BLKIO or group.exists()}

    def _node(self, controller: str, jail_id: str) -> Node:
        return Node(jail_id, parent=self._parents[controller])


def _open_tasks(groups: Iterable[Path]) -> tuple[int, ...]:
    """All, or none and OSError."""
    opened: list[int] = []
    try:
        for group in groups:
            opened.append(os.open(group / _TASKS, os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        close_all(opened)
        raise
    return tuple(opened)


def _number(controller: Controller, name: str) -> int:
    """What is in the file; 0 if there is none."""
    try:
        return int(getattr(controller, name))
    except FileNotFoundError:
        return 0


def _path(node: Node, *below: str) -> Path:
    return Path(os.fsdecode(node.full_path), *below)

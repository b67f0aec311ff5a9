"""Control groups v1: one tree for each controller, through cgroupspy's nodes and file interfaces."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from cgroupspy.controllers import Controller
from cgroupspy.interfaces import BaseFileInterface, IntegerFile
from cgroupspy.nodes import Node

from edge_agent.jail.cgroups.base import Usage, kill_members
from edge_agent.jail.protocol import Limits

CONTROLLERS = ("memory", "cpu", "cpuacct", "pids", "freezer")
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


class V1:
    """See `Cgroups`. `mounts` is where the controllers' trees are; `parent` the node's group in each."""

    def __init__(self, mounts: Path, parent: str) -> None:
        self._parents: dict[str, Node] = {}
        root = Node(str(mounts))
        for name in CONTROLLERS:
            self._parents[name] = Node(parent, parent=Node(name, parent=root))

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
        for parent in self._parents.values():
            _path(parent, jail_id).mkdir(exist_ok=True)
        _path(self._parents["freezer"], jail_id, AGENT).mkdir(exist_ok=True)
        memory = self._node("memory", jail_id).controller
        memory.limit_in_bytes = limits.memory_bytes
        with suppress(FileNotFoundError):  # a kernel that does not account for swap
            memory.memsw_limit_in_bytes = limits.memory_bytes
        cpu = self._node("cpu", jail_id).controller
        cpu.cfs_period_us = _PERIOD_US
        cpu.cfs_quota_us = limits.cpu_millis * _PERIOD_US // 1000
        cpu.shares = max(2, limits.cpu_millis * 1024 // 1000)
        PidsController(self._node("pids", jail_id)).max = limits.pids + 1  # init

    def clone_into(self, jail_id: str) -> int | None:
        return None

    def join(self, jail_id: str) -> None:
        for parent in self._parents.values():
            (_path(parent, jail_id) / _TASKS).write_text("0")

    def open_agent(self, jail_id: str) -> tuple[int, ...]:
        tasks = _path(self._parents["freezer"], jail_id, AGENT) / _TASKS
        return (os.open(tasks, os.O_WRONLY | os.O_CLOEXEC),)

    def open_from_outside(self, jail_id: str) -> tuple[int, ...]:
        groups = [_path(self._parents[name], jail_id) for name in CONTROLLERS if name != "freezer"]
        flags = os.O_WRONLY | os.O_CLOEXEC
        return (*(os.open(group / _TASKS, flags) for group in groups), *self.open_agent(jail_id))

    def freeze(self, jail_id: str) -> None:
        self._freezer(jail_id).state = "FROZEN"

    def frozen(self, jail_id: str) -> bool:
        freezer = self._freezer(jail_id)
        if freezer.state == "FROZEN":
            return True
        freezer.state = "FROZEN"  # v1 looks again only when it is asked again
        return False

    def thaw(self, jail_id: str) -> None:
        self._freezer(jail_id).state = "THAWED"

    def kill(self, jail_id: str) -> None:
        # Signals first, while the frozen ones can't fork; they die when they are thawed. What was forked
        # meanwhile by those that are not frozen dies with init, or in the next call.
        for parent in self._parents.values():
            kill_members(_path(parent, jail_id))
            kill_members(_path(parent, jail_id, AGENT))
        with suppress(FileNotFoundError):
            self.thaw(jail_id)

    def usage(self, jail_id: str) -> Usage:
        return Usage(
            memory_bytes=self._node("memory", jail_id).controller.usage_in_bytes,
            cpu_seconds=self._node("cpuacct", jail_id).controller.usage / 1e9,
            pids=PidsController(self._node("pids", jail_id)).current,
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

    def _node(self, controller: str, jail_id: str) -> Node:
        return Node(jail_id, parent=self._parents[controller])

    def _freezer(self, jail_id: str) -> FreezerController:
        return FreezerController(Node(AGENT, parent=self._node("freezer", jail_id)))


def _path(node: Node, *below: str) -> Path:
    return Path(os.fsdecode(node.full_path), *below)

"""Has a zygote fork into a jail, and makes the fork its agent; ends the jail when the agent has ended.

The fork is made as soon as the jail's init is there, which may be before the jail is anybody's: it waits in
the jail's pid namespace, still with the zygote's uid, root and control groups, until `start` sends the rest.

What must hold: a fork becomes the agent of its jail once; whoever asks is answered once, when the fork has
entered the jail, and its pid is known to be one of the jail's, or with what went wrong.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from edge_agent.jail import protocol, seccomp
from edge_agent.jail.agent_process import environment, limits
from edge_agent.jail.cell import Cell, Waiting
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.loop import Loop
from edge_agent.jail.operations import Do, Operation, carry_out
from edge_agent.jail.protocol import Make, Refused
from edge_agent.jail.steps import note
from edge_agent.jail.wire import Closed, Garbage, Wire, close_all, pair

# In the order in which they are entered: the first gives the right to the others.
_BIRTHPLACE = ("user", "pid")
_ENTERED = ("cgroup", "ipc", "uts", "net", "mnt")

_RESOURCES = {
    number: name.removeprefix("RLIMIT_").lower()
    for name, number in vars(resource).items()
    if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE"  # another name of NOFILE
}

# Called once with None, or with what went wrong.
Done = Callable[[Refused | None], None]


@dataclass(slots=True)
class _Fork:
    """`line` leads to it, `report` to who makes it. `done`: who waits for it."""

    line: Wire
    report: Wire
    pid: int = 0  # 0: not known yet
    entered: bool = False
    problem: Refused | None = None
    done: Done | None = None


class Forks:
    """`end` ends a jail whose agent has ended, or a shell whose fork has, before the shell was a jail."""

    def __init__(self, loop: Loop, cgroups: Cgroups, end: Callable[[Cell], None]) -> None:
        self._loop = loop
        self._cgroups = cgroups
        self._end = end
        self._forks: dict[int, _Fork] = {}  # by the pid of their jail's init, which no two have

    def prepare(self, cell: Cell, zygote: Cell) -> None:
        """Of a cell whose init is there. What comes of it is told when it is started."""

        def give(opened: list[int]) -> None:
            (report, inner_report), (line, inner_line) = pair(), pair()
            fork = self._forks[cell.pid] = _Fork(Wire(line), Wire(report))
            self._loop.watch(fork.report, lambda: self._hear_report(cell, fork))
            self._loop.watch(fork.line, lambda: self._hear_line(cell, fork))
            with suppress(Closed):  # then nothing is heard of the fork but its end
                zygote.supervisor.send({"do": "fork"}, (inner_report.detach(), inner_line.detach(), *opened))
                self._loop.refresh(zygote.supervisor)

        opened: list[int] = []
        try:
            carry_out(preparing(cell.pid, opened, give), cell.init.progress.note)
        except Refused:
            close_all(opened)  # init has ended, which is noticed elsewhere

    def start(self, cell: Cell, done: Done) -> None:
        """Of a jail that runs, once. Refused or Closed for what can be known at once."""
        fork = self._forks.get(cell.pid)
        if fork is None or not cell.for_fork:
            raise Refused(f"jail {cell.jail_id} can't be forked into (again)")
        if fork.problem is not None:
            raise fork.problem

        def give(opened: list[int]) -> None:
            given, cell.for_fork = cell.for_fork, ()
            fork.done = done
            fork.line.send(order(cell.request), (*given, *opened))
            self._loop.refresh(fork.line)

        opened: list[int] = []
        try:
            carry_out(forking(cell.request, cell.pid, self._cgroups, opened, give), note)
        except Refused:
            close_all(opened)
            raise

    def forget(self, cell: Cell) -> None:
        """Its init has ended, and so all of it. Who still waits is told."""
        fork = self._forks.pop(cell.pid, None)
        if fork is None:
            return
        self._fail(fork, f"jail {cell.jail_id} has ended, or got no agent")
        for wire in (fork.line, fork.report):
            self._loop.unwatch(wire)
            wire.close()

    def _hear_report(self, cell: Cell, fork: _Fork) -> None:
        """The zygote's child lives until we close; so long the fork's end waits for us."""
        match _heard(fork.report, "the zygote ended as it forked"):
            case None:
                return
            case {"pid": int(pid)} if _is_in_jail(pid, cell.pid) and not self._loop.knows(pid):
                self._loop.on_child(pid, lambda code: self._ended(cell, fork, code))
                fork.pid = pid
                self._settle(fork)
            case {"problem": str(problem)}:
                self._fail(fork, problem)
            case _:
                self._fail(fork, f"jail {cell.jail_id} has ended, or got no agent")
        self._loop.unwatch(fork.report)
        fork.report.close()

    def _hear_line(self, cell: Cell, fork: _Fork) -> None:
        match _heard(fork.line, "it ended as it entered the jail"):
            case None:
                return
            case {"step": "entered"}:
                fork.entered = True
                self._settle(fork)
            case {"problem": str(problem)}:
                self._fail(fork, problem)
            case _:
                self._fail(fork, f"jail {cell.jail_id} got no agent")
        self._loop.unwatch(fork.line)

    def _settle(self, fork: _Fork) -> None:
        if fork.pid and fork.entered and fork.done is not None:
            done, fork.done = fork.done, None
            done(None)

    def _fail(self, fork: _Fork, problem: str) -> None:
        fork.problem = fork.problem or Refused(problem[:1000])
        if fork.done is not None:
            done, fork.done = fork.done, None
            done(fork.problem)

    def _ended(self, cell: Cell, fork: _Fork, code: int) -> None:
        self._fail(fork, "it ended before it was the agent")
        if cell.reaped:
            return
        if isinstance(cell.phase, Waiting):
            self._end(cell)
        elif not cell.for_fork:  # else: it was nobody's yet, and `start` will say so
            cell.code = code
            self._end(cell)


def _heard(wire: Wire, closed: str) -> dict[str, object] | None:
    """What came; None if nothing did yet. That the other side has closed is a problem."""
    try:
        frames = wire.receive()
    except (Closed, Garbage):
        return {"problem": closed}
    return frames[0].body if frames else None


def preparing(init: int, opened: list[int], give: Callable[[list[int]], object]) -> tuple[Operation, ...]:
    """The jailer's part, ahead. `give` takes what is in `opened` then."""
    names = ", ".join(_BIRTHPLACE)
    return (
        Do(f"open the jail's namespaces: {names}", lambda: _open_namespaces(init, _BIRTHPLACE, opened)),
        Do("have the zygote fork into these", lambda: give(opened)),
    )


def forking(
    request: Make, init: int, cgroups: Cgroups, opened: list[int], give: Callable[[list[int]], object]
) -> tuple[Operation, ...]:
    """The jailer's part, when the fork is to be the agent of `request`."""
    names = ", ".join(_ENTERED)
    return (
        Do(f"open the jail's namespaces: {names}", lambda: _open_namespaces(init, _ENTERED, opened)),
        Do(
            "open the jail's control groups",
            lambda: opened.extend(cgroups.open_from_outside(request.jail_id)),
        ),
        Do("give these to the fork, which waits, and tell it whose agent it is", lambda: give(opened)),
    )


def order(request: Make) -> dict[str, Any]:
    """What the fork is told."""
    return {
        "env": environment(request),
        "uid": protocol.AGENT_ID,
        "limits": limits(request),
        "filter": seccomp.agent_filter().hex(),
    }


@dataclass(frozen=True, slots=True)
class Told:
    """What a zygote's child or fork does, in `roost/zygote.py`, with what it is sent."""

    what: str

    def describe(self) -> str:
        return self.what

    def execute(self) -> None:
        raise AssertionError("this is the zygote's to do")


def told_ahead() -> tuple[Told, ...]:
    """Of a zygote's child."""
    return (
        *(Told(f"enter the jail's {name} namespace") for name in _BIRTHPLACE),
        Told("fork, into the last of them"),
    )


def told(order: dict[str, Any]) -> tuple[Told, ...]:
    """What comes of `order`, up to the agent's own code."""
    bounds = ", ".join(f"{_RESOURCES[kind]} {most}" for kind, most in order["limits"])
    return (
        Told("close all that it inherited, and wait"),
        Told("join the jail's control groups"),
        *(Told(f"enter the jail's {name} namespace") for name in _ENTERED),
        Told(f"begin a session of its own, with limits: {bounds}"),
        Told(f"become uid and gid {order['uid']}, in no other group"),
        Told("go to /agent"),
        Told(f"take {' '.join(sorted(order['env']))} as its environment, and nothing else"),
        Told("seed what generates random numbers anew"),
        Told("drop all capabilities, and all from what anything executed later could get"),
        Told("set no_new_privs"),
        Told("filter system calls"),
        Told("close all descriptors but 0 to 3"),
        Told("run the agent that the zygote has imported"),
    )


def _open_namespaces(init: int, names: tuple[str, ...], opened: list[int]) -> None:
    """Descriptors, in that order. OSError if init has ended."""
    for name in names:
        opened.append(os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))


def _is_in_jail(pid: int, init: int) -> bool:
    """Is `pid` in the pid namespace of `init`?"""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
    return False

"""What the daemon sees of jails. Real: `edge_agent.jail.client`, which asks the jailer, and `jailed`.
Fake: `tests/support/fake_jails.py`, in memory. Both pass tests/contract/test_jails.py.

Life of a jail: make -> (restore files) -> start -> turns -> kill. The jail's directory on this node's
disk outlives its process, so that an instance resumes where it slept without moving anything.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from edge_agent.state.files import Files
from shared.resources import Disk, Resources


@dataclass(frozen=True, slots=True)
class JailSpec:
    """What the jailer needs to make a jail. It trusts none of it: names are checked, paths are its own."""

    jail_id: str  # [a-z0-9-]{1,64}; also the name of its directory, cgroup and (cut short) its host name
    bundle: str  # version of the agent: the name of a directory in the node's bundle directory
    argv: tuple[str, ...]  # what init runs inside, as the agent's uid
    env: dict[str, str] = field(default_factory=dict)
    limits: Resources = field(default_factory=Resources)
    zygote: str = ""  # id of the one that `start` forks the agent from; empty: it executes argv
    disk: Disk = field(default_factory=Disk)
    packages: str = ""  # id of a jail that has ended: its /state is shown, read-only, at /packages


@dataclass(frozen=True, slots=True)
class Exit:
    """How the agent's process ended."""

    code: int  # exit code, or -signal
    out_of_memory: bool  # the kernel killed it for exceeding its memory limit
    stderr_tail: str = ""  # the last of what it wrote to standard error, at most 4 KiB
    disk_full: bool = False  # it was ended for what it had in /state


@dataclass(frozen=True, slots=True)
class Usage:
    memory_bytes: int
    cpu_seconds: float
    pids: int
    oom_kills: int = 0  # its processes that the kernel killed for its memory limit


class JailGone(Exception):
    """The jail's process has ended; `exit` says how. What was asked of it was not done."""

    def __init__(self, exit: Exit) -> None:
        super().__init__(f"the agent's process ended with {exit}")
        self.exit = exit


class Jail(Protocol):
    """One jail. Methods raise JailGone once its process has ended, RoostError JAIL_FAILED otherwise."""

    @property
    def jail_id(self) -> str: ...

    @property
    def limits(self) -> Resources:
        """What it may use now."""
        ...

    @property
    def files(self) -> Files:
        """Its /state."""
        ...

    @property
    def ended(self) -> bool:
        """Is its process known to have ended?"""
        ...

    async def start(self) -> None:
        """Runs the agent; returns when its process exists (the agent says by itself when it is ready)."""
        ...

    async def send(self, message: bytes) -> None:
        """One message to the agent. At most MAX_MESSAGE bytes."""
        ...

    async def receive(self) -> bytes:
        """The agent's next message. RoostError AGENT_CRASHED for garbage or an oversized one."""
        ...

    async def listen(self, port: int) -> socket.socket:
        """A listening socket of 127.0.0.1:port in the jail's network, non-blocking: who connects to it is the
        jail's agent. Can be asked for before `start`, so that the agent can't take the port first."""
        ...

    async def connect(self, port: int) -> socket.socket:
        """Connected to 127.0.0.1:port in the jail's network, non-blocking. ConnectionRefusedError if nobody
        listens there, TimeoutError if whoever does took too long."""
        ...

    async def freeze(self) -> None:
        """Stops all of the agent's processes; returns when they have stopped. Init goes on. If it is cut off
        or fails, nothing stays stopped."""
        ...

    async def thaw(self) -> None: ...

    async def usage(self) -> Usage: ...

    async def resize(self, limits: Resources) -> None:
        """Other limits for what runs. JAIL_FAILED, and nothing has changed, if its memory can't be brought
        below the new limit at once: nothing is killed for it."""
        ...

    async def guard(self, fd: int, opening: Callable[[], None]) -> None:
        """Whoever in the jail opens the file of which `fd` is a descriptor, one of its /state, waits from now
        on until `release`; `opening` is called then. JAIL_FAILED if this machine can't. The jail ends with
        this daemon, until all that is guarded is released."""
        ...

    async def release(self, fd: int) -> None:
        """Those who wait for the file go on, and nobody waits for it any more."""
        ...

    async def kill(self) -> Exit:
        """Ends every process of the jail and removes all that it had but its directory. Idempotent."""
        ...


class TaskJail(Protocol):
    """A jail of a program that is no agent. It has no directory: its files, its working directory, are in
    memory, within its limit. It ends with the daemon. Methods raise as those of `Jail`."""

    @property
    def jail_id(self) -> str: ...

    @property
    def files(self) -> Files:
        """Also when the program has ended, until `kill`."""
        ...

    async def begin(self) -> tuple[int, int]:
        """Runs the program. The ends of its standard output and error, which the caller closes."""
        ...

    async def wait(self, timeout: float) -> int | None:
        """The program's exit code, or -signal; by then all that it started was killed. None: it did not end
        in `timeout` seconds."""
        ...

    async def kill(self) -> Exit:
        """Ends and removes all of it. Idempotent. `out_of_memory`: the kernel killed one of its processes."""
        ...


class Zygote(Protocol):
    """A process that has imported an agent, and is forked when a jail made for it starts. Jails that it
    started live on without it."""

    @property
    def jail_id(self) -> str: ...

    @property
    def ended(self) -> bool: ...

    async def kill(self) -> None:
        """Idempotent."""
        ...


class Jails(Protocol):
    """The node's jails."""

    async def zygote(self, spec: JailSpec) -> Zygote:
        """Returns when its imports are done. RoostError JAIL_FAILED says why there can be none: this agent
        is started by executing it. It ends with the daemon."""
        ...

    async def make(self, spec: JailSpec) -> Jail:
        """A jail with its walls up and its directory in place; nothing of the agent runs yet."""
        ...

    async def task(self, spec: JailSpec) -> TaskJail:
        """As `make`, for a program that is no agent: the first of its argv may be a name without a slash."""
        ...

    async def adopt(self) -> list[Jail]:
        """The running jails that an earlier daemon of this jailer left."""
        ...

    async def directories(self) -> list[str]:
        """Ids of the jails whose directory lies on this node's disk, running or not."""
        ...

    async def discard(self, jail_id: str) -> None:
        """Removes the directory of a jail that does not run. Not being there is no error."""
        ...


MAX_MESSAGE = 8 << 20  # bytes of one message between daemon and agent: a 1 MiB turn, escaped, fits

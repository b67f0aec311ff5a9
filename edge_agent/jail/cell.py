"""One jail as the jailer knows it: its phase, its init, and who waits for what."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.loop import Timer
from edge_agent.jail.protocol import Ended, Make, Way
from edge_agent.jail.spawn import Spawned
from edge_agent.jail.wire import Wire, close_all, pair


@dataclass(frozen=True, slots=True)
class Waiting:
    """A shell: it is no jail yet, and its id is not one that a jail can have."""


@dataclass(frozen=True, slots=True)
class Making:
    """Init builds its walls. `request` of the daemon waits for it."""

    request: int


@dataclass(frozen=True, slots=True)
class Running:
    pass


@dataclass(frozen=True, slots=True)
class Dying:
    """Everything in it was sent SIGKILL, or init has ended. `failure`: why it could not be made, for
    `request`, if it never ran."""

    request: int | None = None
    failure: dict[str, str] | None = None


Phase = Waiting | Making | Running | Dying


@dataclass(slots=True)
class Cell:
    """`request` of a shell stands for all that it fits, and its `slot` for none. `code` and `stderr_tail` are
    what init has said of the agent's end. `killers`: requests that wait until nothing is left."""

    jail_id: str
    request: Make
    slot: int
    init: Spawned
    phase: Phase
    owner: str = ""  # the zygote that it is to be forked from; empty: none
    code: int = -signal.SIGKILL
    stderr_tail: str = ""
    disk_full: bool = False
    measuring: float | None = None  # since when, monotonic; None: nobody was asked, or has answered
    measure_after: float = 0.0  # monotonic
    cpu_seconds: float = 0.0  # when /state was measured last
    killers: list[int] = field(default_factory=list)
    was_killed: bool = False
    reaped: bool = False
    patience: Timer | None = None  # of whoever waits for it to be made
    struck: Timer | None = None  # when it is killed again
    pid: int = 0  # of init, which is the builder's until it is born, or of the zygote
    for_fork: tuple[int, ...] = ()  # given to the zygote once
    output: int = -1  # of its agent, to be read; given to the file service once
    served: int = 0  # its number there

    def __post_init__(self) -> None:
        self.pid, self.for_fork, self.output = self.init.pid, self.init.for_fork, self.init.output

    @property
    def supervisor(self) -> Wire:
        return self.init.supervisor

    @property
    def is_forked(self) -> bool:
        """Are its files served by the file service, and not by its init?"""
        return self.request.way is Way.FORK

    def open_for_daemon(self, cgroups: Cgroups, give: Callable[[int], None]) -> tuple[int, ...]:
        """A new control socket, whose other end is given to whoever serves the jail's files, the turn socket,
        and what freezes the agent; the caller owns them. OSError, and Closed if `give` says so: then all is
        as it was."""
        with ExitStack() as undo:
            turn = os.dup(self.init.turn.fileno())
            undo.callback(os.close, turn)
            freezer = cgroups.open_freezer(self.jail_id)
            undo.callback(close_all, freezer)
            ours, inner = pair()
            undo.callback(ours.close)
            give(inner.detach())
            undo.pop_all()
        return ours.detach(), turn, *freezer

    @property
    def is_zygote(self) -> bool:
        return self.request.way is Way.ZYGOTE

    @property
    def is_task(self) -> bool:
        return self.request.way is Way.TASK

    @property
    def is_daemons(self) -> bool:
        """Does it end with the daemon that asked for it?"""
        return self.is_zygote or self.is_task

    @property
    def born(self) -> bool:
        """Of one to be forked into: is its init known?"""
        return self.pid != self.init.pid

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # a builder that has ended, and its init was not heard of
            os.kill(self.pid, signal.SIGKILL)

    def ended(self, oom_kills: int) -> Ended:
        """An agent that fails after a child was killed for memory has run out of it, too. Init outlives a
        a task's program, so a task is always killed in the end."""
        out_of_memory = oom_kills > 0 and (self.is_task or (self.code != 0 and not self.was_killed))
        disk_full = self.disk_full and not self.was_killed
        return Ended(self.code, out_of_memory and not disk_full, self.stderr_tail, disk_full)

    def calm(self) -> None:
        """Nobody waits for it to be made any more."""
        if self.patience is not None:
            self.patience.cancel()
            self.patience = None

    def close(self) -> None:
        self.calm()
        if self.struck is not None:
            self.struck.cancel()
        self.init.close()
        close_all(self.for_fork)
        if self.output >= 0:
            os.close(self.output)

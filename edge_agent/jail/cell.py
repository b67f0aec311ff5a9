"""One jail as the jailer knows it: its phase, its init, and who waits for what."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field

from edge_agent.jail.protocol import Ended, Make, Way
from edge_agent.jail.spawn import Spawned
from edge_agent.jail.wire import Closed, Wire, close_all, pair


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


Phase = Making | Running | Dying


@dataclass(slots=True)
class Cell:
    """`code` and `stderr_tail` are what init has said of the agent's end. `killers`: requests that wait
    until nothing is left."""

    jail_id: str
    request: Make
    slot: int
    init: Spawned
    phase: Phase
    owner: str = ""  # the zygote that it is to be forked from; empty: none
    code: int = -signal.SIGKILL
    stderr_tail: str = ""
    killers: list[int] = field(default_factory=list)
    was_killed: bool = False
    reaped: bool = False
    pid: int = 0  # of init, which is the builder's until it is born, or of the zygote
    for_fork: tuple[int, ...] = ()  # given to the zygote once

    def __post_init__(self) -> None:
        self.pid, self.for_fork = self.init.pid, self.init.for_fork

    @property
    def supervisor(self) -> Wire:
        return self.init.supervisor

    def sockets_for_daemon(self) -> tuple[int, int]:
        """A new control socket, whose other end init gets, and the turn socket; the caller owns both.
        Closed if init is gone."""
        ours, inner = pair()
        try:
            self.supervisor.send({"do": "control"}, (inner.detach(),))
        except Closed:
            ours.close()
            raise
        return ours.detach(), os.dup(self.init.turn.fileno())

    @property
    def is_zygote(self) -> bool:
        return self.request.way is Way.ZYGOTE

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # a builder that has ended, and its init was not heard of
            os.kill(self.pid, signal.SIGKILL)

    def ended(self, oom_kills: int) -> Ended:
        killed = self.code == -signal.SIGKILL
        return Ended(self.code, killed and oom_kills > 0 and not self.was_killed, self.stderr_tail)

    def close(self) -> None:
        self.supervisor.close()
        self.init.turn.close()
        self.init.progress.close()
        close_all(self.for_fork)

"""Whoever serves a jail's files, as the jailer speaks with it: the jail's init, or, of a forked jail, the
file service (`file_service.py`), which is started when it is first needed.

What must hold: each jail that was begun is ended once, and whoever waits for that is told within seconds,
whatever becomes of the service. How it can fail: the service ends; then all jails that it served end, and the
next one begun starts another. If it does not answer, because it or the disk stands still, a jail's last words
are not waited for any longer; if it goes on so, it is killed.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from edge_agent.jail import quota, roots
from edge_agent.jail.cell import Cell
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.file_service import NAMESPACES, SERVE_FILES
from edge_agent.jail.loop import Loop
from edge_agent.jail.wire import Body, Closed, Garbage, Wire, close_all, pair
from edge_agent.jail.wright import Wright

log = logging.getLogger(__name__)

_LAST_WORDS_SECONDS = 2.0
_PATIENCE = 20.0  # seconds, for a disk that is slow

Said = Callable[[str], None]  # is told the last that an agent printed


class ServedFiles:
    """`measured` is told of a jail, and whether it has more in /state than it may; `lost` of a jail that is
    served no more."""

    def __init__(
        self,
        config: JailerConfig,
        wright: Wright,
        loop: Loop,
        measured: Callable[[Cell, bool], None],
        lost: Callable[[Cell], None],
    ) -> None:
        self._config = config
        self._wright = wright
        self._loop = loop
        self._measured = measured
        self._lost = lost
        self._wire: Wire | None = None
        self.pid = 0  # of the service; 0: there is none
        # By the numbers that the service knows jails by: a jail may be made again before the end of the last
        # one of that name was answered.
        self._numbers = itertools.count(1)
        self._cells: dict[int, Cell] = {}
        self._ending: dict[int, Said] = {}
        self._unanswered: set[int] = set()

    def begin(self, cell: Cell) -> None:
        """When the jail is made. OSError, or Closed if the service has just ended."""
        if not cell.is_forked:
            return
        if self._wire is None:
            self._start()
        root = roots.jail_state(cell.jail_id, self._config)
        output, cell.output = cell.output, -1
        cell.served = next(self._numbers)
        self._cells[cell.served] = cell
        names = {"jail": cell.served, "name": cell.jail_id}
        uids = {"owner": self._config.agent_uid(cell.slot), "keeper": self._config.init_uid(cell.slot)}
        self._send({"do": "serve", **names, **uids}, (root, output))

    def control(self, cell: Cell, fd: int) -> None:
        """`fd`, which is taken: the other end of a socket to the daemon, in place of an earlier one. Closed
        if who serves the jail has ended."""
        if cell.is_forked:
            self._send({"do": "control", "jail": cell.served}, (fd,))
        else:
            cell.supervisor.send({"do": "control"}, (fd,))
            self._loop.refresh(cell.supervisor)

    def measure(self, cell: Cell) -> None:
        """Is there more in /state than may be? Closed if who serves the jail has ended."""
        if cell.is_forked:
            most = quota.most_taken(cell.request.limits.disk_bytes)
            self._send({"do": "measure", "jail": cell.served, "most": most})
        else:
            cell.supervisor.send({"do": "measure"})
            self._loop.refresh(cell.supervisor)

    def end(self, cell: Cell, said: Said) -> None:
        """Its processes have ended. `said` is called once, at once for one that was not begun."""
        number, jail_id = cell.served, cell.jail_id
        if number not in self._cells:
            said("")
            return
        self._ending[number] = said
        self._unanswered.add(number)
        try:
            self._send({"do": "end", "jail": number})
        except Closed:
            self._ended(number, "")
            return
        self._loop.after(_LAST_WORDS_SECONDS, lambda: self._ended(number, ""))
        self._loop.after(_PATIENCE, lambda: self._lose_patience(jail_id, number))

    def close(self) -> None:
        """At the jailer's end."""
        self._kill()
        deadline = time.monotonic() + _LAST_WORDS_SECONDS  # a disk that hangs may keep it from dying
        with suppress(ChildProcessError):  # the loop may have been quicker
            while self.pid and time.monotonic() < deadline and os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                time.sleep(0.005)

    def _start(self) -> None:
        ours, theirs = pair()
        try:
            self.pid = self._wright.spawn(SERVE_FILES, b"", (theirs.fileno(),), NAMESPACES)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        wire, pid = Wire(ours), self.pid
        self._wire = wire
        self._loop.watch(wire, lambda: self._hear(wire))
        self._loop.on_child(pid, lambda code: self._service_ended(pid, code))

    def _send(self, body: Body, fds: tuple[int, ...] = ()) -> None:
        """Takes the descriptors."""
        if self._wire is None:
            close_all(fds)
            raise Closed
        self._wire.send(body, fds)
        self._loop.refresh(self._wire)

    def _hear(self, wire: Wire) -> None:
        try:
            wire.flush()
            for frame in wire.receive():
                frame.close()
                self._heard(frame.body)
        except (Closed, Garbage):
            self._break_off()

    def _heard(self, body: Body) -> None:
        match body:
            case {"measured": int(number), "over": bool(over)} if cell := self._cells.get(number):
                self._measured(cell, over)
            case {"ended": int(number)} if number in self._cells and number not in self._ending:
                self._lost(self._cells.pop(number))  # given up, for want of descriptors
            case {"ended": int(number), "tail": str(tail)}:
                self._unanswered.discard(number)
                self._ended(number, tail)

    def _ended(self, number: int, tail: str) -> None:
        self._cells.pop(number, None)
        said = self._ending.pop(number, None)
        if said is not None:
            said(tail)

    def _lose_patience(self, jail_id: str, number: int) -> None:
        if number in self._unanswered:
            log.error("the file service did not end jail %s in %g s, and is killed", jail_id, _PATIENCE)
            self._break_off()

    def _service_ended(self, pid: int, code: int) -> None:
        log.error("the file service ended with %d", code)
        if pid == self.pid:
            self.pid = 0
            self._break_off()

    def _break_off(self) -> None:
        """It is of no more use, or gone."""
        wire, self._wire = self._wire, None
        if wire is None:
            return
        self._loop.unwatch(wire)
        wire.close()
        self._kill()
        self._unanswered.clear()
        cells, self._cells = self._cells, {}
        for cell in cells.values():
            self._lost(cell)
        for number in list(self._ending):
            self._ended(number, "")

    def _kill(self) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

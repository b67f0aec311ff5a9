"""The jailer's end of the file service (`file_service.py`), which it starts when it is first needed.

What must hold: each jail that was begun is ended once, and whoever waits for that is told, whatever becomes
of the service. How it can fail: the service ends; then all jails that it served end, and the next one begun
starts another.
"""

from __future__ import annotations

import logging
import os
import signal
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
        self._cells: dict[str, Cell] = {}
        self._ending: dict[str, Said] = {}

    def begin(self, cell: Cell) -> None:
        """OSError, or Closed if the service has just ended."""
        if self._wire is None:
            self._start()
        root = roots.jail_state(cell.jail_id, self._config)
        output, cell.output = cell.output, -1
        owner = self._config.agent_uid(cell.slot)
        self._cells[cell.jail_id] = cell
        self._send({"do": "serve", "jail": cell.jail_id, "owner": owner}, (root, output))

    def control(self, cell: Cell, fd: int) -> None:
        """`fd`: the service's end of a socket to the daemon, which it takes. Closed if it has ended."""
        self._send({"do": "control", "jail": cell.jail_id}, (fd,))

    def measure(self, cell: Cell) -> None:
        """Closed if the service has ended."""
        most = quota.most_taken(cell.request.limits.disk_bytes)
        self._send({"do": "measure", "jail": cell.jail_id, "most": most})

    def end(self, cell: Cell, said: Said) -> None:
        """Its processes have ended. `said` is called once, at once for one that was not begun."""
        if self._cells.get(cell.jail_id) is not cell:
            said("")
            return
        self._ending[cell.jail_id] = said
        try:
            self._send({"do": "end", "jail": cell.jail_id})
        except Closed:
            self._ended(cell.jail_id, "")
            return
        self._loop.after(_LAST_WORDS_SECONDS, lambda: self._lose_patience(cell))

    def close(self) -> None:
        """At the jailer's end."""
        if self.pid:
            self._kill()
            with suppress(ChildProcessError):  # the loop may have been quicker
                os.waitpid(self.pid, 0)

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
            case {"measured": str(jail_id), "over": bool(over)} if cell := self._cells.get(jail_id):
                self._measured(cell, over)
            case {"ended": str(jail_id), "tail": str(tail)}:
                self._ended(jail_id, tail)

    def _ended(self, jail_id: str, tail: str) -> None:
        self._cells.pop(jail_id, None)
        said = self._ending.pop(jail_id, None)
        if said is not None:
            said(tail)

    def _lose_patience(self, cell: Cell) -> None:
        if self._cells.get(cell.jail_id) is cell:
            log.error("the file service did not end jail %s in time, and is killed", cell.jail_id)
            self._break_off()

    def _service_ended(self, pid: int, code: int) -> None:
        if pid == self.pid:
            log.error("the file service ended with %d", code)
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
        cells, self._cells = self._cells, {}
        for cell in cells.values():
            self._lost(cell)
        for jail_id in list(self._ending):
            self._ended(jail_id, "")

    def _kill(self) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

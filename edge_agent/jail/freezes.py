"""Stops a jail's processes, and says when they have stopped.

What must hold: each request is answered once; a jail whose processes don't stop in time is thawed again. How
it can fail: a process waits for a disk, and can't be stopped until it has it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from edge_agent.jail.cell import Cell, Running
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Refused

_SECONDS, _POLL = 5.0, 0.002
# Processes that wait for something stop within a few switches of the processor: to look again at once, a few
# times, is sooner done than to come back, and takes less than the making of any jail.
_LOOKS, _PAUSE = 5, 50e-6

Done = Callable[[Refused | None], None]


class Freezes:
    def __init__(self, cgroups: Cgroups, loop: Loop) -> None:
        self._cgroups = cgroups
        self._loop = loop

    def freeze(self, cell: Cell, done: Done) -> None:
        self._cgroups.freeze(cell.jail_id)
        for _ in range(_LOOKS):
            if self._cgroups.frozen(cell.jail_id):
                break
            time.sleep(_PAUSE)
        self._poll(cell, done, round(_SECONDS / _POLL))

    def _poll(self, cell: Cell, done: Done, tries: int) -> None:
        if not isinstance(cell.phase, Running):
            done(Refused(f"jail {cell.jail_id} ended"))
        elif self._cgroups.frozen(cell.jail_id):
            done(None)
        elif tries == 0:
            self._cgroups.thaw(cell.jail_id)
            done(
                Refused(
                    f"the processes of jail {cell.jail_id} did not stop in {_SECONDS:g} s",
                    "they may wait for a disk; it was thawed again",
                )
            )
        else:
            self._loop.after(_POLL, lambda: self._poll(cell, done, tries - 1))

"""How jails end: those that are killed, and what is left of them, or of those that were never begun: control
groups, which the kernel removes only when nobody is in them any more.

What must hold: who is struck ends; `gone` is called once, when nothing is left. How it can fail: a process
does not end; then it is logged every few seconds, and killed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress

from edge_agent.jail.cell import Cell
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.loop import Loop

log = logging.getLogger(__name__)

_STRIKE_AGAIN = 0.5  # seconds
_POLL, _COMPLAIN = 0.005, 1000


class Graves:
    def __init__(self, cgroups: Cgroups, loop: Loop) -> None:
        self._cgroups = cgroups
        self._loop = loop
        self._open: set[str] = set()

    def __contains__(self, jail_id: str) -> bool:
        return jail_id in self._open

    @property
    def empty(self) -> bool:
        return not self._open

    def strike(self, cell: Cell) -> None:
        """Kills what there is of it, frozen or not: again and again, until it is reaped. On cgroup v1 what is
        frozen does not die before it is thawed, and the daemon may freeze it once more while it dies."""
        if cell.struck is not None:
            cell.struck.cancel()
        if not cell.reaped:
            cell.kill()
            cell.struck = self._loop.after(_STRIKE_AGAIN, lambda: self.strike(cell))
        try:
            self._cgroups.kill(cell.jail_id)
        except OSError as error:  # there is no descriptor left for it, say
            log.error("jail %s can't be killed now: %s", cell.jail_id, error)  # noqa: TRY400

    def bury(self, jail_id: str, gone: Callable[[], None], unborn: bool = False) -> None:
        """`unborn`: nobody knows its processes, if there are any: the wright may have made one before it was
        killed, and that may join the jail's groups at any time."""
        self._try(jail_id, gone, unborn, 0)

    def _try(self, jail_id: str, gone: Callable[[], None], unborn: bool, tries: int) -> None:
        complain = tries % _COMPLAIN == _COMPLAIN - 1
        if complain:
            log.error("jail %s: its control group can't be removed yet", jail_id)
        if unborn or complain:
            with suppress(OSError):  # as above: then next time
                self._cgroups.kill(jail_id)
        if self._cgroups.remove(jail_id):
            self._open.discard(jail_id)
            gone()
            return
        self._open.add(jail_id)
        self._loop.after(_POLL, lambda: self._try(jail_id, gone, unborn, tries + 1))

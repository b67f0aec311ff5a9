"""What running jails have of the machine: measured, and changed in place.

Nothing here waits; what takes time goes on in the loop's callbacks. How it can fail: a jail ends meanwhile,
which is a refusal, or has more memory than it is to have and can't do without.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import suppress

from edge_agent.jail.cell import Cell, Running
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.loop import Loop
from edge_agent.jail.protocol import Limits, Refused, Resize
from edge_agent.jail.wire import Closed
from shared.units import format_size

_SHRINK_SECONDS, _SHRINK_POLL = 1.0, 0.05
_PAUSE_FACTOR, _LONGEST_PAUSE = 20, 10.0  # seconds
_BUSY_SECONDS = 0.01  # of a processor: with less, nobody fills a disk

Done = Callable[[Refused | None], None]  # called once; with why not


class Shares:
    """`ask` has somebody look at a jail's /state. Closed if there is nobody."""

    def __init__(
        self,
        cgroups: Cgroups,
        loop: Loop,
        ask: Callable[[Cell], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cgroups = cgroups
        self._loop = loop
        self._ask = ask
        self._clock = clock

    def measure(self, cell: Cell) -> None:
        """Somebody is to look at its /state, if the jail did anything since the last time."""
        now = self._clock()
        if cell.measuring is not None or now < cell.measure_after or not isinstance(cell.phase, Running):
            return
        if self._cgroups.usage(cell.jail_id).cpu_seconds - cell.cpu_seconds < _BUSY_SECONDS:
            return
        with suppress(Closed):  # its end is noticed where it is read
            self._ask(cell)
            cell.measuring = now

    def measured(self, cell: Cell) -> None:
        """Looking takes time, of the jail's own share or of who serves all files: so a large state is looked
        at less often, but not so seldom that it pays to have one."""
        now = self._clock()
        took = now - (now if cell.measuring is None else cell.measuring)
        cell.measuring = None
        cell.measure_after = now + min(_LONGEST_PAUSE, _PAUSE_FACTOR * took)
        with suppress(OSError):
            cell.cpu_seconds = self._cgroups.usage(cell.jail_id).cpu_seconds

    def resize(self, cell: Cell, request: Resize, done: Done) -> None:
        wanted = dataclasses.replace(
            cell.request.limits,
            memory_bytes=request.memory_bytes,
            cpu_millis=request.cpu_millis,
            pids=request.pids,
        )
        self._try(cell, wanted, done, round(_SHRINK_SECONDS / _SHRINK_POLL))

    def _try(self, cell: Cell, wanted: Limits, done: Done, tries: int) -> None:
        """All limits change together, once its memory is below the new one: nothing is killed for it."""
        if not isinstance(cell.phase, Running):
            done(Refused(f"jail {cell.jail_id} ended"))
            return
        try:
            if self._is_below(cell, wanted):
                self._cgroups.limit(cell.jail_id, wanted)
                cell.request = dataclasses.replace(cell.request, limits=wanted)
                done(None)
            elif tries > 0:
                self._loop.after(_SHRINK_POLL, lambda: self._try(cell, wanted, done, tries - 1))
            else:
                self._cgroups.limit(cell.jail_id, cell.request.limits)
                done(self._too_small(cell, wanted))
        except OSError as error:
            done(Refused(f"the limits of jail {cell.jail_id} can't be changed: {error}"))

    def _is_below(self, cell: Cell, wanted: Limits) -> bool:
        if wanted.memory_bytes >= cell.request.limits.memory_bytes:
            return True
        return self._cgroups.shrink(cell.jail_id, wanted)

    def _too_small(self, cell: Cell, wanted: Limits) -> Refused:
        used, most = self._cgroups.usage(cell.jail_id).memory_bytes, wanted.memory_bytes
        return Refused(
            f"jail {cell.jail_id} uses {format_size(used)} of memory, and can't do with {format_size(most)}",
            "choose more, or wait until it hibernates: then it may be of any size",
        )

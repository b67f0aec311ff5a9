"""Sends the idlest instances to sleep while the machine is short of memory. What is decided: `pressure`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from edge_agent import pressure
from edge_agent.pressure import Idle, Reading
from edge_agent.starts import Starts
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)


class Sleepers(Protocol):
    """Those who may be sent to sleep. Real: `Supervisor`."""

    def idle(self) -> list[Idle]: ...

    async def hibernate(self, keys: Sequence[InstanceKey], least_idle: float) -> list[InstanceKey]:
        """Those of `keys` that sleep now. One that was talked to within `least_idle` seconds goes on."""
        ...


class ReliefLoop:
    """`reconcile` is to be run every `pressure.PERIOD` seconds."""

    def __init__(
        self,
        read: Callable[[], Reading],
        sleepers: Sleepers,
        starts: Starts,
        clock: Callable[[], float],
    ) -> None:
        self._read = read
        self._sleepers = sleepers
        self._starts = starts
        self._clock = clock
        self._pressed = False

    async def reconcile(self) -> None:
        try:
            reading = self._read()
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise RoostError(
                Reason.NODE_FAILED, f"how much memory is left can't be read: {error!r}"
            ) from error
        idle = self._sleepers.idle()
        relief = pressure.decide(reading, self._pressed, self._starts.parked, idle, self._clock())
        if relief.pressed != self._pressed:
            log.info("memory is %s: %s", "short" if relief.pressed else "enough again", reading)
        self._pressed = relief.pressed
        self._starts.hold_back(relief.end_parked)
        if relief.sleep:
            gone = await self._sleepers.hibernate(relief.sleep, pressure.LEAST_IDLE)
            names = ", ".join(map(str, gone[:10])) + (" and more" if len(gone) > 10 else "")
            log.info("%d of %d idle instances hibernate, since %s: %s", len(gone), len(idle), reading, names)

"""When the machine runs short of memory, the idlest instances sleep first: decided from plain values.

Always true: parked jails go before any instance; nobody goes who was talked to a moment ago; it starts and
stops at different readings, so that it does not flap. That something waits for memory counts only while the
machine has little left: an agent that presses against a limit of its own makes itself wait, and must not
send others to sleep.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.identity import InstanceKey

PERIOD = 2.0
_STALLED, _FLOWING = 0.10, 0.02  # share of the time in which something waited for memory
_LITTLE, _SCARCE, _ENOUGH = 0.20, 0.05, 0.08  # share of the memory that can be had
_SHARE = 8  # of those who are idle, one in so many goes in a pass
LEAST_IDLE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Reading:
    """`stalled`: the share of the time since the last reading in which something waited for memory; 0 on a
    kernel that does not tell. `available`: the share of the memory that can be had without swapping."""

    stalled: float
    available: float

    def __str__(self) -> str:
        return f"{self.available:.0%} of the memory is left, {self.stalled:.0%} of the time something waits"


@dataclass(frozen=True, slots=True)
class Idle:
    key: InstanceKey
    since: float  # monotonic seconds


@dataclass(frozen=True, slots=True)
class Relief:
    """What to do. `pressed` is to be given to the next decision."""

    pressed: bool
    end_parked: bool = False
    sleep: tuple[InstanceKey, ...] = ()


def decide(reading: Reading, pressed: bool, parked: int, idle: Sequence[Idle], now: float) -> Relief:
    """`parked`: jails that wait for a user, of which none may be made while memory is short."""
    if not _is_pressed(reading, pressed):
        return Relief(False)
    if parked:
        return Relief(True, end_parked=True)
    longest = sorted((i for i in idle if now - i.since >= LEAST_IDLE), key=lambda i: (i.since, str(i.key)))
    return Relief(True, True, tuple(i.key for i in longest[: math.ceil(len(longest) / _SHARE)]))


def _is_pressed(reading: Reading, pressed: bool) -> bool:
    if pressed:
        waits = reading.stalled >= _FLOWING and reading.available < _LITTLE
        return waits or reading.available < _ENOUGH
    return (reading.stalled >= _STALLED and reading.available < _LITTLE) or reading.available < _SCARCE


class MachineMemory:
    """Reads what the kernel says. OSError or ValueError if it says nothing that can be read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, proc: Path = Path("/proc")) -> None:
        self._clock = clock
        self._proc = proc
        self._last: tuple[float, float] | None = None  # when, and seconds stalled until then

    def read(self) -> Reading:
        fields = dict(line.split(":", 1) for line in (self._proc / "meminfo").read_text().splitlines())
        kib = {name: int(fields[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
        return Reading(self._stalled(), kib["MemAvailable"] / kib["MemTotal"])

    def _stalled(self) -> float:
        try:
            text = (self._proc / "pressure" / "memory").read_text()
        except OSError:  # none, or turned off when the machine was started
            return 0.0
        now, stalled = self._clock(), int(text.split("total=", 1)[1].split()[0]) / 1e6
        last, self._last = self._last, (now, stalled)
        if last is None or now <= last[0]:
            return 0.0
        return min(1.0, max(0.0, (stalled - last[1]) / (now - last[0])))

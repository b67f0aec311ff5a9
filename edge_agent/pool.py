"""How many jails of each agent version should wait for a user, and how many of them warm: decided from plain
values.

Always true: what is parked would fit beside everything that is reserved, and real instances never see it as
taken; a version that nobody started for a while has nothing parked. Warm are at most as many as wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shared.resources import Resources, fits

WINDOW = 30.0  # seconds; as many starts as fell into it are prepared for
QUIET = 120.0  # seconds without a start, after which none is parked
MOST = 32  # of one version
SOON = 10.0  # seconds; as many starts as fell into it are warmed up for: those who come next
FEW = 2  # that are warm at least, as far as any wait
# Seconds after a start in which the machine is its user's, unless few still wait. Some times what a first
# reply may take; more would only put the work into the way of the next who comes.
PAUSE = 0.03


@dataclass(frozen=True, slots=True)
class Demand:
    """Of one version. `starts`: when, in monotonic seconds and in order, instances were started, in whatever
    way; at most MOST. `waiting`: jails that are parked or on their way to be."""

    need: Resources
    starts: tuple[float, ...]
    waiting: int

    def started(self, now: float) -> Demand:
        return Demand(self.need, (*self.starts, now)[-MOST:], self.waiting)


def decide(demands: Mapping[str, Demand], spare: Resources, now: float) -> dict[str, int]:
    """By version, how many jails to park (more than 0) or to end (less than 0). Those that were wanted last
    are served first with what room there is."""
    changes: dict[str, int] = {}
    taken = Resources()
    for version, demand in sorted(demands.items(), key=lambda item: -max(item[1].starts, default=0.0)):
        granted = 0
        for _ in range(_wanted(demand, now)):
            if not fits(demand.need, taken, spare):
                break
            taken += demand.need
            granted += 1
        if granted > demand.waiting and _must_not_be_disturbed(demand, now):
            continue
        if granted != demand.waiting:
            changes[version] = granted - demand.waiting
    return changes


def at_once(demand: Demand, now: float) -> int:
    """How many jails to park at the same time, and how many to warm up. One, as long as enough wait: whoever
    comes meanwhile finds a processor that has nothing to do, if there are two."""
    return 1 if demand.waiting >= _wanted(demand, now) // 2 else 2


def to_warm(demand: Demand, warm: int, cold: int, now: float) -> int:
    """How many of the `cold` jails that wait to warm up, where `warm` are so, or on their way."""
    soon = max(FEW, sum(now - start < SOON for start in demand.starts))
    if warm >= soon // 2 and _has_just_started(demand, now):
        return 0
    return min(max(0, soon - warm), cold)


def _wanted(demand: Demand, now: float) -> int:
    """Grows with each start that comes, since a burst seldom ends with its first; then shrinks to one."""
    if not demand.starts or now - demand.starts[-1] >= QUIET:
        return 0
    return max(1, sum(now - start < WINDOW for start in demand.starts))


def _must_not_be_disturbed(demand: Demand, now: float) -> bool:
    """Making jails takes processor time from the first turn of whoever has just come."""
    return _has_just_started(demand, now) and demand.waiting >= _wanted(demand, now) // 2


def _has_just_started(demand: Demand, now: float) -> bool:
    return bool(demand.starts) and now - demand.starts[-1] < PAUSE

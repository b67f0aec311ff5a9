"""The node's last word on room: what is promised to whom, decided at one place, atomically.

Always true: the sum of what is kept never exceeds the node's capacity, as `shared.resources.fits` sees it,
and an instance is counted once. A promise that nobody claims runs out by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources, fits

Holder = InstanceKey | str  # an instance, or the id of a task's jail


@dataclass(frozen=True, slots=True)
class _Kept:
    epoch: int
    need: Resources
    until: float  # monotonic seconds; inf for an instance that runs


class Reservations:
    def __init__(self, node: str, capacity: Resources) -> None:
        self.capacity = capacity
        self._node = node
        self._kept: dict[Holder, _Kept] = {}
        self._total = Resources()  # of these; to add up thousands would take a start longer than all else
        self._next_expiry = math.inf  # nothing runs out before

    def reserve(self, key: InstanceKey, epoch: int, need: Resources, now: float, hold: float) -> None:
        """Keeps room for `hold` seconds. NODE_FULL if there is none. Repeating it renews it."""
        self._keep(key, _Kept(epoch, need, now + hold), now)

    def claim(self, key: Holder, epoch: int, need: Resources, now: float) -> None:
        """Keeps room until `release`. NODE_FULL if there is none; always succeeds on what is reserved."""
        self._keep(key, _Kept(epoch, need, math.inf), now)

    def release(self, key: Holder, epoch: int) -> None:
        """What is kept for a later epoch stays: an instance that is on its way out does not speak for it."""
        kept = self._kept.get(key)
        if kept is not None and kept.epoch <= epoch:
            self._forget(key)

    def total(self, now: float) -> Resources:
        self._expire(now)
        return self._total

    def _keep(self, key: Holder, wanted: _Kept, now: float) -> None:
        mine = self._kept.get(key)
        others = self.total(now) - (mine.need if mine and mine.until > now else Resources())
        if not fits(wanted.need, others, self.capacity):
            raise RoostError(
                Reason.NODE_FULL,
                f"node {self._node} has no room for {key}: it needs {wanted.need}; "
                f"{others} of {self.capacity} are taken",
                "resolve again without this node, or give it more capacity",
            )
        if mine is not None and mine.epoch == wanted.epoch:
            wanted = replace(wanted, until=max(wanted.until, mine.until))
        self._forget(key)
        self._kept[key] = wanted
        self._total += wanted.need
        self._next_expiry = min(self._next_expiry, wanted.until)

    def _expire(self, now: float) -> None:
        if now < self._next_expiry:
            return
        for key in [key for key, kept in self._kept.items() if kept.until <= now]:
            self._forget(key)
        self._next_expiry = min((kept.until for kept in self._kept.values()), default=math.inf)

    def _forget(self, key: Holder) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._total -= kept.need

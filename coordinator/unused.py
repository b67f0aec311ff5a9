"""Placements that nobody came for: a client resolved and then never attached.

The node's reservation runs out by itself. Here the record is noted as hibernated, so that its room counts as
free for others too; the instance stays its owner's, and wakes there when somebody comes after all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from coordinator.cache import Cache
from coordinator.ownership import Ownership
from coordinator.records import InstanceRecord, Phase, Stored
from coordinator.registry import Registry
from shared.identity import InstanceKey

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A placement that has been seen unused, unchanged, since a time on the monotonic clock."""

    record: Stored[InstanceRecord]
    since: float


def waiting(
    known: Mapping[InstanceKey, Waiting], placed: Iterable[Stored[InstanceRecord]], now: float
) -> dict[InstanceKey, Waiting]:
    """`known`, brought up to what is placed now. A record that was written anew waits anew."""
    found = {}
    for record in placed:
        key = record.value.key
        before = known.get(key)
        same = before is not None and before.record.revision == record.revision
        found[key] = before if same and before is not None else Waiting(record, now)
    return found


class UnusedPlacements:
    """Looks after the nodes that are linked here. `reconcile` is to be run every few seconds."""

    def __init__(
        self,
        cache: Cache,
        registry: Registry,
        ownership: Ownership,
        hold: float,
        clock: Callable[[], float],
    ) -> None:
        """`hold`: seconds that a node keeps the room that it reserved."""
        self._cache = cache
        self._registry = registry
        self._ownership = ownership
        self._hold = hold
        self._clock = clock
        self._waiting: dict[InstanceKey, Waiting] = {}

    async def reconcile(self) -> None:
        now = self._clock()
        self._waiting = waiting(self._waiting, self._placed(), now)
        for one in self._waiting.values():
            if now - one.since > self._hold:
                log.info("nobody came for %s on %s", one.record.value.key, one.record.value.node)
                await self._ownership.hibernate_if_unchanged(one.record)

    def _placed(self) -> list[Stored[InstanceRecord]]:
        found = []
        for node in self._registry.links:
            for key, record in self._cache.instances_of(node).items():
                stored = self._cache.instance(key) if record.phase is Phase.PLACED else None
                if stored is not None:
                    found.append(stored)
        return found

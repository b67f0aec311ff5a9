"""Moves instances without being asked for each: off nodes that are draining, and to where they fare better.

One pass looks, decides (`coordinator.rebalance`), and starts moves; it waits for none. What fails is decided
anew by a later pass. Of several coordinators the one with the lowest name does it: should two believe that it
is they, they may move an instance twice, and nothing worse, since each move is an epoch transaction.

What sleeps on a draining node stays until its user calls: its state is in the blob store, so to move it later
costs nothing more, and then it is known where its user is. Resolve never wakes it on a node that is draining
while another has room, and takes it from there without asking when that node is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from coordinator.cache import Cache
from coordinator.moves import Moved, Moves, Wish
from coordinator.presence import Presence
from coordinator.rebalance import Instance, Node, decide, to_drain
from coordinator.records import COORDINATORS, InstanceRecord, Phase, Stored
from coordinator.resolving import Resolving
from shared.errors import RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

PERIOD = 1.0  # seconds
DRAINS_AT_ONCE = 4  # each takes of the target's processor, which its users have
_SHIFTS_AT_ONCE = 2
_SHIFTS_A_MINUTE = 20.0
_AGAIN = 5.0  # seconds before one that failed is tried again


@dataclass(frozen=True, slots=True)
class Seen:
    """Of an instance: since when it has this epoch, and this revision."""

    epoch: int
    placed: float
    revision: int
    heard: float

    def now(self, stored: Stored[InstanceRecord], now: float) -> Seen:
        if stored.value.epoch != self.epoch:
            return Seen(stored.value.epoch, now, stored.revision, now)
        return (
            self if stored.revision == self.revision else replace(self, revision=stored.revision, heard=now)
        )


class Mover:
    """`reconcile` is to be run every PERIOD seconds."""

    def __init__(
        self,
        cache: Cache,
        presence: Presence,
        resolving: Resolving,
        moves: Moves,
        settle: float | None,
        clock: Callable[[], float],
    ) -> None:
        """`settle`: see `coordinator.rebalance`; None: only what is drained moves."""
        self._cache = cache
        self._presence = presence
        self._resolving = resolving
        self._moves = moves
        self._settle = settle
        self._clock = clock
        self._seen: dict[InstanceKey, Seen] = {}
        self._up_since: dict[str, float] = {}
        self._failed: dict[InstanceKey, tuple[float, str]] = {}  # when, and why
        self._running: dict[InstanceKey, asyncio.Task[Moved]] = {}
        self._allowance = 1.0  # shifts
        self._last = clock()

    def trouble(self, node: str) -> list[str]:
        """Why instances are still on `node`, as far as was tried here."""
        owned = self._cache.instances_of(node)
        return [f"{key}: {why}" for key, (_, why) in sorted(self._failed.items()) if key in owned]

    async def reconcile(self) -> None:
        now = self._clock()
        if not self._leads(now):
            return
        nodes, instances = self._look(now)
        movable = [
            i for i in instances if i.key not in self._moves.moving and not self._just_failed(i.key, now)
        ]
        room = DRAINS_AT_ONCE - len(self._running)
        for key in to_drain(nodes, movable)[: max(0, room)]:
            self._begin(Wish(key, None, f"{self._owner(key)} is draining"))
        if self._settle is not None:
            self._rebalance(nodes, movable, now)

    def _rebalance(self, nodes: dict[str, Node], instances: list[Instance], now: float) -> None:
        self._allowance = min(_SHIFTS_AT_ONCE, self._allowance + (now - self._last) * _SHIFTS_A_MINUTE / 60)
        self._last = now
        most = min(_SHIFTS_AT_ONCE - len(self._running), int(self._allowance))
        assert self._settle is not None
        for shift in decide(nodes, instances, now, max(0, most), self._settle):
            self._allowance -= 1
            # A turn that begins just now is not waited for: another instance may be idle.
            self._begin(Wish(shift.key, shift.target, shift.why, turn=0.5))

    def _begin(self, wish: Wish) -> None:
        task = self._moves.begin(wish)
        self._running[wish.key] = task
        task.add_done_callback(lambda done: self._ended(wish.key, done))

    def _ended(self, key: InstanceKey, task: asyncio.Task[Moved]) -> None:
        self._running.pop(key, None)
        self._failed.pop(key, None)
        if not task.cancelled() and isinstance(error := task.exception(), RoostError):
            log.info("%s is not moved: %s", key, error.message)
            self._failed[key] = (self._clock(), error.message)

    # --- what is -------------------------------------------------------------------------------------

    def _leads(self, now: float) -> bool:
        alive = {name.removeprefix(COORDINATORS) for name in self._cache.coordinators.records}
        me = self._presence.me.id
        return self._presence.vouches(now) and me == min({*alive, me})

    def _look(self, now: float) -> tuple[dict[str, Node], list[Instance]]:
        awake = (s for s in self._cache.instances.records.values() if s.value.phase is not Phase.HIBERNATED)
        stored = {s.value.key: s for s in awake}
        fresh = {key: Seen(s.value.epoch, now, s.revision, now) for key, s in stored.items()}
        self._seen = {key: self._seen.get(key, fresh[key]).now(s, now) for key, s in stored.items()}
        self._failed = {key: failed for key, failed in self._failed.items() if key in stored}
        nodes = {}
        for candidate in self._resolving.candidates({}):
            since = self._up_since.setdefault(candidate.id, now) if candidate.up else now
            if not candidate.up:
                self._up_since.pop(candidate.id, None)
            record = self._cache.node(candidate.id)
            assert record is not None
            nodes[candidate.id] = Node(candidate, record.value.info.site, since)
        return nodes, [one for s in stored.values() if (one := self._instance(s.value))]

    def _instance(self, record: InstanceRecord) -> Instance | None:
        agent = self._cache.agent(record.key.tenant, record.key.agent)
        if agent is None:
            return None
        seen = self._seen[record.key]
        need = agent.need.sized(record.size)
        return Instance(record.key, record.node, need, seen.placed, seen.heard, record.home)

    def _just_failed(self, key: InstanceKey, now: float) -> bool:
        return key in self._failed and now - self._failed[key][0] < _AGAIN

    def _owner(self, key: InstanceKey) -> str:
        stored = self._cache.instance(key)
        return stored.value.node if stored else "its node"

"""This coordinator's own sign of life in the store: one record under one lease.

While the lease may have expired, this coordinator vouches for no node: it acknowledges no heartbeat and
calls no node lost, since another may already be doing its work. It counts from when it *sent* the last
renewal that was answered, so it stops no later than the store could let the lease expire.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from coordinator.records import CoordinatorRecord, coordinator_key
from coordinator.store.base import Put, Store
from shared.errors import RoostError

log = logging.getLogger(__name__)


class Presence:
    """Call `keep` every third of `ttl` seconds."""

    def __init__(self, store: Store, me: CoordinatorRecord, ttl: float, clock: Callable[[], float]) -> None:
        self.me = me
        self.since = 0.0  # when, on the monotonic clock, the present lease was granted
        self._store = store
        self._ttl = ttl
        self._clock = clock
        self._lease = 0
        self._left = False
        self._renewed = -math.inf

    def vouches(self, now: float) -> bool:
        return now - self._renewed < self._ttl

    async def keep(self) -> None:
        """Renews the lease, or gets a new one and registers anew. STORE_UNAVAILABLE: call it again."""
        if self._left:
            return
        sent = self._clock()
        timeout = self._ttl / 3
        if not self._lease or not await self._store.keep_alive(self._lease, timeout):
            await self._register(timeout)
            self.since = sent
        elif not await self._is_registered(timeout):
            return
        self._renewed = sent

    async def leave(self) -> None:
        """Lets the others know at once that this coordinator is gone."""
        self._left = True
        if self._lease:
            self._renewed = -math.inf
            lease, self._lease = self._lease, 0
            try:
                await self._store.revoke_lease(lease, timeout=1.0)
            except RoostError as error:
                log.warning("%s; the others notice when the lease expires", error.message)

    async def _register(self, timeout: float) -> None:
        lease = await self._store.grant_lease(self._ttl, timeout)
        await self._store.txn([], [Put(coordinator_key(self.me.id), self.me.encode(), lease)], timeout)
        self._lease = lease
        log.info("registered as %s at %s", self.me.id, self.me.address)

    async def _is_registered(self, timeout: float) -> bool:
        record = await self._store.get(coordinator_key(self.me.id), timeout)
        if record is None:
            self._lease = 0  # somebody deleted it: the next call registers anew
            return False
        other = CoordinatorRecord.decode(record).value
        if other != self.me:
            log.error(
                "another coordinator, at %s, runs as %s too: give each an id of its own. "
                "This one vouches for no node meanwhile",
                other.address,
                self.me.id,
            )
            return False
        return True

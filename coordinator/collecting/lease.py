"""One collector at a time, to spare the others the work: safety does not rest on it (`rounds.py`)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from coordinator.collecting.rounds import COLLECTOR
from coordinator.store.base import Expect, Put, Store
from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

TTL = 10.0  # seconds


class Lease:
    """Held, as far as can be known: counted from when the last renewal that was answered was sent."""

    def __init__(
        self, store: Store, lease: int, revision: int, clock: Callable[[], float], since: float
    ) -> None:
        self.guard = Expect(COLLECTOR, revision)
        self._store = store
        self._lease = lease
        self._clock = clock
        self._renewed = since

    def check(self) -> None:
        """To be called before each thing that only one should do. COLLECTING if another may be at it."""
        if self._clock() - self._renewed >= TTL:
            raise RoostError(
                Reason.COLLECTING,
                "this coordinator has lost its lease as the collector",
                "another one goes on",
            )

    async def keep(self) -> None:
        """Until cancelled."""
        while True:
            sent = self._clock()
            with suppress(RoostError):  # `check` notices
                if await self._store.keep_alive(self._lease, TTL / 3):
                    self._renewed = sent
            await asyncio.sleep(TTL / 4)


@asynccontextmanager
async def held(store: Store, me: str, clock: Callable[[], float]) -> AsyncIterator[Lease]:
    """COLLECTING if another coordinator has it."""
    since = clock()
    lease = await store.grant_lease(TTL)
    keeping: asyncio.Task[None] | None = None
    try:
        result = await store.txn([Expect(COLLECTOR, 0)], [Put(COLLECTOR, me.encode(), lease)])
        if not result.succeeded:
            other = await store.get(COLLECTOR)
            who = other.value.decode() if other else "another coordinator"
            raise RoostError(
                Reason.COLLECTING, f"{who} is collecting just now", "`roost status` shows when it is done"
            )
        mine = Lease(store, lease, result.revision, clock, since)
        keeping = asyncio.create_task(mine.keep(), name="keep the collector's lease")
        yield mine
    finally:
        if keeping is not None:
            keeping.cancel()
        with suppress(RoostError):  # it expires
            await store.revoke_lease(lease, timeout=1.0)

"""Freezing a jail for more than one reason at a time.

Always true: the jail is frozen while at least one reason holds, and thawed when none does. Reasons are the
capture of its files, and the node's doubt that it still is the owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_agent.jail.api import Jail, JailGone


class Freezer:
    def __init__(self) -> None:
        self._jail: Jail | None = None
        self._reasons: set[str] = set()
        self._is_frozen: bool | None = False  # None: not known
        self._lock = asyncio.Lock()
        self._thawing: asyncio.Task[None] | None = None

    def attach(self, jail: Jail) -> None:
        self._jail, self._is_frozen = jail, False

    def adopt(self, jail: Jail) -> None:
        """One that an earlier daemon left, perhaps frozen: the next `hold` or `drop` sets that right."""
        self._jail, self._is_frozen = jail, None

    def detach(self) -> None:
        self._jail = None

    async def hold(self, reason: str) -> None:
        self._reasons.add(reason)
        await self._apply()

    async def drop(self, reason: str) -> None:
        self._reasons.discard(reason)
        await self._apply()

    @asynccontextmanager
    async def frozen(self, reason: str) -> AsyncIterator[None]:
        """After the block it is thawed while other things go on: `settled` waits for that."""
        try:
            await self.hold(reason)
            yield
        finally:
            self._thawing = asyncio.create_task(self.drop(reason), name="thaw")
            self._thawing.add_done_callback(_look_at)  # if it failed, the next to freeze or thaw is told, too

    async def settled(self) -> None:
        """Returns when it is thawed after `frozen`. JAIL_FAILED if it can't be."""
        if self._thawing is not None:
            await asyncio.shield(self._thawing)

    async def _apply(self) -> None:
        async with self._lock:
            if self._jail is None or bool(self._reasons) == self._is_frozen:
                return
            try:
                if self._reasons:
                    await self._jail.freeze()
                else:
                    await self._jail.thaw()
            except JailGone:  # nothing is left to freeze or thaw; who goes on to use the jail is told there
                self._jail = None
            self._is_frozen = bool(self._reasons)


def _look_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.exception()

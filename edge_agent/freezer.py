"""Freezing a jail for more than one reason at a time.

Always true: the jail is frozen while at least one reason holds, and thawed when none does. Reasons are the
capture of its files, a move, and the node's doubt that it still is the owner.

To hold and to drop a reason is done at once; what follows is done by one task at a time, which goes on until
the jail is as it should be, whoever stops waiting for it. How it can fail: the jail can't be frozen or thawed
(JAIL_FAILED). Whoever waits is told, the reasons stay as they are, and the next to hold, drop or wait has it
tried again. Nobody ends the task: it ends when its jail does, which follows each `detach`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_agent.jail.api import Jail, JailGone
from shared.errors import RoostError


class Freezer:
    def __init__(self) -> None:
        self._jail: Jail | None = None
        self._reasons: set[str] = set()
        self._is_frozen: bool | None = False  # None: not known
        self._work: asyncio.Task[None] | None = None

    def attach(self, jail: Jail) -> None:
        self._jail, self._is_frozen = jail, False
        self._begin()  # should a reason hold

    def adopt(self, jail: Jail) -> None:
        """One that an earlier daemon left, perhaps frozen: the next `hold` or `drop` sets that right."""
        self._jail, self._is_frozen = jail, None

    def detach(self) -> None:
        self._jail = None

    async def hold(self, reason: str) -> None:
        """Returns when it is frozen, or the reason has gone again."""
        self._reasons.add(reason)
        await self._done()

    async def drop(self, reason: str) -> None:
        """Returns when it is thawed, unless another reason holds."""
        self._reasons.discard(reason)
        await self.settled()

    @asynccontextmanager
    async def frozen(self, reason: str) -> AsyncIterator[None]:
        """After the block it is thawed while other things go on: `settled` waits for that."""
        try:
            await self.hold(reason)
            yield
        finally:
            self._reasons.discard(reason)
            self._begin()

    async def settled(self) -> None:
        """Returns when it is thawed, unless a reason holds. JAIL_FAILED if it can't be."""
        if not self._reasons:
            await self._done()

    async def _done(self) -> None:
        if task := self._begin():
            await asyncio.shield(task)

    def _begin(self) -> asyncio.Task[None] | None:
        """What brings it to how it should be; None if it is so."""
        if self._work is not None and not self._work.done():
            return self._work
        if self._is_right:
            return None
        self._work = asyncio.create_task(self._set_right(), name="freezer")
        self._work.add_done_callback(_look_at)
        return self._work

    @property
    def _is_right(self) -> bool:
        return self._jail is None or self._is_frozen is bool(self._reasons)

    async def _set_right(self) -> None:
        while (jail := self._jail) is not None and not self._is_right:
            freeze, self._is_frozen = bool(self._reasons), None
            try:
                await (jail.freeze() if freeze else jail.thaw())
            except JailGone:  # nothing is left to freeze or thaw; who goes on to use the jail is told there
                if self._jail is jail:
                    self._jail = None
            except RoostError:
                if self._jail is jail and bool(self._reasons) is freeze:
                    raise
            else:
                if self._jail is jail:
                    self._is_frozen = freeze


def _look_at(task: asyncio.Task[None]) -> None:
    """If it failed, whoever waits is told, if anybody does."""
    if not task.cancelled():
        task.exception()

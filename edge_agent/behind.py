"""The commit of a turn whose reply has been given out already (`durability = "async"`).

Always true: at most one is under way, so at most one turn that a client was told of can be lost. What failed
is known here until whoever goes on has seen to it: what ran on from that turn must end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)


class Behind:
    """`failed` is awaited when a commit fails, with `failure` set."""

    def __init__(self, failed: Callable[[RoostError], Awaitable[None]]) -> None:
        self.failure: RoostError | None = None
        self._failed = failed
        self._task: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        return self._task is not None and not self._task.done()

    def begin(self, commit: Coroutine[Any, Any, None], name: str) -> None:
        assert not self.busy, "the one before is waited for"
        self._task = asyncio.create_task(self._run(commit, name), name=name)
        self._task.add_done_callback(self._forget)

    async def wait(self) -> None:
        """Until none is under way, however it ends."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def cancel(self) -> None:
        """It is of no use any more, or nobody can wait for it. Whether it comes about is open."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _forget(self, task: asyncio.Task[None]) -> None:
        if self._task is task:
            self._task = None

    async def _run(self, commit: Coroutine[Any, Any, None], name: str) -> None:
        try:
            await commit
            return
        except RoostError as error:
            self.failure = error
        except Exception as error:
            log.exception("%s failed by a bug", name)
            self.failure = RoostError(Reason.INTERNAL, f"{name} failed by a bug: {error}")
        await self._failed(self.failure)

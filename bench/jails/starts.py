"""Starts in three patterns, of whatever can be started."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

PERIOD = 0.2  # seconds between staggered starts
AT_ONCE = 25  # starts of one burst: so many of a second and 60 MB each fit in a few GB
MESSAGE = "a table for two"
REPLY = f"You said: {MESSAGE}"
LOOP_MESSAGE = f"loop: {MESSAGE}"
SECONDS = 180.0  # for one start


class Failed(Exception):
    """A start did not come to its first reply, and why."""


class Started(Protocol):
    """An agent that has given its first reply."""

    @property
    def seconds(self) -> float:
        """From the request to then."""
        ...

    async def end(self) -> None:
        """Returns when nothing of it is left."""
        ...


class Contender(Protocol):
    """A way to start the agent. `name` begins its figures."""

    @property
    def name(self) -> str: ...

    async def ready(self, starts: int) -> None:
        """Waits until so many starts at once could go as they should."""
        ...

    async def start(self, message: str = MESSAGE) -> Started:
        """Failed, and nothing of it is left then."""
        ...

    def remark(self) -> str:
        """On the starts since the last one; may be empty."""
        ...


class Patterns:
    """`failures` says why starts failed, for whoever wants to know."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.failures: list[str] = []

    async def sequential(self, contender: Contender, message: str = MESSAGE) -> Sequence[float | None]:
        took = []
        for _ in range(self.count):
            await contender.ready(1)
            took.append(await self._one(contender, message))
        return took

    async def staggered(self, contender: Contender) -> Sequence[float | None]:
        await contender.ready(1)
        starting = []
        for _ in range(self.count):
            starting.append(asyncio.create_task(self._one(contender)))
            await asyncio.sleep(PERIOD)
        return await asyncio.gather(*starting)

    async def burst(self, contender: Contender) -> Sequence[float | None]:
        """AT_ONCE at a time, until all have been."""
        took: list[float | None] = []
        while (left := self.count - len(took)) > 0:
            now = min(left, AT_ONCE)
            await contender.ready(now)
            took += await asyncio.gather(*(self._one(contender) for _ in range(now)))
        return took

    async def _one(self, contender: Contender, message: str = MESSAGE) -> float | None:
        try:
            async with asyncio.timeout(SECONDS):
                started = await contender.start(message)
        except (Failed, TimeoutError) as error:
            self.failures.append(f"{contender.name}: {error or f'no reply in {SECONDS:g} s'}"[:300])
            return None
        await started.end()
        return started.seconds

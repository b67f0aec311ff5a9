"""One reconcile loop for all background work.

A reconciler has no input: it looks at what is, compares it with what should be, and acts. So any pass
may be skipped, repeated or interrupted without harm, and a retry is simply the next pass. A pass runs
when the period is over or when somebody called `wake`; wakes during a pass cause exactly one more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import assert_never

from shared.errors import RoostError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Waiting:
    """`passes` so far; the last took `seconds`, ran because of `why`, and ended with `error` if any."""

    passes: int
    why: str
    seconds: float
    error: str | None


@dataclass(frozen=True, slots=True)
class Running:
    passes: int
    why: str


Status = Waiting | Running


class ReconcileLoop:
    """Runs `reconcile` every `period` seconds and when woken, until cancelled."""

    def __init__(self, name: str, reconcile: Callable[[], Awaitable[None]], period: float) -> None:
        self.name = name
        self.status: Status = Waiting(0, "not yet run", 0.0, None)
        self._reconcile = reconcile
        self._period = period
        self._wake = asyncio.Event()
        self._why = ""

    def wake(self, why: str) -> None:
        self._why = why
        self._wake.set()

    async def run(self) -> None:
        why = "start"
        while True:
            why = await self._one_pass(why)

    async def _one_pass(self, why: str) -> str:
        passes = self.status.passes + 1
        self._wake.clear()
        before = self.status.error if isinstance(self.status, Waiting) else None
        self.status = Running(passes, why)
        begun = time.monotonic()
        error = None
        try:
            await self._reconcile()
        except RoostError as e:
            error = f"{e.reason}: {e.message}"
            if before is None:  # once an outage, not once a pass
                log.warning("%s: %s; tried again in each pass", self.name, error)
        except Exception as e:
            error = repr(e)
            log.exception("%s: a bug in this pass; the next one tries again", self.name)
        if before is not None and error is None:
            log.info("%s: works again", self.name)
        self.status = Waiting(passes, why, time.monotonic() - begun, error)
        try:
            async with asyncio.timeout(self._period):
                await self._wake.wait()
            return self._why
        except TimeoutError:
            return "period"


def describe(status: Status) -> str:
    match status:
        case Running(passes, why):
            return f"pass {passes} runs ({why})"
        case Waiting(passes, why, seconds, error):
            result = error or "ok"
            return f"pass {passes} ({why}) took {seconds * 1000:.1f} ms: {result}"
        case _:
            assert_never(status)

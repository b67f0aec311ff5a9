"""Fills the placeholders of one instance's files while it is at work already: see `edge_agent.state.filling`.

Always true: while a snapshot is taken nothing is written; once `end` has returned nothing is under way. If it
fails the jail is killed, and `failure` says why until `end`. The next start after a failure, or after an end
while somebody waited for a file, has all files first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from edge_agent.jail.api import Jail, JailGone
from edge_agent.state.filling import Filling
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

_THEIR_FAULT = frozenset({Reason.TURN_TIMEOUT, Reason.AGENT_START_FAILED})  # they took too long


class Filler:
    """`served_seconds`: that a snapshot waits for those who wait for files."""

    def __init__(self, key: InstanceKey, served_seconds: float = 60.0) -> None:
        self.failure: RoostError | None = None
        self.may = True  # files come later, at the next start
        self._key = key
        self._served_seconds = served_seconds
        self._filling: Filling | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def unfinished(self) -> bool:
        return self._filling is not None and self._filling.unfinished

    @property
    def waited_for(self) -> str:
        """A file for which somebody in the jail waits; "" if nobody does."""
        return self._filling.waited_for if self._filling is not None else ""

    def begin(self, filling: Filling | None, jail: Jail) -> None:
        """After `end` of what was before."""
        self.may = True
        self._filling = filling
        if filling is not None:
            self._task = asyncio.create_task(self._run(filling, jail), name=f"fill {self._key}")

    async def served(self) -> None:
        """Returns when nobody waits for a file. A process that does can't be frozen on every kernel."""
        filling = self._filling
        if filling is None:
            return
        try:
            async with asyncio.timeout(self._served_seconds):
                await filling.served()
        except TimeoutError:
            self.failure = self.failure or self._late()
            raise self.failure from None

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[Filling | None]:
        """What knows the placeholders, which stay as they are during the block. One that fails counts as if
        the filling had: what it has met would be met again."""
        filling = self._filling
        if filling is None:
            yield None
            return
        try:
            async with filling.quiet:
                if self.failure is not None:  # what was found to be wrong may look right again
                    raise self.failure
                yield filling
        except RoostError as error:
            self.failure = self.failure or error
            raise
        if not filling.unfinished:  # what it knows is in that snapshot's index
            self._filling = None

    def told_instead(self, error: RoostError) -> RoostError:
        """Of an agent that took too long, if it was for a file that had not come."""
        return self._late() if error.reason in _THEIR_FAULT and self.waited_for else error

    async def end(self) -> None:
        """After the end of its jail: what waits there may keep us from writing. Idempotent."""
        task, filling = self._task, self._filling
        self._task = self._filling = None
        if filling is not None and filling.waited_for:
            self.may = False
        if self.failure is not None:
            self.may, self.failure = False, None
        try:
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        finally:
            if filling is not None:
                filling.close()

    async def _run(self, filling: Filling, jail: Jail) -> None:
        try:
            await filling.run()
            return
        except JailGone:  # whoever works with it is told so
            return
        except RoostError as error:
            self.failure = error
        except OSError as error:
            hint = "is this node's disk full?"
            self.failure = RoostError(Reason.NODE_FAILED, f"the state can't be put back here: {error}", hint)
        except Exception as error:
            log.exception("%s: a bug in the filling", self._key)
            self.failure = RoostError(Reason.INTERNAL, f"the state can't be put back here: {error!r}")
        if jail.ended:
            self.failure = None  # how it ended is the better reason
            return
        log.warning("%s is ended: %s", self._key, self.failure.message)
        with suppress(RoostError):  # whoever works with it ends it too
            await jail.kill()

    def _late(self) -> RoostError:
        return RoostError(
            Reason.BLOBS_UNAVAILABLE,
            f"{self.waited_for!r} in /state had not come to this node in time",
            "send the turn again: then all is here before it begins",
        )

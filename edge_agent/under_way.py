"""A turn from its arrival at this node to its outcome: who waits for it, and who may end it early.

Always true:
- It has one outcome, and all who wait for it are told the same.
- A client or a deadline ends it early only before its commit begins. That it was ended so is said only when
  it is certain that nothing of it is applied: it may be a turn sent again, whose commit is on record.
- It ends at the latest of the deadlines that its clients gave; one that has passed while it waited in the
  queue keeps it from beginning.

Whoever runs it (`edge_agent.instance`) says how far it is: what can be cut short at once is put into
`interruptible`; after `check`, with the record looked at, it is new; after `commits` it goes to its end.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_agent.phases import Done
from edge_agent.turns import Deltas, Turn
from shared.errors import Reason, RoostError


class UnderWay:
    """`patience`: seconds from now that whoever sent it is willing to wait."""

    def __init__(self, turn: Turn, patience: float = math.inf) -> None:
        self.turn = turn
        self.deltas = Deltas()
        self._loop = asyncio.get_running_loop()
        self._outcome: asyncio.Future[Done] = self._loop.create_future()
        self._outcome.add_done_callback(_seen)
        self._is_new = self._commits = False
        self._stopped: RoostError | None = None
        self._scope: asyncio.Timeout | None = None
        self._patience = patience
        self._deadline = math.inf
        self._timer: asyncio.TimerHandle | None = None
        if patience < math.inf:
            self._set_deadline(patience)

    # --- for those who wait --------------------------------------------------------------------

    async def outcome(self) -> Done:
        """RoostError if it failed. Whoever stops waiting ends nothing."""
        return await asyncio.shield(self._outcome)

    def join(self, patience: float) -> bool:
        """One more waits for it, so long. False: it has ended, or is to end early: a new one is needed."""
        if self._outcome.done() or self._stopped:
            return False
        if self._loop.time() + patience > self._deadline:
            self._set_deadline(patience)
        return True

    def cancel(self) -> None:
        self._stop(
            RoostError(
                Reason.TURN_CANCELLED,
                "the turn was cancelled; its state is as it was before this turn",
                "send new messages under new turn ids",
            )
        )

    # --- for whoever runs it -------------------------------------------------------------------

    @asynccontextmanager
    async def interruptible(self) -> AsyncIterator[None]:
        """Raises what ended the turn early, if something does before the block is left."""
        if self._stopped:
            raise self._stopped
        try:
            async with asyncio.timeout(None) as self._scope:
                yield
        except TimeoutError:
            if self._stopped is None:
                raise
            raise self._stopped from None
        finally:
            self._scope = None

    def check(self) -> None:
        """It is not on record, so that it may be said to have changed nothing. Raises what ended it early."""
        self._is_new = True
        if self._stopped:
            raise self._stopped

    def commits(self) -> None:
        """From here on it is too late to end it."""
        self._commits = True

    def end(self, outcome: Done | BaseException) -> None:
        """All who wait are told, now. What is said once stays: to end it again changes nothing."""
        self.deltas.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._outcome.done():
            return
        if isinstance(outcome, Done):
            self._outcome.set_result(outcome)
        else:
            self._outcome.set_exception(outcome)

    def _stop(self, why: RoostError) -> None:
        if self._outcome.done() or self._stopped or self._commits:
            return
        self._stopped = why
        if self._scope is not None:
            self._scope.reschedule(self._loop.time())
        elif self._is_new:  # it is about to begin, and will find that it need not
            self.end(why)

    def _set_deadline(self, patience: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._patience, self._deadline = patience, self._loop.time() + patience
        if patience < math.inf:
            self._timer = self._loop.call_at(self._deadline, self._expire)

    def _expire(self) -> None:
        self._stop(
            RoostError(
                Reason.TURN_DEADLINE,
                f"the turn did not end within the {self._patience:g} s that its client would wait; "
                "its state is as it was before this turn",
                "send it again with more time; other turns of this user may have been before it",
            )
        )


def _seen(outcome: asyncio.Future[Done]) -> None:
    """Nobody may be left to hear it."""
    if not outcome.cancelled():
        outcome.exception()

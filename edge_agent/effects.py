"""What turns do outside of their state: the node's part of a turn's journal.

An agent says of each call whether it is safe to repeat, carries a key by which the other side makes one of
many, or must never be repeated. When a turn is run again after any failure, here or on another node, it
finds what it already did.

Always true:
- A keyed or never-call is told to begin only after that is durable; the turn goes on only after its end is.
- A call whose end is known is not made again. A never-call whose end is not known is not either: its turn
  fails with EFFECT_UNCERTAIN, whatever the agent makes of it, until a person has said what happened.
- A turn that was run before and now makes other calls fails with EFFECT_MISMATCH.
- Results of safe calls wait for nobody: they travel with the next call that is recorded. So a run is
  repeated as it was up to the last recorded call.

How it can fail: the coordinator can't be reached (the call does not begin, or its end is not recorded; the
turn fails, and is to be sent again), another node owns the instance (EPOCH_STALE: the jail is killed), the
agent ends or runs out of time within a call (of a never-call that is noted at once, or by the next run).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, assert_never

from edge_agent.call_messages import called, kept, parse_call, parse_done, refused
from edge_agent.control import Beside, ControlPlane
from edge_agent.jail.api import Jail, JailGone
from edge_agent.timer_messages import TurnTimers
from shared.effects import MAX_CALLS, MAX_RESULTS, MAX_UNFINISHED, Call, CallState, Repeat
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.lifecycle import retry_until

log = logging.getLogger(__name__)

_READ_SECONDS = 5.0
_BEGIN_SECONDS = 10.0  # for a call to become durable
_END_SECONDS = 60.0  # for its end, which is worth more: it was made
_ATTEMPT_SECONDS = 2.0
_LAST_SECONDS = 2.0  # for what is known when the turn has failed

Tell = Callable[[bytes], None]


# --- what a call calls for -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Make:
    """`revision`: what its record has now."""

    revision: int


@dataclass(frozen=True, slots=True)
class Known:
    call: Call


@dataclass(frozen=True, slots=True)
class Ambiguous:
    call: Call


@dataclass(frozen=True, slots=True)
class Other:
    """The journal has another call in this place."""

    call: Call


def decide(recorded: Call | None, asked: Call) -> Make | Known | Ambiguous | Other:
    if recorded is None:
        return Make(0)
    if (recorded.name, recorded.arguments, recorded.repeat) != (asked.name, asked.arguments, asked.repeat):
        return Other(recorded)
    match recorded.state:
        case CallState.DONE | CallState.FAILED:
            return Known(recorded)
        case CallState.NOT_MADE:
            return Make(recorded.revision)
        case CallState.BEGUN:
            return Ambiguous(recorded) if recorded.repeat is Repeat.NEVER else Make(recorded.revision)
        case CallState.UNCERTAIN:
            return Ambiguous(recorded)
        case _:
            assert_never(recorded.state)


def key_of(key: InstanceKey, turn_id: str, call: Call) -> str:
    """The same in each run of the turn, and no other call's."""
    text = json.dumps([str(key), turn_id, call.number, call.name])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# --- an instance's -------------------------------------------------------------------------------


class Effects:
    """Which turns of an instance have a journal: asked for when it wakes, and changed by nobody else then."""

    def __init__(self, key: InstanceKey, epoch: int, control: ControlPlane) -> None:
        self.key = key
        self.epoch = epoch
        self._control = control
        self._unfinished: tuple[str, ...] | None = None  # not known: an earlier daemon of this node woke it

    def woken(self, unfinished: Sequence[str]) -> None:
        self._unfinished = tuple(unfinished)

    async def of_turn(self, turn_id: str, timer: str, jail: Jail, tell: Tell) -> TurnCalls:
        """`timer`: the name of the one that started it, if any. `tell` sends the agent an answer."""
        recorded: Sequence[Call] = ()
        others = len(self._unfinished) if self._unfinished is not None else 0
        if self._unfinished is None or turn_id in self._unfinished:
            recorded = await self._control.journal(self.key, self.epoch, turn_id, (), _READ_SECONDS)
        # More than are kept, since nobody said of a call in each what became of it.
        too_many = not recorded and others > MAX_UNFINISHED
        return TurnCalls(self, turn_id, jail, tell, recorded, too_many, timer)

    def ended(self, turn_id: str) -> None:
        """The turn is committed, and its journal gone."""
        if self._unfinished is not None:
            self._unfinished = tuple(other for other in self._unfinished if other != turn_id)

    async def write(self, turn_id: str, calls: Sequence[Call], seconds: float) -> Sequence[Call]:
        return await retry_until(
            asyncio.get_running_loop().time() + seconds,
            lambda left: self._control.journal(
                self.key, self.epoch, turn_id, calls, min(left, _ATTEMPT_SECONDS)
            ),
            lambda error: isinstance(error, RoostError) and error.remedy is Remedy.RETRY,
        )


# --- a turn's ------------------------------------------------------------------------------------


class TurnCalls:
    """The calls of one run of a turn, and the timers that it sets. `too_many`: of this instance's turns have
    an open end already."""

    def __init__(
        self,
        effects: Effects,
        turn_id: str,
        jail: Jail,
        tell: Tell,
        recorded: Sequence[Call] = (),
        too_many: bool = False,
        timer: str = "",
    ) -> None:
        self._timer = timer
        self._effects = effects
        self._turn_id = turn_id
        self._jail = jail
        self._tell = tell
        self._too_many = too_many
        self._recorded = {call.number: call for call in recorded}
        self._asked: set[int] = set()
        self._under_way: dict[int, Call] = {}
        self._ended: dict[int, Call] = {}  # but that is not durable yet
        self._ambiguous: list[Call] = []  # and not noted as uncertain yet
        self._unwritten: list[Call] = []  # results of safe calls
        self._result_bytes = sum(len(call.result) for call in recorded)
        self._timers = TurnTimers()
        self._tasks: set[asyncio.Task[None]] = set()
        self._killing: asyncio.Task[None] | None = None
        self._verdict: RoostError | None = None  # that the turn fails with, whatever the agent says

    def take(self, message: Mapping[str, Any]) -> None:
        """A "call", "done" or "timer" of the agent. BAD_REQUEST if it can't be followed."""
        match message.get("kind"):
            case "call":
                self._call(parse_call(message))
            case "done":
                self._done(message)
            case _:
                self._timers.take(message)

    async def around(self, speaking: Coroutine[Any, Any, str]) -> str:
        """The turn's reply, which `speaking` gives; or why the turn must not be committed."""
        try:
            reply = await speaking
            self._check_complete()
            return reply
        except RoostError as error:
            raise await self._judged(error) from error
        finally:
            await self._stop()
            if self._killing is not None:
                await self._killing

    def beside(self) -> Beside:
        calls = max(self._recorded, default=-1) + 1
        return Beside(calls, self._timers.settings, self._timers.cancelled, self._timer)

    # --- one call --------------------------------------------------------------------------------

    def _call(self, asked: Call) -> None:
        number = asked.number
        if number in self._asked:
            raise RoostError(Reason.BAD_REQUEST, f"call {number} was begun before in this turn")
        self._asked.add(number)
        if number >= MAX_CALLS or self._too_many:
            self._tell(refused(self._turn_id, number, self._limit(number)))
            return
        match decide(self._recorded.get(number), asked):
            case Known(call):
                self._tell(called(self._turn_id, number, call))
            case Ambiguous(call):
                if call.state is not CallState.UNCERTAIN:
                    self._ambiguous.append(call)
                self._refuse(number, self._uncertain(call))
            case Other(call):
                now = f"is {asked.name!r}" if asked.name != call.name else "has other arguments"
                self._refuse(number, self._mismatch(call, now))
            case Make(revision):
                self._under_way[number] = replace(asked, revision=revision)
                if asked.repeat is Repeat.SAFE:
                    self._tell(called(self._turn_id, number, None))
                else:
                    self._do(self._begin(number))

    async def _begin(self, number: int) -> None:
        call = self._under_way[number]
        unwritten, self._unwritten = self._unwritten, []
        *_, self._under_way[number] = await self._write([*unwritten, call], _BEGIN_SECONDS)
        key = key_of(self._effects.key, self._turn_id, call) if call.repeat is Repeat.KEYED else ""
        self._tell(called(self._turn_id, number, None, key))

    def _done(self, message: Mapping[str, Any]) -> None:
        number, state, result = parse_done(message)
        call = self._under_way.get(number)
        if call is None or number in self._ended or number in self._unbegun():
            raise RoostError(Reason.BAD_REQUEST, f"call {number} is not under way")
        fits = self._result_bytes + len(result) <= MAX_RESULTS
        self._result_bytes += len(result) if fits else 0
        if call.repeat is Repeat.SAFE:
            del self._under_way[number]
            if fits:
                self._unwritten.append(replace(call, state=state, result=result))
            return
        if not fits:
            over = f"the results of this turn's calls are over {MAX_RESULTS >> 10} KiB in all"
            state, result = CallState.FAILED, over
        self._ended[number] = replace(call, state=state, result=result)
        self._do(self._end(number))

    def _unbegun(self) -> set[int]:
        """Those that were not told to begin: what they are is not durable yet."""
        return {n for n, call in self._under_way.items() if call.repeat is not Repeat.SAFE and not call.epoch}

    async def _end(self, number: int) -> None:
        (call,) = await self._write([self._ended[number]], _END_SECONDS)
        del self._under_way[number], self._ended[number]
        self._tell(kept(self._turn_id, call))

    # --- the journal -----------------------------------------------------------------------------

    async def _write(self, calls: Sequence[Call], seconds: float) -> Sequence[Call]:
        written = await self._effects.write(self._turn_id, calls, seconds)
        self._recorded.update({call.number: call for call in written})
        return written

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"a call of turn {self._turn_id}")
        self._tasks.add(task)
        task.add_done_callback(self._did)

    def _did(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, RoostError):
            log.error("%s failed by a bug", task.get_name(), exc_info=error)
            error = RoostError(Reason.INTERNAL, f"the journal of turn {self._turn_id} failed: {error!r}")
        self._verdict = self._verdict or error
        if self._killing is None:  # nothing that the agent still does would count
            self._killing = asyncio.create_task(self._kill(), name=f"end of turn {self._turn_id}")

    async def _kill(self) -> None:
        with suppress(JailGone):
            await self._jail.kill()

    async def _stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- what comes of the turn ------------------------------------------------------------------

    def _check_complete(self) -> None:
        """RoostError if the reply must not be committed."""
        if self._verdict is not None:
            raise self._verdict
        for number, call in sorted(self._recorded.items()):
            if number not in self._asked:
                raise self._mismatch(call, "is not made")
        for call in self._under_way.values():
            if call.repeat is not Repeat.SAFE:
                raise RoostError(
                    Reason.TURN_FAILED,
                    f"the agent replied while its call {call.name!r} was under way",
                    "let the turn wait for what turn.call_async returns",
                )

    async def _judged(self, error: RoostError) -> RoostError:
        """What the turn that fails by `error` really fails by: a never-call without a known end counts for
        more. What is known of its calls is made durable, for the next run of it."""
        await self._stop()
        error = self._verdict or error
        if error.reason is Reason.EPOCH_STALE:
            return error
        cut_off = [
            call
            for number, call in self._under_way.items()
            if call.repeat is Repeat.NEVER and number not in self._unbegun() | self._ended.keys()
        ]
        uncertain = [replace(call, state=CallState.UNCERTAIN) for call in (*self._ambiguous, *cut_off)]
        last = [*self._ended.values(), *uncertain]
        if last:
            try:
                await self._write(last, _LAST_SECONDS)
            except RoostError as failed:
                log.warning("turn %s: the end of its calls is not noted: %s", self._turn_id, failed.message)
                return failed
        return self._uncertain(cut_off[0], f" ({error.message})") if cut_off else error

    def _refuse(self, number: int, error: RoostError) -> None:
        """The agent is told, and the turn fails however it goes on."""
        self._verdict = self._verdict or error
        self._tell(refused(self._turn_id, number, error))

    def _uncertain(self, call: Call, why: str = "") -> RoostError:
        key = self._effects.key
        return RoostError(
            Reason.EFFECT_UNCERTAIN,
            f"nobody knows whether {call.name!r} of turn {self._turn_id} was made{why}",
            f"find out, and say so: `roost effects {key.agent} --user {key.user} --resolve "
            f"{self._turn_id}:{call.number} done` (or not-done); then send the turn again under the same id",
        )

    def _mismatch(self, call: Call, now: str) -> RoostError:
        return RoostError(
            Reason.EFFECT_MISMATCH,
            f"turn {self._turn_id} was run before; its call {call.number} was {call.name!r}, now it {now}",
            "a turn must make the same calls each time it is run: make what decides about them a call, too; "
            "or send the message under a new id",
        )

    def _limit(self, number: int) -> RoostError:
        if number >= MAX_CALLS:
            return RoostError(
                Reason.EFFECT_LIMIT,
                f"a turn makes at most {MAX_CALLS} calls",
                "do several things in one call",
            )
        key = self._effects.key
        return RoostError(
            Reason.EFFECT_LIMIT,
            f"{MAX_UNFINISHED} turns of {key} wait for a person to say whether what they began was done",
            f"`roost effects {key.agent} --user {key.user}` shows them",
        )

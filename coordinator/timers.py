"""Timers of instances: when they are due, and how often they were tried.

Always true:
- A timer comes to be, and ends, in the transaction that commits a turn: the one that set it, and the one that
  it started. A turn that is not committed sets none.
- The id of a timer's turn follows from the turn that set it. So whoever starts it, and however often, it is
  applied to the state once.
- It is claimed, by a transaction, before its turn is started; so of several coordinators one starts it, and
  its attempts are counted even if everybody dies.

How it can fail: the times of coordinators differ; by so much a timer may be early. What is claimed by a
coordinator that dies waits until the claim runs out.

All timers of an instance are one record, `timers/<instance>`, which is empty rather than deleted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from coordinator.ownership import Beside, Extra
from coordinator.records import Stored, unreadable
from coordinator.store.base import Delete, Expect, Put, Record, Store
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.timers import MAX_TIMERS, Setting

TIMERS = "timers/"
MAX_ATTEMPTS = 5
FIRST_BACKOFF, BACKOFF_FACTOR = 5.0, 4.0  # seconds after the first failure; and each time longer
NOT_COUNTED_BACKOFF = 2.0  # after a failure that was not the agent's
UNCERTAIN_BACKOFF = 60.0  # while a person is to say what became of a call
_ATTEMPTS = 5  # to write a record


@dataclass(frozen=True, slots=True)
class Timer:
    """Times are seconds since 1970. `next`: when it is tried next. `epoch` and `started_id`: where the last
    attempt went, as long as its end is not known; else 0 and empty."""

    name: str
    message: str
    due: float
    turn_id: str
    next: float
    attempts: int = 0
    epoch: int = 0
    started_id: str = ""
    error: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True)
class InstanceTimers:
    key: InstanceKey
    timers: tuple[Timer, ...] = ()

    def encode(self) -> bytes:
        values = {timer.name: astuple(timer)[1:] for timer in self.timers}
        return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()

    @classmethod
    def decode(cls, record: Record) -> Stored[InstanceTimers]:
        try:
            key = InstanceKey.parse(record.key.removeprefix(TIMERS))
            values: Mapping[str, Any] = json.loads(record.value)
            timers = tuple(Timer(name, *fields) for name, fields in values.items())
        except (ValueError, TypeError, AttributeError, RoostError) as error:
            raise unreadable(record, error) from error
        return Stored(cls(key, timers), record.revision)


def timers_key(key: InstanceKey) -> str:
    return f"{TIMERS}{key}"


# --- what becomes of them ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Changes:
    """What a turn does to its instance's timers, if it is committed. `ended`: the one that started it."""

    turn_id: str
    settings: Sequence[Setting] = ()
    cancelled: Sequence[str] = ()
    ended: str = ""

    def __bool__(self) -> bool:
        return bool(self.settings or self.cancelled or self.ended)


def changed(current: InstanceTimers, changes: Changes, now: float) -> InstanceTimers:
    """TIMER_LIMIT if there would be too many."""
    timers = {t.name: t for t in current.timers}
    ended = timers.get(changes.ended)
    if ended is not None and ended.turn_id == changes.turn_id:
        del timers[ended.name]
    for name in changes.cancelled:
        timers.pop(name, None)
    for setting in changes.settings:
        due = setting.due(now)
        turn_id = turn_id_of(current.key, changes.turn_id, setting.name)
        timers[setting.name] = Timer(setting.name, setting.message, due, turn_id, due)
    if len(timers) > MAX_TIMERS:
        raise RoostError(
            Reason.TIMER_LIMIT,
            f"{current.key} would have {len(timers)} timers; {MAX_TIMERS} are allowed",
            "let the agent cancel some, or use fewer names: a timer replaces the older one of its name",
        )
    return replace(current, timers=tuple(timers.values()))


def turn_id_of(key: InstanceKey, set_by: str, name: str) -> str:
    """Of the turn that a timer starts: always the same, and no other's."""
    text = json.dumps([str(key), set_by, name])
    return f"timer-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def claimed(timer: Timer, epoch: int, started_id: str, until: float) -> Timer:
    """It is tried now, and by nobody else until then. If it was with this daemon before, that is asked again
    rather than tried once more."""
    again = (timer.epoch, timer.started_id) == (epoch, started_id)
    attempts = timer.attempts if again else timer.attempts + 1
    return replace(timer, attempts=attempts, epoch=epoch, started_id=started_id, next=until)


def given_up(timer: Timer) -> Timer:
    told = timer.error or "it was cut off in each attempt, and nobody could tell by what"
    return replace(timer, failed=True, epoch=0, started_id="", error=told)


def after_failure(timer: Timer, error: RoostError, now: float) -> Timer:
    """What is not the agent's fault does not count as an attempt: outages must not use them up."""
    told = f"{error.reason}: {error.message}"[:500]
    timer = replace(timer, error=told, epoch=0, started_id="")
    if error.reason is Reason.EFFECT_UNCERTAIN:
        return replace(timer, attempts=timer.attempts - 1, next=now + UNCERTAIN_BACKOFF)
    if error.remedy is not Remedy.GIVE_UP:
        return replace(timer, attempts=timer.attempts - 1, next=now + NOT_COUNTED_BACKOFF)
    if timer.attempts >= MAX_ATTEMPTS:
        return given_up(timer)
    return replace(timer, next=now + FIRST_BACKOFF * BACKOFF_FACTOR ** (timer.attempts - 1))


# --- transactions --------------------------------------------------------------------------------


@dataclass
class Timers:
    """`recent`: what was last seen of an instance's timers; may be stale."""

    store: Store
    recent: Callable[[InstanceKey], Stored[InstanceTimers] | None]
    clock_unix: Callable[[], float]
    timeout: float = field(default=2.0)

    async def read(self, key: InstanceKey) -> Stored[InstanceTimers]:
        """What the store says now; revision 0 if there never was one."""
        record = await self.store.get(timers_key(key), self.timeout)
        return InstanceTimers.decode(record) if record else Stored(InstanceTimers(key), 0)

    def beside(self, key: InstanceKey, changes: Changes, also: Sequence[Put | Delete]) -> Beside:
        """For the commit of a turn: its changes, and what else it deletes."""

        async def extra(fresh: bool) -> Extra:
            if not changes:
                return Extra(writes=also)
            seen = None if fresh else self.recent(key)
            seen = seen or await self.read(key)
            new = changed(seen.value, changes, self.clock_unix())
            name = timers_key(key)
            return Extra([Expect(name, seen.revision)], [Put(name, new.encode()), *also])

        return extra

    async def claim(
        self, seen: Stored[InstanceTimers], before: Timer, after: Timer | None
    ) -> Stored[InstanceTimers] | None:
        """Writes `after` in place of `before`, or ends it; None if something was written since `seen`."""
        new = _with(seen.value, before, after)
        name = timers_key(new.key)
        result = await self.store.txn([Expect(name, seen.revision)], [Put(name, new.encode())], self.timeout)
        return Stored(new, result.revision) if result.succeeded else None

    async def change(self, key: InstanceKey, turn_id: str, change: Callable[[Timer], Timer | None]) -> None:
        """Changes the timer that starts this turn, if it is still there; None ends it."""
        for _ in range(_ATTEMPTS):
            seen = await self.read(key)
            before = next((t for t in seen.value.timers if t.turn_id == turn_id), None)
            if before is None or await self.claim(seen, before, change(before)):
                return
        raise RoostError(
            Reason.STORE_UNAVAILABLE, f"the timers of {key} changed {_ATTEMPTS} times meanwhile", "try again"
        )


def _with(timers: InstanceTimers, before: Timer, after: Timer | None) -> InstanceTimers:
    kept = (after if t == before else t for t in timers.timers)
    return replace(timers, timers=tuple(t for t in kept if t is not None))

"""Journals: what turns that are not committed yet did outside of their state.

Always true:
- A call is in the store before it begins, and its end before the turn goes on; both are written in a
  transaction that compares owner and epoch, so who lost the instance can write neither.
- A journal ends in the transaction that commits its turn, and not before. Only of turns that were given up
  (MAX_UNFINISHED newer ones have a journal), and in which nothing is open, is it forgotten.
- What a person said of a call is written only if the call is still as that person saw it.

How it can fail: STORE_UNAVAILABLE, which leaves open whether it was applied. Writing it again is safe: what
is there already counts as written.

Each call has a record of its own, `journals/<instance>/<hash of the turn's id>/<number>`, so that to write
one costs the same however many there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.ownership import Ownership
from coordinator.records import unreadable
from coordinator.store.base import Delete, Expect, Put, Record, Store
from coordinator.transitions import keep, park, unpark
from shared.effects import MAX_CALLS, MAX_UNFINISHED, Call, CallState, Repeat, checked
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

JOURNALS = "journals/"


@dataclass(frozen=True, slots=True)
class TurnJournal:
    """Of one turn that is not committed. `calls` by number."""

    turn_id: str
    calls: tuple[Call, ...]

    @property
    def open(self) -> bool:
        """Is there a call that must not be forgotten?"""
        return any(is_open(call) for call in self.calls)

    @property
    def revision(self) -> int:
        return max(call.revision for call in self.calls)


def is_open(call: Call) -> bool:
    """It may or may not have been made, and nobody has said."""
    begun = call.state is CallState.BEGUN and call.repeat is Repeat.NEVER
    return begun or call.state is CallState.UNCERTAIN


def named(call: Call, turn_id: str) -> str:
    """For people."""
    return f"{call.name} (turn {turn_id})"


class Journals:
    def __init__(self, store: Store, ownership: Ownership, timeout: float) -> None:
        """`timeout` in seconds, for each of the store's answers."""
        self._store = store
        self._ownership = ownership
        self._timeout = timeout

    async def read(self, node: str, key: InstanceKey, epoch: int, turn_id: str) -> tuple[Call, ...]:
        """Of one turn. EPOCH_STALE if `node` does not own the instance."""
        stored = await self._ownership.read(key)
        keep(stored.value if stored else None, node, epoch)
        return await self._read(key, turn_id)

    async def _read(self, key: InstanceKey, turn_id: str) -> tuple[Call, ...]:
        listing = await self._store.list(_prefix(key, turn_id), self._timeout)
        return tuple(_decode(record)[1] for record in listing.records)

    async def unfinished(self, key: InstanceKey) -> list[TurnJournal]:
        """Those of all turns, the newest first."""
        listing = await self._store.list(_prefix(key), self._timeout)
        calls: dict[str, list[Call]] = {}
        for record in listing.records:
            turn_id, call = _decode(record)
            calls.setdefault(turn_id, []).append(call)
        found = [TurnJournal(turn_id, tuple(made)) for turn_id, made in calls.items()]
        return sorted(found, key=lambda journal: -journal.revision)

    async def write(
        self, node: str, key: InstanceKey, epoch: int, turn_id: str, calls: Sequence[Call]
    ) -> list[Call]:
        """Each as it is in the store now, where it had the revision that it says. EPOCH_STALE; and
        TURN_NOT_COMMITTED if another write came between, which running the turn again sees."""
        calls = [replace(call, epoch=epoch) for call in calls]
        guards = [Expect(_name(key, turn_id, call.number), call.revision) for call in calls]
        puts = [Put(_name(key, turn_id, call.number), _encode(turn_id, call)) for call in calls]
        lost = next((call for call in calls if call.state is CallState.UNCERTAIN), None)
        what = named(lost, turn_id) if lost else ""
        revision = await self._ownership.beside(
            key,
            lambda c: park(c, node, epoch, what) if what else keep(c, node, epoch),
            guards,
            puts,
        )
        if revision is not None:
            return [replace(call, revision=revision) for call in calls]
        return await self._read_back(key, turn_id, calls)

    async def _read_back(self, key: InstanceKey, turn_id: str, calls: Sequence[Call]) -> list[Call]:
        """An answer may have been lost: what is as it was to be counts as written."""
        there = {call.number: call for call in await self._read(key, turn_id)}
        found = [there.get(call.number) for call in calls]
        written = [f for f, call in zip(found, calls, strict=True) if f is not None and f.same_as(call)]
        if len(written) < len(calls):
            raise RoostError(
                Reason.TURN_NOT_COMMITTED,
                f"the journal of turn {turn_id} was changed while the turn ran",
                "send the turn again under the same id",
            )
        return written

    async def forget_old(self, node: str, key: InstanceKey, epoch: int) -> list[str]:
        """The ids of turns that have a journal. Beyond MAX_UNFINISHED, those without an open call go."""
        journals = await self.unfinished(key)
        old = [journal for journal in journals[MAX_UNFINISHED:] if not journal.open]
        for journal in old:
            gone = ending(key, journal.turn_id, MAX_CALLS)
            await self._ownership.beside(key, lambda c: keep(c, node, epoch), [], gone)
        return [journal.turn_id for journal in journals if journal not in old]

    async def settle(self, key: InstanceKey, turn_id: str, seen: Call, done: bool, result: str) -> None:
        """A person says whether a call was made. BAD_REQUEST if it is not as that person saw it."""
        if seen.state is not CallState.UNCERTAIN:
            raise _not_uncertain(seen, turn_id)
        state = CallState.DONE if done else CallState.NOT_MADE
        settled = _checked(replace(seen, state=state, result=result if done else ""))
        name = _name(key, turn_id, seen.number)
        others = [
            named(call, journal.turn_id)
            for journal in await self.unfinished(key)
            for call in journal.calls
            if call.state is CallState.UNCERTAIN and (journal.turn_id, call.number) != (turn_id, seen.number)
        ]
        revision = await self._ownership.beside(
            key,
            lambda c: unpark(c, key, others[0] if others else ""),
            [Expect(name, seen.revision)],
            [Put(name, _encode(turn_id, settled))],
        )
        if revision is None:
            found = await self._store.get(name, self._timeout)
            if found is None or not _decode(found)[1].same_as(settled):
                raise _not_uncertain(seen, turn_id)


def ending(key: InstanceKey, turn_id: str, calls: int) -> list[Delete]:
    """What goes with the turn's commit: the first `calls` of its journal."""
    return [Delete(_name(key, turn_id, number)) for number in range(calls)]


def _prefix(key: InstanceKey, turn_id: str = "") -> str:
    whole = f"{JOURNALS}{key}/"
    return f"{whole}{hashlib.sha256(turn_id.encode()).hexdigest()[:32]}/" if turn_id else whole


def _name(key: InstanceKey, turn_id: str, number: int) -> str:
    return f"{_prefix(key, turn_id)}{number:03}"


def _encode(turn_id: str, call: Call) -> bytes:
    values = {
        "turn": turn_id,
        "name": call.name,
        "arguments": call.arguments,
        "repeat": call.repeat.value,
        "state": call.state.value,
        "result": call.result,
        "epoch": call.epoch,
    }
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(record: Record) -> tuple[str, Call]:
    try:
        v = json.loads(record.value)
        call = Call(
            int(record.key.rpartition("/")[2]),
            v["name"],
            v["arguments"],
            Repeat(v["repeat"]),
            CallState(v["state"]),
            v["result"],
            v["epoch"],
            record.revision,
        )
        return v["turn"], call
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(record, error) from error


def _checked(call: Call) -> Call:
    try:
        return checked(call)
    except ValueError as error:
        raise RoostError(
            Reason.BAD_REQUEST, f"this can't be the call's result: {error}", "write JSON"
        ) from error


def _not_uncertain(call: Call, turn_id: str) -> RoostError:
    return RoostError(
        Reason.BAD_REQUEST,
        f"{named(call, turn_id)} is not uncertain, or not any more",
        "`roost effects` shows what is so now",
    )

"""Rounds of collecting: why nothing that a live manifest needs is ever deleted.

A blob is *needed* when a committed version of an instance (the present one, or one of those before it that
are kept) or a deployed agent names it. The danger is the blob that nobody needs yet: one that an upload has
just put, or was just told is there, and whose commit comes later. It can't be told from garbage by looking.

So collecting goes in numbered rounds. A blob is first *condemned* (moved out of the way, where it can still
be read), and *purged* two rounds later:

  1. Round n begins when the key `gc/round` becomes n. Only then does its collector read what is needed.
  2. It condemns what is not needed: from `chunks/` to `trash/n-*/`. What is in the trash can be read, but
     does not count as there: who asks is told that it is missing, and puts it again, into `chunks/`.
  3. It purges what was condemned in round n-2 or before and is still not needed, or is in `chunks/` again;
     what is needed and is not there is brought back.
  4. Every commit says which round it knew *before* it put or asked for the first of its blobs. It is
     refused (UPLOAD_STALE: put again what is not there, then commit again) unless that is n or n-1; the
     same transaction compares `gc/round`, so a round can't begin unseen.

Why that holds. Say that a commit relies on blob X, and began in round g. It put X, or was told that X is
there, so X was in `chunks/` at a time after round g began. If X was condemned after that, it lies in the
trash of a round q >= g: collectors of earlier rounds can't move anything any more (their trash is closed
before g begins). Only a round u >= q+2 >= g+2 may purge it. But the commit was accepted before round g+2
began, by 4, so the collector of u, which reads what is needed after that, finds X needed. And a blob that a
commit relies on only because the version before it has it was needed all the time.

No clock and no lock is in this argument. The age below which blobs are left alone (`grace`) only spares
uploads under way the detour through the trash; the lease on `gc/collector` only spares two collectors the
trouble of doing the same. Directories close the trash of earlier rounds by renaming it. An object store
can't: there, a collector that stands still in the middle of one request for longer than its lease and the
pause after it (`Settings.late`), while its successor begins, could move a blob late. The next round finds
it, and brings it back if it is needed; it would be lost only if it was moved and purged before its commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from coordinator.records import Stored, decode
from coordinator.store.base import Expect, Put, Record, Store
from shared.errors import Reason, RoostError

ROUND, COLLECTOR, LAST = "gc/round", "gc/collector", "gc/last"
ROUNDS_IN_TRASH = 2


@dataclass(frozen=True, slots=True)
class Round:
    """The round that has begun, and who collects in it."""

    number: int
    collector: str

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, record: Record) -> Stored[Round]:
        return decode(record, lambda _, v: cls(int(v["number"]), v["collector"]))


class Fence(Protocol):
    async def guard(self, begun: int, fresh: bool) -> Sequence[Expect]:
        """What a transaction must compare that relies on blobs which were put or asked for since round
        `begun`. UPLOAD_STALE if that was too long ago. `fresh`: look at the store, not at what was seen."""
        ...


class NoFence:
    """For tests: a commit may rely on anything."""

    async def guard(self, begun: int, fresh: bool) -> Sequence[Expect]:
        return ()


class Seen(Protocol):
    """What was last seen of the round. May be behind."""

    def round(self) -> Stored[Round] | None: ...

    def learn_round(self, stored: Stored[Round]) -> None: ...


class Rounds:
    """The present round: what commits are compared with, and how the next one begins."""

    def __init__(self, store: Store, seen: Seen, timeout: float) -> None:
        self._store = store
        self._seen = seen
        self._timeout = timeout

    async def guard(self, begun: int, fresh: bool) -> Sequence[Expect]:
        known = await self.read() if fresh else self._seen.round()
        number, revision = (known.value.number, known.revision) if known else (0, 0)
        # One from the future is of a time before etcd was restored from a backup.
        if not number - (ROUNDS_IN_TRASH - 1) <= begun <= number:
            raise RoostError(
                Reason.UPLOAD_STALE,
                f"this was prepared in round {begun} of collecting, and round {number} has begun",
                "what was put then may be gone: put what is missing, and commit again",
            )
        return (Expect(ROUND, revision),)

    async def read(self) -> Stored[Round] | None:
        """What the store says now."""
        found = await self._store.get(ROUND, self._timeout)
        if found is None:
            return None
        stored = Round.decode(found)
        self._seen.learn_round(stored)
        return stored

    async def begin(self, present: Stored[Round] | None, collector: str, guards: Sequence[Expect]) -> int:
        """The next round's number. COLLECTING if another one began it."""
        new = Round(present.value.number + 1 if present else 1, collector)
        expected = Expect(ROUND, present.revision if present else 0)
        result = await self._store.txn([expected, *guards], [Put(ROUND, new.encode())], self._timeout)
        if not result.succeeded:
            raise RoostError(
                Reason.COLLECTING, "another coordinator has begun to collect", "it does what is to be done"
            )
        self._seen.learn_round(Stored(new, result.revision))
        return new.number

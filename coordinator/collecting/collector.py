"""The collector: takes out of the blob store what nobody needs. `rounds.py` says why that is safe.

A pass may end anywhere, with its process or without: the next one begins anew, and finds in the store itself
all that there is to know. What is needed but lies in the trash is brought back; what is needed and is nowhere
is counted and told, for that must never be.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from coordinator.collecting.lease import TTL, Lease, held
from coordinator.collecting.marking import Needed
from coordinator.collecting.report import Report
from coordinator.collecting.rounds import LAST, ROUNDS_IN_TRASH, Rounds
from coordinator.store.base import Put, Store
from coordinator.trash import SHARDS, Condemned, Found
from shared.content import Blob
from shared.errors import Reason, RoostError

log = logging.getLogger(__name__)

T = TypeVar("T")

_BATCH = 100  # blobs that are moved or deleted at once
_TOLD = 5  # names in a report


class Heap(Protocol):
    """The blob store, as a collector needs it. Real: `coordinator.blobs.BlobStore`; fake:
    `tests.support.fake_heap`."""

    @property
    def closes_trash(self) -> bool: ...

    async def chunks(self, shard: str) -> list[Found]: ...

    async def condemned(self) -> list[Condemned]: ...

    async def open_trash(self, round: int) -> str: ...

    async def close_trash(self) -> None: ...

    async def condemn(self, hashes: Sequence[str], name: str) -> int: ...

    async def purge(self, entries: Sequence[Condemned]) -> None: ...

    async def has(self, hash: str) -> bool: ...

    async def get_all(self, hashes: Sequence[str]) -> list[bytes]: ...

    async def put_all(self, blobs: Sequence[Blob]) -> None: ...


class Marks(Protocol):
    async def mark(self) -> Needed: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """`every`: seconds from one round to the next. `grace`: seconds that a new blob is left alone.
    `rate`: blobs moved or deleted a second. `late`: seconds to wait, on a store that can't close a round's
    trash, after a collector that did not end its round: its last request is over by then. `rounds`: that a
    blob spends in the trash; fewer are for tests that show what they are for."""

    every: float = 6 * 3600.0
    grace: float = 3600.0
    rate: float = 1000.0
    late: float = TTL + 20.0
    rounds: int = ROUNDS_IN_TRASH


@dataclass(frozen=True, slots=True)
class Clock:
    """`steady` and `unix` in seconds; the latter is for people, and for how often and how soon."""

    steady: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Collector:
    def __init__(
        self,
        me: str,
        store: Store,
        heap: Heap,
        marks: Marks,
        rounds: Rounds,
        settings: Settings,
        clock: Clock | None = None,
    ) -> None:
        self._me = me
        self._store = store
        self._heap = heap
        self._marks = marks
        self._rounds = rounds
        self._settings = settings
        self._clock = clock or Clock()

    async def reconcile(self) -> None:
        """One round, if it is time for one. What another coordinator does need not be done here."""
        last = await self.last()
        if last is not None and self._clock.unix() - last.began_unix < self._settings.every:
            return
        try:
            await self.collect()
        except RoostError as error:
            if error.reason is not Reason.COLLECTING:
                raise

    async def last(self) -> Report | None:
        found = await self._store.get(LAST)
        return Report.decode(found).value if found else None

    async def look(self) -> Report:
        """What a round would find, without one."""
        present = await self._rounds.read()
        following = present.value.number + 1 if present else 1
        began = Report(following, self._me, self._clock.unix())
        return replace(await _Pass(self, began, None, "").run(), round=0)

    async def collect(self) -> Report:
        """One round. COLLECTING if another coordinator is at it; other errors are in the last report, too."""
        began = Report(collector=self._me, began_unix=self._clock.unix())
        async with held(self._store, self._me, self._clock.steady) as lease:
            try:
                began, name = await self._begin(began, lease)
                done = await _Pass(self, began, lease, name).run()
            except RoostError as error:
                failed = replace(began, error=error.message, seconds=self._clock.unix() - began.began_unix)
                with suppress(RoostError):
                    await self._store.txn([lease.guard], [Put(LAST, failed.encode())])
                raise
            await self._store.txn([lease.guard], [Put(LAST, done.encode())])
        log.info("collected: %s", done)
        return done

    async def _begin(self, began: Report, lease: Lease) -> tuple[Report, str]:
        """Nobody can condemn by an earlier round's name any more when the next round begins."""
        present = await self._rounds.read()
        last = await self.last()
        unfinished = present is not None and (
            last is None or bool(last.error) or last.round != present.value.number
        )
        if unfinished and not self._heap.closes_trash:
            await self._clock.sleep(self._settings.late)
        await self._heap.close_trash()
        name = await self._heap.open_trash(present.value.number + 1 if present else 1)
        lease.check()
        return replace(began, round=await self._rounds.begin(present, self._me, [lease.guard])), name


class _Pass:
    """One pass. Without a lease it changes nothing."""

    def __init__(self, of: Collector, began: Report, lease: Lease | None, name: str) -> None:
        self._of = of
        self._heap = of._heap
        self._settings = of._settings
        self._lease = lease
        self._name = name
        self._report = began
        self._count: dict[str, int] = {}

    async def run(self) -> Report:
        needed = await self._of._marks.mark()
        trash = await asyncio.to_thread(_by_hash, await self._heap.condemned())
        missing: list[str] = []
        spare: list[Condemned] = []  # of what is needed, and also where it belongs
        for number, shard in enumerate(SHARDS):
            there = await self._heap.chunks(shard)
            self._add(blobs=len(there), total_bytes=sum(found.size for found in there))
            absent = set(needed.shard(number)) - {found.hash for found in there} - needed.inline
            missing += [hash for hash in sorted(absent) if not await self._rescue(hash, trash.get(hash, []))]
            spare += [e for found in there if found.hash in needed for e in trash.get(found.hash, [])]
            await self._condemn([found for found in there if found.hash not in needed])
        await self._purge(await asyncio.to_thread(_not_needed, trash, needed))
        await self._purge(spare)
        seconds = self._of._clock.unix() - self._report.began_unix
        some = tuple(missing[:_TOLD])
        return replace(
            self._report,
            **self._count,  # type: ignore[arg-type]
            seconds=seconds,
            needed=len(needed),
            missing=len(missing),
            missing_some=some,
        )

    async def _rescue(self, hash: str, entries: Sequence[Condemned]) -> bool:
        """Brings back what is needed after all. False: it is nowhere."""
        if not entries or self._lease is None:
            return bool(entries) or await self._heap.has(hash)  # it may have been put meanwhile
        try:
            (blob,) = await self._heap.get_all([hash])
            await self._heap.put_all([await asyncio.to_thread(Blob.verified, hash, blob)])
        except RoostError as error:
            if error.reason not in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                raise
            return False
        self._add(rescued=1)
        return True

    async def _condemn(self, found: Iterable[Found]) -> None:
        before = self._report.began_unix - self._settings.grace
        for some in _batches([f for f in found if f.modified <= before]):
            if self._lease is not None:
                await self._may(len(some))
                await self._heap.condemn([f.hash for f in some], self._name)
            self._add(condemned=len(some), condemned_bytes=sum(f.size for f in some))

    async def _purge(self, entries: Iterable[Condemned]) -> None:
        """What was condemned so long ago that no commit may rely on having seen it."""
        newest = self._report.round - self._settings.rounds
        for some in _batches([entry for entry in entries if entry.round <= newest]):
            if self._lease is not None:
                await self._may(len(some))
                await self._heap.purge(some)
            self._add(purged=len(some), purged_bytes=sum(entry.size for entry in some))

    async def _may(self, count: int) -> None:
        await self._of._clock.sleep(count / self._settings.rate)
        if self._lease is not None:
            self._lease.check()

    def _add(self, **counts: int) -> None:
        for name, count in counts.items():
            self._count[name] = self._count.get(name, 0) + count


def _by_hash(condemned: Iterable[Condemned]) -> dict[str, list[Condemned]]:
    found: dict[str, list[Condemned]] = {}
    for entry in condemned:
        found.setdefault(entry.hash, []).append(entry)
    return found


def _not_needed(trash: Mapping[str, list[Condemned]], needed: Needed) -> list[Condemned]:
    return [entry for hash, entries in trash.items() if hash not in needed for entry in entries]


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]

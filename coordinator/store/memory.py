"""The store in this process's memory: for unit tests, with a clock that only moves when told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from coordinator.store.base import Change, Compacted, Delete, Expect, Listing, Put, Record, TxnResult
from shared.errors import Reason, RoostError


@dataclass(slots=True)
class _Lease:
    ttl: float
    expires: float
    keys: set[str] = field(default_factory=set)


class MemoryStore:
    """Keeps every record, every change since the last `compact`, and leases on a virtual clock.

    Nothing here awaits between reading and writing, so each method is atomic by construction.
    """

    def __init__(self) -> None:
        self.revision = 1  # as an empty etcd has
        self._records: dict[str, Record] = {}
        self._owner: dict[str, int] = {}  # key -> lease
        self._leases: dict[int, _Lease] = {}
        self._next_lease = 1
        self._history: list[Change] = []
        self._compacted = 0
        self._now = 0.0
        self._changed = asyncio.Event()

    # --- what only tests do ------------------------------------------------------------------

    def advance(self, seconds: float) -> None:
        """Moves the clock on; leases that run out take their keys with them."""
        self._now += seconds
        for lease in [i for i, held in self._leases.items() if held.expires <= self._now]:
            self._expire(lease)

    def compact(self, revision: int) -> None:
        """Forgets the changes before `revision`."""
        self._compacted = revision
        self._history = [c for c in self._history if c.revision >= revision]
        self._wake()

    # --- Store -------------------------------------------------------------------------------

    async def get(self, key: str, timeout: float = 5.0) -> Record | None:
        return self._records.get(key)

    async def list(self, prefix: str, timeout: float = 5.0) -> Listing:
        found = (r for k, r in self._records.items() if k.startswith(prefix))
        return Listing(tuple(sorted(found, key=lambda r: r.key)), self.revision)

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult:
        for guard in guards:
            record = self._records.get(guard.key)
            if (record.revision if record else 0) != guard.revision:
                return TxnResult(False, self.revision)
        for write in writes:
            if isinstance(write, Put) and write.lease and write.lease not in self._leases:
                raise RoostError(Reason.STORE_UNAVAILABLE, f"lease {write.lease} has expired")
        if any(isinstance(w, Put) or w.key in self._records for w in writes):
            self.revision += 1
        for write in writes:
            self._write(write)
        self._wake()
        return TxnResult(True, self.revision)

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Sequence[Change]]:
        following = from_revision
        while True:
            if following < self._compacted:
                raise Compacted(f"changes before revision {self._compacted} are gone")
            changed = self._changed
            batch = [c for c in self._history if c.revision >= following and c.key.startswith(prefix)]
            following = max(following, self.revision + 1)
            if batch:
                yield batch
            else:
                await changed.wait()

    async def grant_lease(self, ttl: float, timeout: float = 5.0) -> int:
        lease = self._next_lease
        self._next_lease += 1
        self._leases[lease] = _Lease(ttl, self._now + ttl)
        return lease

    async def keep_alive(self, lease: int, timeout: float = 5.0) -> bool:
        held = self._leases.get(lease)
        if held is None:
            return False
        held.expires = self._now + held.ttl
        return True

    async def revoke_lease(self, lease: int, timeout: float = 5.0) -> None:
        if lease in self._leases:
            self._expire(lease)

    # -----------------------------------------------------------------------------------------

    def _expire(self, lease: int) -> None:
        keys = sorted(self._leases.pop(lease).keys)
        if keys:
            self.revision += 1
        for key in keys:
            self._write(Delete(key))
        self._wake()

    def _write(self, write: Put | Delete) -> None:
        if lease := self._owner.pop(write.key, 0):
            held = self._leases.get(lease)
            if held is not None:
                held.keys.discard(write.key)
        if isinstance(write, Delete):
            if self._records.pop(write.key, None) is not None:
                self._history.append(Change(write.key, None, self.revision))
            return
        record = Record(write.key, write.value, self.revision)
        self._records[write.key] = record
        self._history.append(Change(write.key, record, self.revision))
        if write.lease:
            self._owner[write.key] = write.lease
            self._leases[write.lease].keys.add(write.key)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

"""The blob store in memory, as whoever collects and whoever uploads see it, with gates in which a test can
hold up a collector before each of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from coordinator.store.base import Delete, Expect, Listing, Put, Record, TxnResult
from coordinator.store.memory import MemoryStore
from coordinator.trash import Condemned, Found
from shared.content import Blob
from shared.errors import Reason, RoostError


class MemoryHeap:
    """`chunks` and `trash` are for tests to look at: compressed bytes by hash, and by name and hash."""

    closes_trash = True

    def __init__(self) -> None:
        self.chunks_kept: dict[str, bytes] = {}
        self.trash: dict[str, dict[str, bytes]] = {}
        self._open: set[str] = set()
        self._names = 0

    def where(self, hash: str) -> str:
        """`chunks`, the name of a trash, or an empty string: nowhere."""
        if hash in self.chunks_kept:
            return "chunks"
        return next((name for name, blobs in self.trash.items() if hash in blobs), "")

    async def chunks(self, shard: str) -> list[Found]:
        return [Found(h, len(z), 0.0) for h, z in sorted(self.chunks_kept.items()) if h.startswith(shard)]

    async def condemned(self) -> list[Condemned]:
        return [
            Condemned(hash, int(name.partition("-")[0]), len(zstd), f"{name}/{hash}")
            for name, blobs in self.trash.items()
            for hash, zstd in blobs.items()
        ]

    async def open_trash(self, round: int) -> str:
        self._names += 1
        name = f"{round}-{self._names}"
        self.trash[name] = {}
        self._open.add(name)
        return name

    async def close_trash(self) -> None:
        self._open.clear()

    async def condemn(self, hashes: Sequence[str], name: str) -> int:
        for hash in hashes:
            if name in self._open and hash in self.chunks_kept:
                self.trash[name][hash] = self.chunks_kept.pop(hash)
        return len(hashes)

    async def purge(self, entries: Sequence[Condemned]) -> None:
        for entry in entries:
            name, _, hash = entry.place.partition("/")
            self.trash[name].pop(hash, None)

    async def has(self, hash: str) -> bool:
        return hash in self.chunks_kept

    async def get_all(self, hashes: Sequence[str]) -> list[bytes]:
        return [self._get(hash) for hash in hashes]

    def _get(self, hash: str) -> bytes:
        where = self.where(hash)
        if not where:
            raise RoostError(Reason.BLOB_MISSING, f"no blob {hash[:12]}")
        return self.chunks_kept[hash] if where == "chunks" else self.trash[where][hash]

    async def put_all(self, blobs: Sequence[Blob]) -> None:
        self.chunks_kept |= {blob.hash: blob.zstd for blob in blobs}


class Gate:
    """Whoever passes waits until the test lets them, one step at a time; `waiting`: somebody does."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()
        self._may = asyncio.Semaphore(0)
        self._count = 0  # of those who wait

    async def passed(self) -> None:
        self._count += 1
        self.waiting.set()
        try:
            await self._may.acquire()
        finally:
            self._count -= 1

    def let_one_pass(self) -> None:
        if self._count <= 1:
            self.waiting.clear()
        self._may.release()


class GatedHeap:
    """A heap behind a gate."""

    closes_trash = True

    def __init__(self, heap: MemoryHeap, gate: Gate) -> None:
        self._heap = heap
        self._gate = gate

    async def chunks(self, shard: str) -> list[Found]:
        if not await self._heap.chunks(shard):  # nothing can come of it: spare the test the step
            return []
        await self._gate.passed()
        return await self._heap.chunks(shard)

    async def condemned(self) -> list[Condemned]:
        await self._gate.passed()
        return await self._heap.condemned()

    async def open_trash(self, round: int) -> str:
        await self._gate.passed()
        return await self._heap.open_trash(round)

    async def close_trash(self) -> None:
        await self._gate.passed()
        await self._heap.close_trash()

    async def condemn(self, hashes: Sequence[str], name: str) -> int:
        if not hashes:
            return 0
        for hash in hashes:  # one at a time: it may be killed between two
            await self._gate.passed()
            await self._heap.condemn([hash], name)
        return len(hashes)

    async def purge(self, entries: Sequence[Condemned]) -> None:
        for entry in entries:
            await self._gate.passed()
            await self._heap.purge([entry])

    async def has(self, hash: str) -> bool:
        return await self._heap.has(hash)

    async def get_all(self, hashes: Sequence[str]) -> list[bytes]:
        return await self._heap.get_all(hashes)

    async def put_all(self, blobs: Sequence[Blob]) -> None:
        await self._gate.passed()
        await self._heap.put_all(blobs)


class GatedStore:
    """A store behind a gate, but for its leases."""

    def __init__(self, store: MemoryStore, gate: Gate) -> None:
        self._store = store
        self._gate = gate
        self.grant_lease = store.grant_lease
        self.keep_alive = store.keep_alive
        self.revoke_lease = store.revoke_lease
        self.watch = store.watch

    async def get(self, key: str, timeout: float = 5.0) -> Record | None:
        return await self._store.get(key)

    async def list(self, prefix: str, timeout: float = 5.0) -> Listing:
        await self._gate.passed()
        return await self._store.list(prefix)

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult:
        await self._gate.passed()
        return await self._store.txn(guards, writes)

"""The seam to the mesh's memory: a small part of what etcd offers, and no more.

Real: `coordinator.store.etcd` (the one file that knows etcd). Fake: `coordinator.store.memory`, for unit
tests. Both pass tests/contract/test_store.py.

What must hold: `txn` is atomic and linearizable; a revision names one state of the whole store and only
grows; a watch from R+1 after a list at R misses nothing, or says Compacted. How it can fail: a call may be
applied although it raised STORE_UNAVAILABLE (the answer was lost), so callers read back and compare what is
theirs. No call waits longer than its timeout.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Record:
    key: str
    value: bytes
    revision: int  # of the store when this value was written (etcd's mod revision)


@dataclass(frozen=True, slots=True)
class Expect:
    """A guard of a transaction: `key` was last written at `revision`; 0 means that it does not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0  # the key vanishes with this lease; 0: it stays


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class TxnResult:
    succeeded: bool  # all guards held and all writes were made; otherwise none was
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    records: tuple[Record, ...]
    revision: int  # of the store when it was listed


@dataclass(frozen=True, slots=True)
class Change:
    """A key's new record, or None: it was deleted. Never act on a deletion alone: list to be sure."""

    key: str
    record: Record | None
    revision: int


class Compacted(Exception):
    """The changes asked for are no longer kept: list again."""


class Store(Protocol):
    """RoostError STORE_UNAVAILABLE when the store can't answer within `timeout` seconds."""

    async def get(self, key: str, timeout: float = 5.0) -> Record | None: ...

    async def list(self, prefix: str, timeout: float = 5.0) -> Listing: ...

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult: ...

    def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Sequence[Change]]:
        """All changes from `from_revision` on, in order, a batch a revision or more. Raises Compacted."""
        ...

    async def grant_lease(self, ttl: float, timeout: float = 5.0) -> int: ...

    async def keep_alive(self, lease: int, timeout: float = 5.0) -> bool:
        """Renews a lease. False: it has expired, and its keys are gone."""
        ...

    async def revoke_lease(self, lease: int, timeout: float = 5.0) -> None: ...

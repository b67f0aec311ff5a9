"""Small commits as one transaction: what a commit's root needs lies in the store, beside the instance's
record, until it has been brought to the blob store from here.

    inline/<tenant>/<agent>/<user>/<version>    the blobs that this version's commit brought along

Always true: whatever a published root needs is in the blob store or in one of its instance's inline records.
It holds since such a record is written in the transaction that publishes the root (`writes`), is never
changed, and is deleted only after the blob store has answered for every blob in it (`reconcile`). Who does
that, how often, and what became of the node are of no matter: blobs are named by their content, so bringing
them twice is harmless, and a node has no part in it. The blobs are put whether they seem to be there or not:
something that collects garbage may just be deciding about an older copy.

The coordinator that took a commit brings its blobs on. What another one took is taken over when it has been
seen in two listings.

How it can fail: the blob store does not answer. Then records wait, here and in the store, up to a limit for
each instance and for all; beyond it commits must go to the blob store first, as large ones do, and say so
if that can't be (BLOBS_UNAVAILABLE). Whoever reads an instance must read its record first and these then: in
the other order a record could go to the blob store unseen by both.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.message import DecodeError

from coordinator.records import unreadable
from coordinator.store.base import Delete, Expect, Put, Record, Store
from protos.v1 import blobs_pb2
from shared import inline
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey

log = logging.getLogger(__name__)

INLINE = "inline/"
PERIOD = 1.0  # seconds between passes: a turn's blobs do not compete with its user's next one
MOST_OF_ONE = 2 << 20  # plain bytes that may wait of one instance, and a commit more: a Fetch carries them
MOST = 32 << 20  # plain bytes that may wait here in all
_LIST_EVERY = 10.0  # seconds
_MOST_SENT = 4 << 20  # bytes in the answer to a Fetch; more can only have come through several coordinators
_AT_ONCE = 32  # records that one transaction deletes


class Durable(Protocol):
    """Real: `coordinator.blobs.BlobStore`."""

    async def put_all(self, blobs: Sequence[Blob]) -> None:
        """When it returns, the blobs are durable. BLOBS_UNAVAILABLE."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    name: str
    instance: str
    revision: int
    blobs: tuple[Blob, ...]

    @property
    def bytes(self) -> int:
        return sum(len(blob.plain) for blob in self.blobs)


class InlineCommits:
    """`reconcile` is to be run every PERIOD seconds."""

    def __init__(self, store: Store, blobs: Durable, clock: Callable[[], float], timeout: float) -> None:
        """`timeout` in seconds, for each of the store's answers."""
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._timeout = timeout
        self._waiting: dict[str, _Waiting] = {}
        self._bytes: Counter[str] = Counter()  # that wait, by instance
        self._seen: dict[str, int] = {}  # names and revisions of the last listing
        self._list_at = clock()

    # --- for commits and fetches ---------------------------------------------------------------

    def writes(self, key: InstanceKey, version: int, blobs: Sequence[Blob]) -> list[Put]:
        """What a commit's transaction has to write for the blobs that it brings along. BLOBS_UNAVAILABLE if
        too much waits already: then they must be in the blob store before the commit."""
        if not blobs:
            return []
        if self._bytes[str(key)] >= MOST_OF_ONE or self._bytes.total() >= MOST:
            raise RoostError(
                Reason.BLOBS_UNAVAILABLE,
                f"what earlier commits of {key} or of others brought along still waits for the blob store",
                "put the blobs there, then commit without them; check the store that --blobs names",
            )
        value = blobs_pb2.InlineBlobs(blobs=inline.to_protos(blobs))
        return [Put(_name(key, version), value.SerializeToString())]

    def committed(self, key: InstanceKey, version: int, blobs: Sequence[Blob], revision: int) -> None:
        """The transaction with these `writes` was made, at `revision`. If that is wrong, or this is never
        called, the next listings find what there is."""
        if blobs:
            self._wait(_Waiting(_name(key, version), str(key), revision, tuple(blobs)))

    async def of(self, key: InstanceKey) -> list[blobs_pb2.Blob]:
        """All that may not be in the blob store yet. To be asked after the instance's record was read.
        BLOBS_UNAVAILABLE if it is more than can be sent, and can't be brought to the blob store first."""
        found = (await self._store.list(f"{INLINE}{key}/", self._timeout)).records
        if sum(len(record.value) for record in found) > _MOST_SENT:
            await self._flush([waiting for record in found if (waiting := _decoded(record))])
            return []
        return [proto for record in found for proto in _protos(record)]

    async def settle(self, key: InstanceKey) -> None:
        """Brings all of the instance to the blob store now, for who reads only there. To be asked after the
        instance's record was read. BLOBS_UNAVAILABLE."""
        found = (await self._store.list(f"{INLINE}{key}/", self._timeout)).records
        await self._flush([waiting for record in found if (waiting := _decoded(record))])

    # --- background ------------------------------------------------------------------------------

    async def reconcile(self) -> None:
        """One pass: brings what waits to the blob store. BLOBS_UNAVAILABLE, STORE_UNAVAILABLE."""
        if self._clock() >= self._list_at:
            await self._take_over()
            self._list_at = self._clock() + _LIST_EVERY
        todo = list(self._waiting.values())
        for start in range(0, len(todo), _AT_ONCE):
            await self._flush(todo[start : start + _AT_ONCE])

    async def _take_over(self) -> None:
        """Notes what lies in the store and was there at the last listing: nobody seems to bring it on."""
        found = (await self._store.list(INLINE, self._timeout)).records
        for record in found:
            if self._bytes.total() >= MOST:
                break
            was_there = self._seen.get(record.key) == record.revision
            if was_there and record.key not in self._waiting and (waiting := _decoded(record)):
                self._wait(waiting)
        self._seen = {record.key: record.revision for record in found}

    async def _flush(self, some: Sequence[_Waiting]) -> None:
        """Brings them to the blob store, and then deletes them here."""
        await self._blobs.put_all([blob for one in some for blob in one.blobs])
        await self._delete(some)

    async def _delete(self, there: Sequence[_Waiting]) -> None:
        for start in range(0, len(there), _AT_ONCE):
            some = there[start : start + _AT_ONCE]
            if not await self._delete_all(some):
                for one in some:  # one that is gone, or is not what it was, is no longer ours
                    await self._delete_all([one])
            for one in some:
                self._forget(one)

    async def _delete_all(self, some: Sequence[_Waiting]) -> bool:
        guards = [Expect(one.name, one.revision) for one in some]
        result = await self._store.txn(guards, [Delete(one.name) for one in some], self._timeout)
        return result.succeeded

    def _wait(self, one: _Waiting) -> None:
        if one.name not in self._waiting:
            self._waiting[one.name] = one
            self._bytes[one.instance] += one.bytes

    def _forget(self, one: _Waiting) -> None:
        if self._waiting.pop(one.name, None) is not None:
            self._bytes[one.instance] -= one.bytes
            if not self._bytes[one.instance]:
                del self._bytes[one.instance]


def _name(key: InstanceKey, version: int) -> str:
    return f"{INLINE}{key}/{version}"


def _protos(record: Record) -> Iterable[blobs_pb2.Blob]:
    """RoostError INTERNAL if it was not written by a coordinator."""
    try:
        return blobs_pb2.InlineBlobs.FromString(record.value).blobs
    except DecodeError as error:
        raise unreadable(record, error) from error


def _decoded(record: Record) -> _Waiting | None:
    """None, and a line in the log, for what no coordinator wrote: it stays where it is."""
    try:
        blobs = tuple(Blob.verified(proto.hash, proto.zstd) for proto in _protos(record))
    except RoostError as error:
        log.error("%s stays in the store: %s", record.key, error.message)  # noqa: TRY400
        return None
    instance = record.key.removeprefix(INLINE).rpartition("/")[0]
    return _Waiting(record.key, instance, record.revision, blobs)

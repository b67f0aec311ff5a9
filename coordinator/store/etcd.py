"""The store in etcd, through etcd3aio. No other file knows either (docs/decisions/0001-etcd3aio.md)."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import cast

import grpc
import grpc.aio
from etcd3aio import EtcdError, prefix_range_end
from etcd3aio._protobuf import Compare, RequestOp, WatchResponse  # has no public way to compare mod revisions
from etcd3aio.connections import ConnectionManager
from etcd3aio.kv import KVService
from etcd3aio.lease import LeaseService
from etcd3aio.watch import WatchService

from coordinator.store.base import Change, Compacted, Delete, Expect, Listing, Put, Record, TxnResult
from shared.errors import Reason, RoostError

_PAGE = 500  # records in one answer, so that no listing outgrows a message: some have 64 KiB

_CHANNEL_OPTIONS = [
    # gRPC's own are 1 s growing to 2 min: an etcd that is back would be ignored for that long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.max_receive_message_length", 64 << 20),
]


class EtcdStore:
    """A Store over one channel. Every call is made once: who retries must know what may have been applied."""

    def __init__(self, channel: grpc.aio.Channel, endpoints: Sequence[str]) -> None:
        self._kv = KVService(channel, max_attempts=1)
        self._lease = LeaseService(channel, max_attempts=1)
        self._watch = WatchService(channel, max_attempts=1, max_reconnect_backoff_seconds=1.0)
        self._where = ", ".join(endpoints)

    async def get(self, key: str, timeout: float = 5.0) -> Record | None:
        with self._translated("read"):
            response = await self._kv.get(key, timeout=timeout)
        return _record(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str, timeout: float = 5.0) -> Listing:
        records: list[Record] = []
        start, end, revision = prefix.encode() or b"\0", prefix_range_end(prefix), 0
        with self._translated("list"):
            async with asyncio.timeout(timeout):
                while True:
                    page = await self._kv.get(start, end, revision=revision, limit=_PAGE, timeout=timeout)
                    records += map(_record, page.kvs)
                    revision = revision or page.header.revision
                    if not page.more:
                        return Listing(tuple(records), revision)
                    start = page.kvs[-1].key + b"\0"

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult:
        compares = [
            Compare(result=Compare.EQUAL, target=Compare.MOD, key=g.key.encode(), mod_revision=g.revision)
            for g in guards
        ]
        with self._translated("write"):
            response = await self._kv.txn(compares, [_operation(w) for w in writes], timeout=timeout)
        return TxnResult(bool(response.succeeded), int(response.header.revision))

    async def watch(self, prefix: str, from_revision: int) -> AsyncIterator[Sequence[Change]]:
        following = from_revision
        while True:
            # The library resumes after a lost connection from the revision in an answer's *header*, which
            # may be ahead of the events that came, and after a compaction as if nothing had been missed.
            # So it may resume only once it is asked to from here, where the last event is known.
            with self._translated("watch"):
                start, end = prefix.encode() or b"\0", prefix_range_end(prefix)
                source = self._watch.watch(start, end, start_revision=following)
                async with aclosing(cast("AsyncGenerator[WatchResponse]", source)) as responses:
                    created = False
                    async for response in responses:
                        if response.created and created:
                            break
                        created = created or response.created
                        changes = self._changes(response)
                        if changes:
                            following = changes[-1].revision + 1
                            yield changes
                    else:
                        raise _ended()

    def _changes(self, response: WatchResponse) -> Sequence[Change]:
        if response.compact_revision > 0:
            raise Compacted(f"changes before revision {response.compact_revision} are gone")
        if response.canceled:
            raise _ended(response.cancel_reason)
        return [_change(event) for event in response.events]

    async def grant_lease(self, ttl: float, timeout: float = 5.0) -> int:
        with self._translated("grant a lease"):
            return int((await self._lease.grant(max(1, math.ceil(ttl)), timeout=timeout)).ID)

    async def keep_alive(self, lease: int, timeout: float = 5.0) -> bool:
        with self._translated("renew a lease"):
            stream = self._lease.keep_alive(lease)
            try:
                async with asyncio.timeout(timeout):
                    async for response in stream:
                        return bool(response.TTL > 0)
            finally:
                stream.cancel()
        raise RoostError(Reason.STORE_UNAVAILABLE, "etcd did not say whether the lease lives")

    async def revoke_lease(self, lease: int, timeout: float = 5.0) -> None:
        with self._translated("revoke a lease"):
            try:
                await self._lease.revoke(lease, timeout=timeout)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:  # already gone is as wanted
                    raise

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (EtcdError, grpc.aio.AioRpcError, TimeoutError) as error:
            if isinstance(error, grpc.aio.AioRpcError):
                detail = error.details() or error.code().name
            else:
                detail = str(error) or "no answer in time"
            raise RoostError(
                Reason.STORE_UNAVAILABLE,
                f"etcd at {self._where} could not {doing}: {detail}",
                "check that etcd runs and can be reached from the coordinator; then try again",
            ) from error


@asynccontextmanager
async def open_etcd(endpoints: Sequence[str]) -> AsyncIterator[EtcdStore]:
    """A store on these `host:port`s; several must be IPv4 addresses (one may be a name with several
    addresses). Opening does not wait for etcd: calls say STORE_UNAVAILABLE while it is away."""
    manager = ConnectionManager(endpoints)
    if len(endpoints) == 1:
        manager.target = f"dns:///{endpoints[0]}"
    manager.grpc_options.extend(_CHANNEL_OPTIONS)
    async with manager.get_channel() as channel:
        yield EtcdStore(channel, endpoints)


def _ended(why: str = "") -> RoostError:
    return RoostError(Reason.STORE_UNAVAILABLE, f"etcd ended a watch: {why or 'without a reason'}")


def _record(kv: object) -> Record:
    return Record(kv.key.decode(), kv.value, kv.mod_revision)  # type: ignore[attr-defined]


def _change(event: object) -> Change:
    kv = event.kv  # type: ignore[attr-defined]
    deleted = event.type == event.DELETE  # type: ignore[attr-defined]
    return Change(kv.key.decode(), None if deleted else _record(kv), kv.mod_revision)


def _operation(write: Put | Delete) -> RequestOp:
    if isinstance(write, Delete):
        return KVService.txn_op_delete(write.key)
    return KVService.txn_op_put(write.key, write.value, lease=write.lease)

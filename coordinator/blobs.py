"""The mesh's blob store, served to nodes and developers: they need no credentials of the store behind it.

What must hold: a Put that was answered is durable, and nothing is stored under a hash that it does not have.
How it can fail: BLOBS_UNAVAILABLE when the store behind fails or is slow, BLOB_MISSING, BLOB_CORRUPT.

Object stores are durable when they answer. For a directory obstore writes and renames without syncing, so
`BlobStore` does that itself (`coordinator.blob_directory`): blobs are written under other names, synced,
renamed, and their directories synced. A name is therefore never seen before its bytes are on the disk.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Sequence,
)
from contextlib import aclosing, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

import grpc.aio
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore, ObjectStore, from_url

from coordinator.blob_directory import BlobDirectory
from coordinator.trash import Condemned, Found, Trash
from protos.v1 import blobs_pb2, blobs_pb2_grpc
from shared.content import Blob, is_hash
from shared.errors import Reason, RoostError

if TYPE_CHECKING:
    from obstore.store import RetryConfig

MAX_HASHES = 10_000  # in one request

_OPERATION_TIMEOUT = 15.0  # seconds, of one object or a few
_LISTING_TIMEOUT = 300.0
# The store's own retries must end before that, so that we can say what went wrong.
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_AT_ONCE = 16  # operations on the store behind, for one request
_GET_AT_ONCE = 4  # blobs that are read together
_PUT_AT_ONCE = 32  # blobs that are made durable together

S = TypeVar("S")
T = TypeVar("T")


def open_blob_store(url: str) -> BlobStore:
    """`file:///directory` (made if need be), `memory:///`, or an obstore URL such as `s3://bucket/prefix`,
    whose credentials come from the environment as that store's tools expect. ValueError for a bad URL."""
    parts = urlsplit(url)
    if parts.scheme == "memory":
        return BlobStore(MemoryStore())
    if parts.scheme != "file":
        try:
            return BlobStore(from_url(url, retry_config=_RETRIES))
        except (BaseError, ValueError) as error:
            raise ValueError(f"{url or '(empty)'}: no blob store: {error}") from error
    directory = Path(unquote(parts.path))
    if parts.netloc or not directory.is_absolute():
        raise ValueError(f"{url}: write file:// and an absolute path, like file:///var/lib/roost/blobs")
    store = LocalStore(directory, mkdir=True)
    blobs = BlobDirectory(directory)
    blobs.recover()
    return BlobStore(store, blobs)


class BlobStore:
    """Blobs in an obstore `store`; `directory` is where it lies if it is one of this machine's."""

    def __init__(self, store: ObjectStore, directory: BlobDirectory | None = None) -> None:
        self._store = store
        self._directory = directory
        self._trash = Trash(store, directory.path if directory else None)

    async def has(self, hash: str) -> bool:
        try:
            await self._bounded(self._store.head_async(_name(hash)))
        except FileNotFoundError:
            self._check_directory()
            return False
        return True

    async def get_all(self, hashes: Sequence[str]) -> list[bytes]:
        """Their compressed bytes, not verified: whoever receives them does that. Also of those that are
        condemned. BLOB_MISSING names one."""
        if self._directory is not None:
            with suppress(FileNotFoundError):
                return await self._bounded(asyncio.to_thread(self._directory.get, list(map(_name, hashes))))
        return await asyncio.gather(*map(self._get, hashes))

    async def _get(self, hash: str) -> bytes:
        for _ in range(2):  # it may be moved from one place to the other, and back, while it is looked for
            with suppress(FileNotFoundError):
                result = await self._bounded(self._store.get_async(_name(hash)))
                return bytes(await self._bounded(result.bytes_async()))
            if (found := await self._bounded(self._trash.find(hash))) is not None:
                return found
        self._check_directory()
        raise _missing(hash)

    async def put_all(self, blobs: Sequence[Blob]) -> None:
        """When it returns, the blobs are durable. In a directory they are synced together."""
        self._check_directory()
        try:
            if self._directory is not None:
                await self._bounded(
                    asyncio.to_thread(self._directory.put, [(_name(b.hash), b.zstd) for b in blobs])
                )
                return
            async with aclosing(_ordered(_each(blobs), self._put)) as done:
                async for _ in done:
                    pass
        except FileNotFoundError as error:  # no such bucket, or the directory has just vanished
            raise _unavailable(str(error).partition("\n")[0]) from error

    async def _put(self, blob: Blob) -> None:
        await self._bounded(self._store.put_async(_name(blob.hash), blob.zstd))

    # --- for who collects --------------------------------------------------------------------

    @property
    def closes_trash(self) -> bool:
        return self._trash.closes

    async def chunks(self, shard: str) -> list[Found]:
        self._check_directory()
        return await self._bounded(self._trash.chunks(shard), _LISTING_TIMEOUT)

    async def condemned(self) -> list[Condemned]:
        return await self._bounded(self._trash.condemned(), _LISTING_TIMEOUT)

    async def open_trash(self, round: int) -> str:
        return await self._bounded(self._trash.open(round))

    async def close_trash(self) -> None:
        await self._bounded(self._trash.close())

    async def condemn(self, hashes: Sequence[str], name: str) -> int:
        return await self._bounded(self._trash.condemn(hashes, name))

    async def purge(self, entries: Sequence[Condemned]) -> None:
        await self._bounded(self._trash.purge(entries))

    # -----------------------------------------------------------------------------------------

    def _check_directory(self) -> None:
        """A directory that has vanished (an unmounted disk) has lost nothing: it is not there just now."""
        if self._directory is not None and not self._directory.path.is_dir():
            raise _unavailable(f"its directory {self._directory.path} is not there")

    async def _bounded(self, operation: Awaitable[T], seconds: float = _OPERATION_TIMEOUT) -> T:
        try:
            async with asyncio.timeout(seconds):
                return await operation
        except FileNotFoundError:
            raise
        except TimeoutError as error:
            raise _unavailable(f"it did not answer within {seconds:g} s") from error
        except (BaseError, OSError) as error:
            raise _unavailable(str(error).partition("\n")[0]) from error


class BlobsServicer(blobs_pb2_grpc.BlobsServicer):
    """roost.v1.Blobs over a BlobStore."""

    def __init__(self, store: BlobStore, gc_round: Callable[[], int] = lambda: 0) -> None:
        """`gc_round`: of collecting, that has begun."""
        self._store = store
        self._gc_round = gc_round

    async def Missing(
        self, request: blobs_pb2.MissingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blobs_pb2.MissingReply:
        gc_round = self._gc_round()
        try:
            hashes = _checked(request.hashes)
            async with aclosing(_ordered(_each(hashes), self._store.has)) as found:
                there = [here async for here in found]
        except RoostError as error:
            await error.abort(context)
        missing = [hash for hash, here in zip(hashes, there, strict=True) if not here]
        return blobs_pb2.MissingReply(hashes=missing, gc_round=gc_round)

    async def Verify(
        self, request: blobs_pb2.VerifyRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blobs_pb2.VerifyReply:
        reply = blobs_pb2.VerifyReply()
        try:
            hashes = _checked(request.hashes)
            async with aclosing(_ordered(_each(hashes), self._verify)) as found:
                reasons = [reason async for reason in found]
        except RoostError as error:
            await error.abort(context)
        for hash, reason in zip(hashes, reasons, strict=True):
            if reason is Reason.BLOB_MISSING:
                reply.missing.append(hash)
            elif reason is Reason.BLOB_CORRUPT:
                reply.corrupt.append(hash)
        return reply

    async def _verify(self, hash: str) -> Reason | None:
        try:
            await asyncio.to_thread(Blob.verified, hash, (await self._store.get_all([hash]))[0])
        except RoostError as error:
            if error.reason not in (Reason.BLOB_MISSING, Reason.BLOB_CORRUPT):
                raise
            return error.reason
        return None

    async def Put(
        self,
        request_iterator: AsyncIterator[blobs_pb2.Blob],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> blobs_pb2.PutReply:
        stored = 0
        try:
            async with aclosing(_ordered(_grouped(request_iterator), self._put_some)) as done:
                async for count in done:
                    stored += count
        except RoostError as error:
            await error.abort(context)
        return blobs_pb2.PutReply(stored=stored)

    async def Get(
        self, request: blobs_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[blobs_pb2.Blob]:
        try:
            hashes = _checked(request.hashes)
            groups = [hashes[start : start + _GET_AT_ONCE] for start in range(0, len(hashes), _GET_AT_ONCE)]
            async with aclosing(_ordered(_each(groups), self._store.get_all)) as found:
                asked = iter(hashes)
                async for some in found:
                    for zstd in some:
                        yield blobs_pb2.Blob(hash=next(asked), zstd=zstd)
        except RoostError as error:
            await error.abort(context)

    async def _put_some(self, some: Sequence[blobs_pb2.Blob]) -> int:
        _checked([blob.hash for blob in some])
        await self._store.put_all(await asyncio.to_thread(_verified, some))
        return len(some)


async def _ordered(
    items: AsyncIterable[S], work: Callable[[S], Coroutine[Any, Any, T]]
) -> AsyncGenerator[T, None]:
    """The results of `work` on each item, in order, at most _AT_ONCE at a time. Ends with the first error."""
    tasks: deque[asyncio.Task[T]] = deque()
    try:
        async for item in items:
            tasks.append(asyncio.create_task(work(item)))
            if len(tasks) == _AT_ONCE:
                yield await tasks.popleft()
        while tasks:
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _grouped(blobs: AsyncIterable[blobs_pb2.Blob]) -> AsyncIterator[Sequence[blobs_pb2.Blob]]:
    group: list[blobs_pb2.Blob] = []
    async for blob in blobs:
        group.append(blob)
        if len(group) == _PUT_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _verified(blobs: Sequence[blobs_pb2.Blob]) -> list[Blob]:
    return [Blob.verified(blob.hash, blob.zstd) for blob in blobs]


async def _each(items: Sequence[S]) -> AsyncIterator[S]:
    for item in items:
        yield item


def _checked(hashes: Sequence[str]) -> Sequence[str]:
    """The same, if each is a hash: they become names of objects."""
    if len(hashes) > MAX_HASHES:
        raise RoostError(
            Reason.BAD_REQUEST, f"{len(hashes):,} hashes in one request", f"ask for at most {MAX_HASHES:,}"
        )
    for hash in hashes:
        if not is_hash(hash):
            raise RoostError(Reason.BAD_REQUEST, f"{hash[:80]!r} is no hash", "write BLAKE3-256 in hex")
    return hashes


def _name(hash: str) -> str:
    return f"chunks/{hash[:2]}/{hash}"


def _missing(hash: str) -> RoostError:
    return RoostError(
        Reason.BLOB_MISSING,
        f"the blob store does not have blob {hash[:12]}",
        "check that the store is the one it was put into, and that nobody has deleted from it",
    )


def _unavailable(why: str) -> RoostError:
    return RoostError(
        Reason.BLOBS_UNAVAILABLE,
        f"the blob store can't be used: {why}",
        "check the store that the coordinator's --blobs names",
    )

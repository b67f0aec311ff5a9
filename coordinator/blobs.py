"""The mesh's blob store, served to nodes and developers: they need no credentials of the store behind it.

What must hold: a Put that was answered is durable, and nothing is stored under a hash that it does not have.
How it can fail: BLOBS_UNAVAILABLE when the store behind fails or is slow, BLOB_MISSING, BLOB_CORRUPT.

Object stores are durable when they answer. For a directory obstore writes and renames without syncing, so
`BlobStore` does that itself: a blob is written under another name, synced, renamed, and its directory
synced. A name is therefore never seen before its bytes are on the disk.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
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

from protos.v1 import blobs_pb2, blobs_pb2_grpc
from shared.content import Blob, is_hash
from shared.errors import Reason, RoostError

if TYPE_CHECKING:
    from obstore.store import RetryConfig

MAX_HASHES = 10_000  # in one request

_OPERATION_TIMEOUT = 15.0  # seconds, of one object
# The store's own retries must end before that, so that we can say what went wrong.
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
_AT_ONCE = 16  # operations on the store behind, for one request
_INCOMING = "incoming"
_FORGOTTEN = 3600.0  # seconds after which what lies in _INCOMING is nobody's

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
    store = BlobStore(LocalStore(directory, mkdir=True), directory)
    store.recover()
    return store


class BlobStore:
    """Blobs in an obstore `store`; `directory` is where it lies if it is one of this machine's."""

    def __init__(self, store: ObjectStore, directory: Path | None = None) -> None:
        self._store = store
        self._directory = directory

    def recover(self) -> None:
        """After a crash: completes what was renamed and not yet synced, removes what was left behind."""
        if self._directory is None:
            return
        (self._directory / "chunks").mkdir(exist_ok=True)
        _sync(self._directory, self._directory / "chunks", *(self._directory / "chunks").iterdir())
        for path in (self._directory / _INCOMING).glob("*"):
            with suppress(FileNotFoundError):  # another coordinator's, which renamed it just now
                if path.stat().st_mtime < time.time() - _FORGOTTEN:
                    path.unlink()

    async def has(self, hash: str) -> bool:
        try:
            await self._bounded(self._store.head_async(_name(hash)))
        except FileNotFoundError:
            self._check_directory()
            return False
        return True

    async def get(self, hash: str) -> bytes:
        """Its compressed bytes, not verified: whoever receives them does that. BLOB_MISSING."""
        try:
            result = await self._bounded(self._store.get_async(_name(hash)))
            return bytes(await self._bounded(result.bytes_async()))
        except FileNotFoundError as error:
            self._check_directory()
            raise RoostError(
                Reason.BLOB_MISSING,
                f"the blob store does not have blob {hash[:12]}",
                "check that the store is the one it was put into, and that nobody has deleted from it",
            ) from error

    async def put(self, blob: Blob) -> None:
        """When it returns, the blob is durable."""
        self._check_directory()
        try:
            await self._put(_name(blob.hash), blob.zstd)
        except FileNotFoundError as error:  # no such bucket, or the directory has just vanished
            raise _unavailable(str(error).partition("\n")[0]) from error

    async def _put(self, name: str, data: bytes) -> None:
        if self._directory is None:
            await self._bounded(self._store.put_async(name, data))
            return
        incoming = f"{_INCOMING}/{secrets.token_hex(8)}"
        try:
            await self._bounded(self._store.put_async(incoming, data))
            await self._bounded(asyncio.to_thread(_sync, self._directory / incoming))
            await self._bounded(self._store.rename_async(incoming, name))
        except BaseException:
            with suppress(OSError):
                os.unlink(self._directory / incoming)
            raise
        shard = (self._directory / name).parent
        await self._bounded(asyncio.to_thread(_sync, shard, shard.parent))

    def _check_directory(self) -> None:
        """A directory that has vanished (an unmounted disk) has lost nothing: it is not there just now."""
        if self._directory is not None and not self._directory.is_dir():
            raise _unavailable(f"its directory {self._directory} is not there")

    async def _bounded(self, operation: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(_OPERATION_TIMEOUT):
                return await operation
        except FileNotFoundError:
            raise
        except TimeoutError as error:
            raise _unavailable(f"it did not answer within {_OPERATION_TIMEOUT:g} s") from error
        except (BaseError, OSError) as error:
            raise _unavailable(str(error).partition("\n")[0]) from error


class BlobsServicer(blobs_pb2_grpc.BlobsServicer):
    """roost.v1.Blobs over a BlobStore."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def Missing(
        self, request: blobs_pb2.MissingRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blobs_pb2.MissingReply:
        try:
            hashes = _checked(request.hashes)
            async with aclosing(_ordered(_each(hashes), self._store.has)) as found:
                there = [here async for here in found]
        except RoostError as error:
            await error.abort(context)
        missing = [hash for hash, here in zip(hashes, there, strict=True) if not here]
        return blobs_pb2.MissingReply(hashes=missing)

    async def Put(
        self,
        request_iterator: AsyncIterator[blobs_pb2.Blob],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> blobs_pb2.PutReply:
        stored = 0
        try:
            async with aclosing(_ordered(request_iterator, self._put_one)) as done:
                async for _ in done:
                    stored += 1
        except RoostError as error:
            await error.abort(context)
        return blobs_pb2.PutReply(stored=stored)

    async def Get(
        self, request: blobs_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[blobs_pb2.Blob]:
        try:
            async with aclosing(_ordered(_each(_checked(request.hashes)), self._get_one)) as found:
                async for blob in found:
                    yield blob
        except RoostError as error:
            await error.abort(context)

    async def _put_one(self, blob: blobs_pb2.Blob) -> None:
        _checked([blob.hash])
        await self._store.put(await asyncio.to_thread(Blob.verified, blob.hash, blob.zstd))

    async def _get_one(self, hash: str) -> blobs_pb2.Blob:
        return blobs_pb2.Blob(hash=hash, zstd=await self._store.get(hash))


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


def _sync(*paths: Path) -> None:
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _unavailable(why: str) -> RoostError:
    return RoostError(
        Reason.BLOBS_UNAVAILABLE,
        f"the blob store can't be used: {why}",
        "check the store that the coordinator's --blobs names",
    )

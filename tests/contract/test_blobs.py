"""What every `Blobs` promises: the fake in memory, and gRPC to a real service over a directory or S3."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

import grpc.aio
import pytest

from coordinator.blobs import open_blob_store
from edge_agent.state.blobs import Blobs, MemoryBlobs
from shared.content import MAX_BLOB, Blob
from shared.errors import Reason, RoostError
from tests.support.blob_service import serving
from tests.support.s3 import S3, running_s3

BLOBS = [Blob.of(f"blob {i}".encode() * 10) for i in range(200)]


class Behind(Protocol):
    """What lies behind a `Blobs`, for harm."""

    async def overwrite(self, hash: str, zstd: bytes) -> None: ...

    async def shut(self) -> None: ...


class BlobsContract:
    """Subclasses give the fixtures `blobs` and `behind`."""

    async def test_what_was_put_is_there(self, blobs: Blobs) -> None:
        hashes = [blob.hash for blob in BLOBS]
        assert await blobs.missing(hashes) == set(hashes)
        await blobs.put(BLOBS[:150])
        await blobs.put(iter(BLOBS[100:150]))
        assert await blobs.missing(hashes) == set(hashes[150:])
        found = await blobs.get([*hashes[:150], hashes[0]])
        assert found == {blob.hash: blob for blob in BLOBS[:150]}

    async def test_nothing_asked_is_nothing_answered(self, blobs: Blobs) -> None:
        await blobs.put([])
        assert await blobs.missing([]) == set()
        assert await blobs.get([]) == {}

    async def test_blobs_of_every_size(self, blobs: Blobs) -> None:
        sizes = [Blob.of(random.Random(n).randbytes(n)) for n in (0, 1, 65_536, MAX_BLOB, MAX_BLOB - 1)]
        await blobs.put(sizes)
        assert list((await blobs.get([blob.hash for blob in sizes])).values()) == sizes

    async def test_one_that_is_not_there_is_named(self, blobs: Blobs) -> None:
        await blobs.put(BLOBS[:1])
        with pytest.raises(RoostError) as caught:
            await blobs.get([BLOBS[0].hash, BLOBS[1].hash])
        assert caught.value.reason is Reason.BLOB_MISSING
        assert BLOBS[1].hash[:12] in caught.value.message

    @pytest.mark.parametrize("zstd", [b"", b"junk", BLOBS[1].zstd, BLOBS[0].zstd[:-1]])
    async def test_one_that_is_not_what_it_was_is_corrupt(
        self, blobs: Blobs, behind: Behind, zstd: bytes
    ) -> None:
        await blobs.put(BLOBS[:1])
        await behind.overwrite(BLOBS[0].hash, zstd)
        with pytest.raises(RoostError) as caught:
            await blobs.get([BLOBS[0].hash])
        assert caught.value.reason is Reason.BLOB_CORRUPT
        assert BLOBS[0].hash[:12] in caught.value.message

    async def test_a_store_that_is_down_says_so(self, blobs: Blobs, behind: Behind) -> None:
        await behind.shut()
        for call in (blobs.missing([BLOBS[0].hash]), blobs.put(BLOBS[:1]), blobs.get([BLOBS[0].hash])):
            with pytest.raises(RoostError) as caught:
                await call
            assert caught.value.reason is Reason.BLOBS_UNAVAILABLE


class TestMemoryBlobs(BlobsContract):
    @pytest.fixture
    def blobs(self) -> MemoryBlobs:
        return MemoryBlobs()

    @pytest.fixture
    def behind(self, blobs: MemoryBlobs) -> Behind:
        class Memory:
            async def overwrite(self, hash: str, zstd: bytes) -> None:
                blobs.kept[hash] = zstd

            async def shut(self) -> None:
                blobs.down = True

        return Memory()


class TestGrpcBlobs(BlobsContract):
    @pytest.fixture
    async def served(self, tmp_path: Path) -> AsyncIterator[tuple[grpc.aio.Server, Blobs]]:
        async with serving(open_blob_store(f"file://{tmp_path}/blobs")) as served:
            yield served

    @pytest.fixture
    def blobs(self, served: tuple[grpc.aio.Server, Blobs]) -> Blobs:
        return served[1]

    @pytest.fixture
    def behind(self, served: tuple[grpc.aio.Server, Blobs], tmp_path: Path) -> Behind:
        class Directory:
            async def overwrite(self, hash: str, zstd: bytes) -> None:
                (tmp_path / "blobs" / "chunks" / hash[:2] / hash).write_bytes(zstd)

            async def shut(self) -> None:
                await served[0].stop(None)

        return Directory()


class TestS3Blobs(BlobsContract):
    """A real S3-compatible server behind the coordinator's service."""

    @pytest.fixture
    async def s3(self, tmp_path: Path) -> AsyncIterator[S3]:
        async with running_s3(tmp_path / "s3") as server:
            yield server

    @pytest.fixture
    async def blobs(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Blobs]:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        async with serving(open_blob_store(s3.url)) as (_, blobs):
            yield blobs

    @pytest.fixture
    def behind(self, s3: S3) -> Behind:
        class Server:
            async def overwrite(self, hash: str, zstd: bytes) -> None:
                (s3.objects / "chunks" / hash[:2] / hash).write_bytes(zstd)

            async def shut(self) -> None:
                await s3.kill()

        return Server()

"""The blob service under hostile callers and failing stores, over real gRPC."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import zstandard

from coordinator.blobs import MAX_HASHES, BlobsServicer, BlobStore, open_blob_store
from edge_agent.state.blobs import GrpcBlobs
from protos.v1 import blobs_pb2, blobs_pb2_grpc
from shared.content import Blob
from shared.errors import Reason, RoostError, from_rpc

GOOD = Blob.of(b"good")
BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(256 << 20))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "a directory" / "blobs"


async def serve(store: BlobStore) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    blobs_pb2_grpc.add_BlobsServicer_to_server(BlobsServicer(store), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


@pytest.fixture
async def channel(directory: Path) -> AsyncIterator[grpc.aio.Channel]:
    async for channel in serve(open_blob_store(directory.as_uri())):
        yield channel


def stub(channel: grpc.aio.Channel) -> blobs_pb2_grpc.BlobsAsyncStub:
    return blobs_pb2_grpc.BlobsStub(channel)


async def refused(call: object) -> Reason:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]
    return from_rpc(caught.value, Reason.BLOBS_UNAVAILABLE, "").reason


def stored_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def put(channel: grpc.aio.Channel, *blobs: tuple[str, bytes]) -> blobs_pb2.PutReply:
    return await stub(channel).Put((blobs_pb2.Blob(hash=h, zstd=z) for h, z in blobs), timeout=20)


@pytest.mark.parametrize(
    ("hash", "zstd", "reason"),
    [
        (GOOD.hash, b"junk", Reason.BLOB_CORRUPT),
        (GOOD.hash, BOMB, Reason.BLOB_CORRUPT),
        ("0" * 64, GOOD.zstd, Reason.BLOB_CORRUPT),
        ("../../../escaped", GOOD.zstd, Reason.BAD_REQUEST),
        ("", GOOD.zstd, Reason.BAD_REQUEST),
        (GOOD.hash.upper(), GOOD.zstd, Reason.BAD_REQUEST),
    ],
)
async def test_what_is_not_what_it_says_is_not_stored(
    channel: grpc.aio.Channel, directory: Path, hash: str, zstd: bytes, reason: Reason
) -> None:
    assert await refused(put(channel, (hash, zstd))) is reason
    assert stored_in(directory) == []
    assert (await put(channel, (GOOD.hash, GOOD.zstd))).stored == 1, "and the service lives"


async def test_a_question_about_what_is_no_hash_is_refused(channel: grpc.aio.Channel) -> None:
    odd = ["../../etc/passwd"]
    assert await refused(stub(channel).Missing(blobs_pb2.MissingRequest(hashes=odd))) is Reason.BAD_REQUEST
    assert await refused(stub(channel).Get(blobs_pb2.GetRequest(hashes=odd)).read()) is Reason.BAD_REQUEST
    many = ["0" * 64] * (MAX_HASHES + 1)
    assert await refused(stub(channel).Missing(blobs_pb2.MissingRequest(hashes=many))) is Reason.BAD_REQUEST


async def test_a_blob_lies_synced_under_its_name(channel: grpc.aio.Channel, directory: Path) -> None:
    await put(channel, (GOOD.hash, GOOD.zstd))
    assert (directory / "chunks" / GOOD.hash[:2] / GOOD.hash).read_bytes() == GOOD.zstd
    assert os.listdir(directory / "incoming") == []


async def test_a_put_that_was_answered_is_there_after_a_restart(directory: Path) -> None:
    for _ in range(2):
        async for channel in serve(open_blob_store(directory.as_uri())):
            await GrpcBlobs(channel).put([GOOD])
            assert await GrpcBlobs(channel).get([GOOD.hash]) == {GOOD.hash: GOOD}


async def test_what_a_crash_left_behind_is_swept_when_it_is_old(directory: Path) -> None:
    open_blob_store(directory.as_uri())
    (directory / "incoming").mkdir()
    for name, age in (("old", 7200), ("new", 0)):
        (directory / "incoming" / name).write_bytes(b"")
        os.utime(directory / "incoming" / name, (time.time() - age,) * 2)
    open_blob_store(directory.as_uri())
    assert os.listdir(directory / "incoming") == ["new"]


async def test_a_directory_that_vanishes_has_not_lost_its_blobs(
    channel: grpc.aio.Channel, directory: Path
) -> None:
    blobs = GrpcBlobs(channel)
    await blobs.put([GOOD])
    away = directory.with_name("away")
    os.rename(directory, away)
    for call in (blobs.missing([GOOD.hash]), blobs.put([GOOD]), blobs.get([GOOD.hash])):
        with pytest.raises(RoostError) as caught:
            await call
        assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
        assert caught.value.hint
    assert os.listdir(away.parent) == ["away"], "nothing was put where the disk should be mounted"
    os.rename(away, directory)
    assert await blobs.missing([GOOD.hash]) == set()


async def test_a_directory_that_can_not_be_written_is_unavailable(
    channel: grpc.aio.Channel, directory: Path
) -> None:
    shutil.rmtree(directory)
    os.close(os.open(directory, os.O_CREAT))  # a file
    with pytest.raises(RoostError) as caught:
        await GrpcBlobs(channel).put([GOOD])
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE


async def test_an_object_store_that_is_down_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{s.getsockname()[1]}"  # bound, and nobody listens
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "here",
        }.items():
            monkeypatch.setenv(name, value)
        async for channel in serve(open_blob_store("s3://bucket/prefix")):
            begun = asyncio.get_running_loop().time()
            with pytest.raises(RoostError) as caught:
                await GrpcBlobs(channel).put([GOOD])
            assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
            assert asyncio.get_running_loop().time() - begun < 20


async def test_in_memory(tmp_path: Path) -> None:
    async for channel in serve(open_blob_store("memory:///")):
        await GrpcBlobs(channel).put([GOOD])
        assert await GrpcBlobs(channel).get([GOOD.hash]) == {GOOD.hash: GOOD}


@pytest.mark.parametrize(
    "url", ["", "blobs", "file://host/dir", "file:relative", "ftp://x/y", "nonsense://x"]
)
def test_a_bad_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"file://|no blob store"):
        open_blob_store(url)

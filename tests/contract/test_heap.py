"""What every `Heap` promises to who collects: in memory, a directory, a real S3-compatible server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from coordinator.blobs import open_blob_store
from coordinator.collecting.collector import Clock, Collector, Heap, Settings
from coordinator.collecting.marking import Marker
from coordinator.collecting.report import Report
from coordinator.collecting.rounds import Round, Rounds
from coordinator.inline import InlineCommits
from coordinator.manifests import Manifests
from coordinator.records import AgentRecord, Stored, agent_key
from coordinator.store.base import Put
from coordinator.store.memory import MemoryStore
from shared.content import Blob
from shared.errors import Reason, RoostError
from shared.manifest import FileNode, encode_tree
from tests.support.fake_heap import MemoryHeap
from tests.support.s3 import S3, running_s3

BLOBS = [Blob.of(f"blob {i}".encode()) for i in range(30)]
HASHES = [blob.hash for blob in BLOBS]


class HeapContract:
    """Subclasses give the fixture `heap`."""

    async def test_what_was_put_is_listed_by_its_shard(self, heap: Heap) -> None:
        await fill(heap)
        found = {f.hash: f for hash in HASHES for f in await heap.chunks(hash[:2])}
        assert found.keys() == set(HASHES)
        assert all(found[blob.hash].size == len(blob.zstd) for blob in BLOBS)
        assert all(found[hash].modified <= time.time() + 5 for hash in HASHES)

    async def test_what_is_condemned_is_not_there_and_can_be_read(self, heap: Heap) -> None:
        await fill(heap)
        name = await heap.open_trash(7)
        assert await heap.condemn(HASHES[:10], name) == 10
        assert [await heap.has(hash) for hash in HASHES[:11]] == [False] * 10 + [True]
        assert await got(heap, HASHES[3]) == BLOBS[3].zstd
        listed = await heap.condemned()
        assert {(entry.hash, entry.round, entry.size) for entry in listed} == {
            (blob.hash, 7, len(blob.zstd)) for blob in BLOBS[:10]
        }
        assert not [f for hash in HASHES[:10] for f in await heap.chunks(hash[:2]) if f.hash in HASHES[:10]]

    async def test_what_is_put_again_is_there_whatever_becomes_of_the_condemned(self, heap: Heap) -> None:
        await fill(heap)
        name = await heap.open_trash(1)
        await heap.condemn(HASHES[:2], name)
        await heap.put_all(BLOBS[:1])
        await heap.purge(await heap.condemned())
        assert await got(heap, HASHES[0]) == BLOBS[0].zstd
        with pytest.raises(RoostError) as caught:
            await got(heap, HASHES[1])
        assert caught.value.reason is Reason.BLOB_MISSING
        assert await heap.condemned() == []

    async def test_all_of_it_can_be_repeated(self, heap: Heap) -> None:
        await fill(heap)
        name = await heap.open_trash(1)
        await heap.condemn(HASHES[:2], name)
        await heap.condemn(HASHES[:2], name)
        entries = await heap.condemned()
        await heap.purge(entries)
        await heap.purge(entries)
        await heap.purge([])
        await heap.close_trash()
        await heap.close_trash()
        assert await heap.condemned() == []

    async def test_a_closed_trash_takes_nothing_more_and_gives_what_it_has(self, heap: Heap) -> None:
        await fill(heap)
        name = await heap.open_trash(1)
        await heap.condemn(HASHES[:2], name)
        await heap.close_trash()
        assert await got(heap, HASHES[0]) == BLOBS[0].zstd
        later = await heap.open_trash(2)
        await heap.condemn(HASHES[2:4], later)
        if heap.closes_trash:
            await heap.condemn(HASHES[4:6], name)
            assert await heap.has(HASHES[4])
        rounds = sorted(entry.round for entry in await heap.condemned() if entry.hash not in HASHES[4:6])
        assert rounds == [1, 1, 2, 2]
        await heap.purge([entry for entry in await heap.condemned() if entry.round == 1])
        assert await got(heap, HASHES[2]) == BLOBS[2].zstd

    async def test_rounds_take_what_nobody_needs_and_bring_back_what_somebody_does(self, heap: Heap) -> None:
        await fill(heap)
        tree = encode_tree([FileNode("f", 0o644, 0, len(BLOBS[0].plain), (HASHES[0],))])
        await heap.put_all([Blob.of(tree.blobs[tree.root])])
        store = MemoryStore()
        agent = AgentRecord("acme", "chef", "v1", POLICY, tree.root)

        async def collect(dies: bool = False) -> Report:
            collector = Collector("me", store, heap, marker, Rounds(store, Unseen(), 1.0), AT_ONCE, CLOCK)
            if dies:
                task = asyncio.create_task(collector.collect())
                await asyncio.sleep(0.02)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return Report()
            return await collector.collect()

        inline = InlineCommits(store, heap, CLOCK.steady, 1.0)
        marker = Marker(store, Manifests(heap), inline)  # type: ignore[arg-type]
        assert (await collect()).condemned == 31, "the agent is not deployed yet"
        await store.txn([], [Put(agent_key("acme", "chef"), agent.encode())])
        await collect(dies=True)
        report = await collect()
        assert report.missing == 0  # the one that died may have brought some back
        for _ in range(2):
            report = await collect()
        assert (report.blobs, report.needed, report.missing) == (2, 2, 0)
        assert await heap.condemned() == []
        assert [await heap.has(hash) for hash in HASHES[:2]] == [True, False]


POLICY = '[agent]\nname = "chef"\n[run]\nentry = "chef:agent"\n'
AT_ONCE = Settings(grace=-5.0, rate=1e9, late=0.0)  # a store's clock may be a little ahead
CLOCK = Clock()


class Unseen:
    def round(self) -> None: ...

    def learn_round(self, stored: Stored[Round]) -> None: ...


async def fill(heap: Heap) -> None:
    await heap.put_all(BLOBS)


async def got(heap: Heap, hash: str) -> bytes:
    (zstd,) = await heap.get_all([hash])
    return zstd


class TestMemoryHeap(HeapContract):
    @pytest.fixture
    def heap(self) -> Heap:
        return MemoryHeap()


class TestDirectoryHeap(HeapContract):
    @pytest.fixture
    def heap(self, tmp_path: Path) -> Heap:
        return open_blob_store(f"file://{tmp_path}/blobs")


class TestS3Heap(HeapContract):
    @pytest.fixture
    async def s3(self, tmp_path: Path) -> AsyncIterator[S3]:
        async with running_s3(tmp_path / "s3") as server:
            yield server

    @pytest.fixture
    def heap(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Heap:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        return open_blob_store(s3.url)

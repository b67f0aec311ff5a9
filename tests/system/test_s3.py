"""Blobs in an S3-compatible server: the main job, and what happens when that server fails or lies."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from coordinator.blobs import open_blob_store
from coordinator.records import InstanceRecord, instance_key
from coordinator.store.etcd import open_etcd
from edge_agent.commits import Commits
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.store import StateStore
from shared.content import hash_of
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest
from tests.support.blob_service import serving
from tests.support.eventually import eventually
from tests.support.fake_control import FakeControl, Owned
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, Store, running_mesh
from tests.support.s3 import S3, running_s3

OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"


@asynccontextmanager
async def mesh_on_s3(directory: Path) -> AsyncIterator[tuple[Mesh, S3]]:
    async with running_s3(directory / "s3") as s3:
        store = Store(s3.url, s3.environment)
        async with running_mesh(directory / "mesh", [NORTH, SOUTH], store=store) as mesh:
            await mesh.deploy(PROBE)
            yield mesh, s3


async def root_of(mesh: Mesh, user: str) -> str:
    async with open_etcd([mesh.etcd.endpoint]) as store:
        stored = await store.get(instance_key(InstanceKey("default", "probe", user)))
    assert stored is not None
    return InstanceRecord.decode(stored).value.root


async def test_the_main_job_with_blobs_in_s3(tmp_path: Path) -> None:
    async with mesh_on_s3(tmp_path) as (mesh, s3), mesh.client(OSLO) as client:
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await ana.send("fill large 3")
        assert s3.chunks(), "they lie in the server's directory, and nowhere else"
        assert not (mesh.directory / "blobs").exists()
        await mesh.drain("edge-north")
        async with client.attach("probe", "ana") as ana:
            reply = await ana.send("append two")
        assert json.loads(reply.text) == ["one", "two"]
        assert (reply.receipt.node, reply.receipt.resumed_from) == ("edge-south", "blobs")


async def test_fault_s3_killed_in_the_middle_of_an_upload(tmp_path: Path) -> None:
    """The turn is committed when the server is back; until then, nothing is."""
    async with mesh_on_s3(tmp_path) as (mesh, s3), mesh.client(OSLO) as client:
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            before = len(s3.chunks())
            turn = asyncio.create_task(ana.send("fill large 40"))
            await eventually(lambda: len(s3.chunks()) > before + 20, 20.0, "the upload is under way")
            await s3.kill()
            await asyncio.sleep(1.0)
            instance = await mesh.instance("probe", "ana")
            assert instance is not None
            assert instance.version == 1
            assert not turn.done()
            await s3.start()
            assert (await turn).receipt.version == 2
            assert json.loads((await ana.send("lines")).text) == ["one"]


async def test_fault_s3_stands_still_for_a_while(tmp_path: Path) -> None:
    async with mesh_on_s3(tmp_path) as (mesh, s3), mesh.client(OSLO) as client:
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            s3.suspend()
            reply = await ana.send("append two")  # which is little, and durable without it
            assert reply.receipt.version == 2
            turn = asyncio.create_task(ana.send("fill large 1"))
            await asyncio.sleep(3.0)
            assert not turn.done(), "no reply is acknowledged before it is durable"
            s3.resume()
            assert (await turn).receipt.version == 3

        def flushed() -> bool:
            names = {path.name for path in s3.chunks()}
            return all(hash_of(text) in names for text in (b"one\n", b"one\ntwo\n"))

        await eventually(flushed, 20.0, "the blob store has what was committed meanwhile")
        await mesh.drain("edge-north")
        async with client.attach("probe", "ana") as ana:
            reply = await ana.send("lines")
        assert (json.loads(reply.text), reply.receipt.node) == (["one", "two"], "edge-south")


async def test_fault_s3_down_for_longer_than_a_commit_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clear error, and nothing is published; the same commit succeeds once the server is back."""
    key = InstanceKey("default", "probe", "ana")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_bytes(os.urandom(1 << 20))
    async with running_s3(tmp_path / "s3") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        async with serving(open_blob_store(s3.url)) as (_, blobs):
            chunks = ChunkStore(tmp_path / "chunks")
            state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs))
            control = FakeControl({key: Owned(epoch=1)})
            commits = Commits(state, control, upload_seconds=2.0)
            with LocalFiles(tmp_path / "state") as files:
                captured = await state.capture(files, None)
            manifest = StateManifest(str(key), 1, 1, captured.nodes).with_turn("t1", "done")
            await s3.kill()
            with pytest.raises(RoostError) as caught:
                await commits.publish(key, captured, manifest, "t1", lambda: False)
            assert caught.value.reason is Reason.TURN_NOT_COMMITTED
            assert "stor" in caught.value.message
            assert caught.value.hint
            assert control.owned[key].version == 0
            await s3.start()
            root, _ = await commits.publish(key, captured, manifest, "t1", lambda: False)
            assert control.owned[key] == Owned(1, 1, root)
            assert (await state.load(key, 1, root)) == manifest


@pytest.mark.parametrize("harm", ["flipped bits in a chunk", "a truncated manifest", "a lost chunk"])
async def test_fault_s3_gives_other_bytes_than_it_was_given(tmp_path: Path, harm: str) -> None:
    """The state is refused, never restored in part or begun anew; with the good bytes back, it is there."""
    async with mesh_on_s3(tmp_path) as (mesh, s3), mesh.client(OSLO) as client:
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await ana.send("fill large 1")
        root = await root_of(mesh, "ana")
        victim = max(s3.chunks(), key=lambda path: path.stat().st_size)  # of "large": all else is small
        if harm == "a truncated manifest":
            victim = next(path for path in s3.chunks() if path.name == root)
        good = victim.read_bytes()
        match harm:
            case "flipped bits in a chunk":
                victim.write_bytes(good[:1000] + bytes([good[1000] ^ 0x10]) + good[1001:])
            case "a truncated manifest":
                victim.write_bytes(good[: len(good) // 2])
            case _:
                victim.unlink()
        await mesh.drain("edge-north")  # which has copies of its own
        async with client.attach("probe", "ana") as ana:
            for _ in range(2):
                with pytest.raises(RoostError) as caught:
                    await ana.send("append two")
                assert caught.value.reason is Reason.RESTORE_INCOMPLETE
                assert caught.value.hint
            instance = await mesh.instance("probe", "ana")
            assert instance is not None
            assert (instance.version, await root_of(mesh, "ana")) == (2, root)
            victim.write_bytes(good)
            reply = await ana.send("append two")
        assert json.loads(reply.text) == ["one", "two"]
        assert (reply.receipt.node, reply.receipt.version) == ("edge-south", 3)

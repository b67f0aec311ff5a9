"""Disks that are full, gone or wrong: a clear error, the old version intact, service once that is over."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from coordinator.blobs import open_blob_store
from edge_agent.commits import Commits
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.local_files import LocalFiles
from edge_agent.state.store import StateStore
from roost.client import AsyncChat
from shared.errors import Reason, Remedy, RoostError
from shared.identity import InstanceKey
from shared.manifest import StateManifest
from tests.support.blob_service import serving
from tests.support.fake_control import FakeControl, Owned
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, Store, running_mesh
from tests.support.small_disk import small_disk

OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"


async def refused(chat: AsyncChat, message: str, timeout: float = 2.0) -> RoostError:
    with pytest.raises(RoostError) as caught:
        await chat.send(message, timeout=timeout)
    assert caught.value.message
    return caught.value


async def version(mesh: Mesh, user: str) -> int:
    instance = await mesh.instance("probe", user)
    assert instance is not None
    return instance.version


async def test_fault_the_nodes_disk_is_full(tmp_path: Path) -> None:
    """There is one node only: nobody else can help."""
    with small_disk(tmp_path / "mesh" / "edge-north", "64m") as disk:
        async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh, mesh.client(OSLO) as client:
            await mesh.deploy(PROBE)
            async with client.attach("probe", "ana") as ana:
                await ana.send("append one")
                disk.fill()
                for message in ("append two", "lines"):  # one writes, the other doesn't
                    error = await refused(ana, message)
                    assert "No space left" in error.message, error
                    assert "full" in error.hint, error
                assert await version(mesh, "ana") == 1
                disk.free()
                reply = await ana.send("append two")
            assert (json.loads(reply.text), reply.receipt.version) == (["one", "two"], 2)


async def test_fault_a_full_node_is_left_for_another(tmp_path: Path) -> None:
    """The agent's files fit; it is the node that has no room for its copy of them."""
    with small_disk(tmp_path / "mesh" / "edge-north", "64m") as disk:
        async with running_mesh(tmp_path / "mesh", [NORTH, SOUTH]) as mesh, mesh.client(OSLO) as client:
            await mesh.deploy(PROBE)
            async with client.attach("probe", "ana") as ana:
                assert (await ana.send("append one")).receipt.node == "edge-north"
                disk.fill()
                reply = await ana.send("lines")
                assert (json.loads(reply.text), reply.receipt.node) == (["one"], "edge-south")
                assert (await ana.send("append two")).receipt.version == 3


async def test_fault_the_blob_stores_disk_is_full(tmp_path: Path) -> None:
    """What is not durable is not acknowledged; it is committed by itself once there is room. A small turn is
    durable in etcd alone."""
    blobs = tmp_path / "blobs"
    with small_disk(blobs, "16m") as disk:
        store = Store(f"file://{blobs}")
        async with running_mesh(tmp_path / "mesh", [NORTH], store=store) as mesh, mesh.client() as client:
            await mesh.deploy(PROBE)
            async with client.attach("probe", "ana") as ana:
                await ana.send("append one")
                disk.fill()
                assert (await ana.send("append two")).receipt.version == 2
                with pytest.raises(RoostError) as caught:
                    await ana.send("fill large 1", turn_id="t3", timeout=3.0)
                assert caught.value.remedy is Remedy.RETRY
                assert "t3" in caught.value.hint
                assert await version(mesh, "ana") == 2
                disk.free()
                assert (await ana.send("fill large 1", turn_id="t3")).receipt.version == 3
                assert json.loads((await ana.send("lines")).text) == ["one", "two"]
                assert not list((blobs / "incoming").glob("*")), "half-written blobs are removed"


async def test_fault_a_commit_gives_up_on_a_full_blob_store_and_says_why(tmp_path: Path) -> None:
    key = InstanceKey("default", "probe", "ana")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_bytes(os.urandom(1 << 20))
    with small_disk(tmp_path / "blobs", "4m") as disk:
        async with serving(open_blob_store(f"file://{tmp_path}/blobs")) as (_, blobs):
            chunks = ChunkStore(tmp_path / "chunks")
            state = StateStore(chunks, blobs, BundleStore(tmp_path / "bundles", chunks, blobs))
            control = FakeControl({key: Owned(epoch=1)})
            commits = Commits(state, control, upload_seconds=1.0)
            with LocalFiles(tmp_path / "state") as files:
                captured = await state.capture(files, None)
            manifest = StateManifest(str(key), 1, 1, captured.nodes).with_turn("t1", "done")
            disk.fill()
            with pytest.raises(RoostError) as caught:
                await commits.publish(key, captured, manifest, "t1", lambda: False)
            assert caught.value.reason is Reason.TURN_NOT_COMMITTED
            assert "No space left" in caught.value.message
            assert control.owned[key].version == 0
            disk.free()
            root, _ = await commits.publish(key, captured, manifest, "t1", lambda: False)
            assert (await state.load(key, 1, root)) == manifest


async def test_fault_the_blob_stores_disk_is_not_there_for_a_while(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh, mesh.client() as client:
        await mesh.deploy(PROBE)
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            (tmp_path / "blobs").rename(tmp_path / "away")
            assert (await ana.send("append two")).receipt.version == 2, "it is durable in etcd"
            turn = asyncio.create_task(ana.send("fill large 1"))
            await asyncio.sleep(1.5)
            assert not turn.done(), "no reply is acknowledged before it is durable"
            assert await version(mesh, "ana") == 2
            (tmp_path / "away").rename(tmp_path / "blobs")
            assert (await turn).receipt.version == 3


async def test_fault_bits_flip_in_the_nodes_own_copies(tmp_path: Path) -> None:
    """Nobody notices: they are fetched again from the blob store."""
    async with running_mesh(tmp_path, [NORTH]) as mesh, mesh.client() as client:
        await mesh.deploy(PROBE, idle_timeout='"300ms"')
        async with client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await ana.send("fill large 1")
        copies = [p for p in (mesh.data_dir("edge-north") / "daemon" / "chunks").glob("*/*") if p.is_file()]
        assert len(copies) > 5
        for copy in copies:
            data = copy.read_bytes()
            copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        await mesh.nodes["edge-north"].kill()
        await mesh.nodes["edge-north"].start()
        await mesh.wait_up("edge-north")
        async with client.attach("probe", "ana") as ana:
            reply = await ana.send("append two")
        assert (json.loads(reply.text), reply.receipt.version) == (["one", "two"], 3)
        assert reply.receipt.lost == ()

"""A node is emptied, stops, or comes back: its instances go where they fare better, between their turns."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path

from protos.v1 import admin_pb2, admin_pb2_grpc
from shared import rpc
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, CLOUD, NORTH, SOUTH, Mesh, running_mesh
from tests.system.test_moves import stream_of

OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"


async def drain(mesh: Mesh, node: str) -> admin_pb2.DrainReply:
    async with rpc.channel(mesh.addresses[0]) as channel:
        return await admin_pb2_grpc.AdminStub(channel).Drain(admin_pb2.DrainRequest(node=node), timeout=5.0)


async def test_a_node_is_emptied_while_turns_run_and_takes_its_own_again(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH], coordinators=2) as mesh, AsyncExitStack() as stack:
        await mesh.deploy(PROBE)
        client = await stack.enter_async_context(mesh.client(OSLO))
        chats = [await stack.enter_async_context(client.attach("probe", f"u{n}")) for n in range(6)]
        for chat in chats:
            await chat.send("append one")
        turns = [asyncio.create_task(chat.send("slow-append 2 two")) for chat in chats[:3]]
        async with stream_of(await stack.enter_async_context(client.attach("probe", "busy"))):
            assert (await drain(mesh, "edge-north")).live == 7

            async def empty() -> bool:
                return (await drain(mesh, "edge-north")).live == 0

            await eventually(empty, 40.0, "nothing runs on it")
            assert (await drain(mesh, "edge-north")).instances == 0
        for turn in turns:
            reply = await turn
            assert (reply.receipt.node, json.loads(reply.text)) == ("edge-north", ["one", "two"])
        for n, chat in enumerate(chats):
            reply = await chat.send("append three")
            assert (reply.receipt.node, reply.receipt.epoch) == ("edge-south", 2)
            assert json.loads(reply.text) == ["one", "two", "three"] if n < 3 else ["one", "three"]

        await mesh.drain("edge-north", undo=True)
        async with client.attach("probe", "new") as new:
            assert (await new.send("append one")).receipt.node == "edge-north"


async def test_nobody_waits_for_the_ttl_of_a_node_that_stops(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH], ttl=60.0) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 2 two"))
            await asyncio.sleep(0.4)
            await mesh.nodes["edge-north"].stop()
            assert (await turn).receipt.node == "edge-north", "it was finished"
            reply = await ana.send("append three", timeout=15.0)
            assert (reply.receipt.node, json.loads(reply.text)) == ("edge-south", ["one", "two", "three"])
            assert "goodbye" in mesh.coordinators[0].log()
            await mesh.nodes["edge-north"].start()
            await mesh.wait_up("edge-north")
            assert (await ana.send("append four")).receipt.node == "edge-south", "it is at home there now"


async def test_what_went_to_the_cloud_comes_back_when_its_edge_does(tmp_path: Path) -> None:
    async with running_mesh(
        tmp_path, [NORTH, CLOUD], coordinators=2, coordinator_toml='rebalance_after = "2s"'
    ) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await mesh.nodes["edge-north"].kill()
            assert (await ana.send("append two")).receipt.node == "cloud-1"
            await mesh.nodes["edge-north"].start()

            async def home() -> bool:
                instance = await mesh.instance("probe", "ana")
                return instance is not None and (instance.node, instance.phase) == ("edge-north", "live")

            await eventually(home, 30.0)
            reply = await ana.send("append three")
            assert json.loads(reply.text) == ["one", "two", "three"]
            assert (reply.receipt.node, reply.receipt.epoch, reply.receipt.resumed_from) == (
                "edge-north",
                3,
                "blobs",
            )
            instance = await mesh.instance("probe", "ana")
            assert instance is not None
            assert "back from the cloud" in instance.why

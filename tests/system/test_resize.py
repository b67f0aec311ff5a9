"""One instance gets another share of its node: at once, and wherever it goes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from shared import rpc
from shared.errors import Reason, RoostError, translated
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

PROBE = AGENTS / "probe"
KEY = common_pb2.InstanceKey(tenant="default", agent="probe", user="ana")
MIB = 1 << 20


async def resize(mesh: Mesh, reset: bool = False, **size: int) -> admin_pb2.ResizeReply:
    request = admin_pb2.ResizeRequest(key=KEY, size=common_pb2.Resources(**size), reset=reset)
    with translated(Reason.COORDINATOR_UNREACHABLE, "the coordinator"):
        async with rpc.channel(mesh.addresses[0]) as channel:
            return await admin_pb2_grpc.AdminStub(channel).Resize(request, timeout=10.0)


async def reserved(mesh: Mesh, node: str) -> Resources:
    (found,) = [n.reserved for n in (await mesh.status()).nodes if n.node.id == node]
    return Resources.from_proto(found)


async def test_a_size_is_had_at_once_and_kept_through_sleep_and_moves(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE, idle_timeout='"2s"')
        async with mesh.client((59.9, 10.7)) as client, client.attach("probe", "ana") as ana:
            with pytest.raises(RoostError, match="no instance"):
                await resize(mesh, memory_bytes=128 * MIB)
            process = (await ana.send("process")).text
            turn = asyncio.create_task(ana.send("slow-append 2 one"))
            reply = await resize(mesh, memory_bytes=200 * MIB, pids=40)
            assert Resources.from_proto(reply.size) == Resources(200 * MIB, 1000, 40)
            assert (reply.node, reply.running) == ("edge-north", True)
            assert (await reserved(mesh, "edge-north")).memory_bytes == 200 * MIB
            assert json.loads((await turn).text) == ["one"]
            assert (await ana.send("process")).text == process, "it went on"
            with pytest.raises(RoostError) as caught:
                await resize(mesh, memory_bytes=10 << 30)
            assert (caught.value.reason, bool(caught.value.hint)) == (Reason.NO_ROOM, True)
            with pytest.raises(RoostError, match="at least 16M"):
                await resize(mesh, memory_bytes=1 * MIB)
            assert (await ana.send("process")).text == process, "a refusal harms nothing"

            async def hibernated() -> bool:
                instance = await mesh.instance("probe", "ana")
                return instance is not None and instance.phase == "hibernated"

            await eventually(hibernated, 15.0)
            assert (await reserved(mesh, "edge-north")).memory_bytes == 0
            await ana.send("append two")
            assert (await reserved(mesh, "edge-north")).memory_bytes == 200 * MIB
            await mesh.drain("edge-north")
        async with mesh.client((59.9, 10.7)) as client, client.attach("probe", "ana") as ana:
            moved = await ana.send("append three")
            assert (moved.receipt.node, json.loads(moved.text)) == ("edge-south", ["one", "two", "three"])
            assert (await reserved(mesh, "edge-south")).memory_bytes == 200 * MIB
            await resize(mesh, reset=True)
            assert (await reserved(mesh, "edge-south")).memory_bytes == 64 * MIB
            assert json.loads((await ana.send("lines")).text) == ["one", "two", "three"]

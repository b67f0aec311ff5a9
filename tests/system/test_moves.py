"""An instance goes to another node between two of its turns, and none of them is lost or doubled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from protos.v1 import admin_pb2, admin_pb2_grpc, common_pb2
from roost.client import AsyncChat
from shared import rpc
from shared.errors import Reason, RoostError, translated
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

OSLO = (59.9, 10.7)
PROBE = AGENTS / "probe"


async def move(
    mesh: Mesh, node: str = "", user: str = "ana", turn: float = 10.0, now: bool = False, at: int = 0
) -> admin_pb2.Moved:
    key = common_pb2.InstanceKey(tenant="default", agent="probe", user=user)
    request = admin_pb2.MoveRequest(key=key, node=node, turn_ms=round(turn * 1000), now=now)
    with translated(Reason.COORDINATOR_UNREACHABLE, "the coordinator"):
        async with rpc.channel(mesh.addresses[at]) as channel:
            moving = admin_pb2_grpc.AdminStub(channel).Move(request, timeout=60.0)
            *_, last = [progress async for progress in moving]
    assert last.HasField("moved")
    return last.moved


class Stream:
    """Turns of one user, one after another, each of which appends a number."""

    def __init__(self, chat: AsyncChat) -> None:
        self.sent = 0
        self.nodes: list[str] = []
        self._chat = chat
        self._stop = asyncio.Event()

    async def run(self) -> None:
        while not self._stop.is_set():
            reply = await self._chat.send(f"append {self.sent}", timeout=40.0)
            self.sent += 1
            self.nodes.append(reply.receipt.node)
            assert reply.receipt.lost == ()
            assert json.loads(reply.text) == [str(n) for n in range(self.sent)], "none lost, none doubled"

    def stop(self) -> None:
        self._stop.set()


@asynccontextmanager
async def stream_of(chat: AsyncChat) -> AsyncIterator[Stream]:
    stream = Stream(chat)
    task = asyncio.create_task(stream.run())
    await eventually(lambda: stream.sent > 3 or task.done(), 20.0, "turns")
    try:
        yield stream
        seen = stream.sent
        await eventually(lambda: stream.sent > seen + 3 or task.done(), 40.0, "turns go on")
    finally:
        stream.stop()
        await task


async def test_under_a_stream_of_turns_to_and_fro(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH], coordinators=2) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            async with stream_of(ana) as stream:
                for i in range(6):
                    target = ("edge-south", "edge-north")[i % 2]
                    moved = await move(mesh, target, at=i % 2)
                    assert (moved.target, moved.epoch, moved.live, moved.trouble) == (target, i + 2, True, "")
                    assert 0 < moved.pause_ms < 2000
                    at = stream.sent
                    await eventually(lambda at=at: stream.sent > at + 2, 20.0)
                    assert stream.nodes[-1] == target
            instance = await mesh.instance("probe", "ana")
            assert instance is not None
            assert (instance.epoch, instance.version) == (7, stream.sent), "no turn was run for nothing"
            await _what_can_not_be_is_said_and_changes_nothing(mesh, ana)


async def _what_can_not_be_is_said_and_changes_nothing(mesh: Mesh, ana: AsyncChat) -> None:
    """It is on edge-north."""
    process = (await ana.send("process")).text
    with pytest.raises(RoostError, match="no instance"):
        await move(mesh, "edge-south", user="ben")
    await mesh.drain("edge-south")
    for node, reason in (("nowhere", Reason.NODE_UNKNOWN), ("edge-south", Reason.MOVE_GIVEN_UP)):
        with pytest.raises(RoostError) as caught:
            await move(mesh, node)
        assert caught.value.reason is reason
    await mesh.drain("edge-south", undo=True)
    assert (await move(mesh, "edge-north")).pause_ms == 0, "it is there"
    await mesh.nodes["edge-south"].kill()
    with pytest.raises(RoostError):
        await move(mesh, "edge-south")
    assert (await ana.send("process")).text == process


async def test_a_turn_that_runs_ends_first_or_the_move_is_given_up_or_it_is_run_again(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 2 two"))
            await asyncio.sleep(0.3)
            with pytest.raises(RoostError, match="did not end within") as caught:
                await move(mesh, "edge-south", turn=0.3)
            assert (caught.value.reason, bool(caught.value.hint)) == (Reason.MOVE_GIVEN_UP, True)
            moved = await move(mesh, "edge-south")
            assert turn.done(), "it ended first"
            assert ((await turn).receipt.node, moved.version) == ("edge-north", 2)
            assert json.loads((await ana.send("append three")).text) == ["one", "two", "three"]
            await eventually(lambda: not mesh.occupied("edge-north"), 5.0, "its jail killed")

            turn = asyncio.create_task(ana.send("slow-append 2 four"))
            await asyncio.sleep(0.5)
            assert (await move(mesh, "edge-north", now=True)).version == 3
            again = await turn
            assert (again.receipt.node, again.receipt.epoch) == ("edge-north", 3)
            assert json.loads(again.text) == ["one", "two", "three", "four"]


async def test_what_sleeps_moves_without_being_woken(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE, idle_timeout='"300ms"')
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")

            async def hibernated() -> bool:
                instance = await mesh.instance("probe", "ana")
                return instance is not None and instance.phase == "hibernated"

            await eventually(hibernated, 10.0)
            moved = await move(mesh)
            assert (moved.target, moved.live, moved.pause_ms) == ("edge-south", False, 0)
            assert await hibernated()
            reply = await ana.send("append two")
            assert (reply.receipt.node, json.loads(reply.text)) == ("edge-south", ["one", "two"])


@pytest.mark.parametrize(
    "victim", ["edge-north", *(pytest.param(v, marks=pytest.mark.faults) for v in ("edge-south", "c0"))]
)
async def test_kill_9_in_the_midst_of_a_move(tmp_path: Path, victim: str) -> None:
    """At several points of it, since each round kills a little later."""
    async with running_mesh(tmp_path, [NORTH, SOUTH], coordinators=2) as mesh:
        await mesh.deploy(PROBE)
        process = mesh.coordinators[0] if victim == "c0" else mesh.nodes[victim]
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            async with stream_of(ana) as stream:
                for pause in (0.02, 0.12):
                    where = stream.nodes[-1]
                    target = "edge-south" if where == "edge-north" else "edge-north"
                    moving = asyncio.create_task(move(mesh, target))
                    await asyncio.sleep(pause)
                    await process.kill()
                    await asyncio.gather(moving, return_exceptions=True)
                    at = stream.sent
                    await eventually(lambda at=at: stream.sent > at + 2, 40.0, "turns go on")
                    await process.start()
                    await mesh.wait_up("edge-north", "edge-south")

"""The main job on real parts: placed near, jailed, remembered, moved, and fenced."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from roost.client import AsyncChat
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, CLOUD, NORTH, SOUTH, TTL, Mesh, running_mesh

OSLO, MADRID = (59.9, 10.7), (40.4, -3.7)
PROBE = AGENTS / "probe"


async def lines(chat: AsyncChat) -> list[str]:
    answer: list[str] = json.loads((await chat.send("lines")).text)
    return answer


async def started(mesh: Mesh, user: str, timeout: float = 10.0) -> None:
    """Waits until the user's instance has been placed and runs."""

    async def live() -> bool:
        instance = await mesh.instance("probe", user)
        return instance is not None and instance.phase == "live"

    await eventually(live, timeout, f"an instance of {user}")


async def test_users_get_their_own_instance_near_them_and_are_remembered(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as north, mesh.client(MADRID) as south:
            async with north.attach("probe", "ana") as ana, south.attach("probe", "ben") as ben:
                first = await ana.send("append a1")
                assert (first.receipt.node, first.receipt.epoch, first.receipt.version) == (
                    "edge-north",
                    1,
                    1,
                )
                assert (first.receipt.resumed_from, first.receipt.lost) == ("new", ())
                assert "nearest" in first.why
                assert (await ben.send("append b1")).receipt.node == "edge-south"
                second = await ana.send("append a2")
                assert json.loads(second.text) == ["a1", "a2"]
                assert (second.receipt.version, second.receipt.resumed_from) == (2, "live")
                assert await lines(ben) == ["b1"]
        status = await mesh.status()
        assert {(n.node.id, n.state) for n in status.nodes} == {
            ("edge-north", "up"),
            ("edge-south", "up"),
            ("cloud-1", "up"),
        }


async def test_state_survives_hibernation(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE, idle_timeout='"500ms"')
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")

            async def hibernated() -> bool:
                instance = await mesh.instance("probe", "ana")
                return instance is not None and instance.phase == "hibernated"

            await eventually(hibernated, 10.0)
            await eventually(lambda: not mesh.occupied("edge-north"), 2.0, "no process is left of it")
            reply = await ana.send("append two")
            assert json.loads(reply.text) == ["one", "two"]
            assert (reply.receipt.node, reply.receipt.epoch) == ("edge-north", 1)
            assert (reply.receipt.resumed_from, reply.receipt.resumed_version) == ("disk", 1)


async def test_state_survives_a_move(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client:
            async with client.attach("probe", "ana") as ana:
                first = (await ana.send("append one")).receipt
            assert (first.node, first.epoch) == ("edge-north", 1)
            await mesh.drain("edge-north")
            async with client.attach("probe", "ana") as ana:
                reply = await ana.send("append two")
            assert json.loads(reply.text) == ["one", "two"]
            assert (reply.receipt.node, reply.receipt.epoch) == ("edge-south", 2)
            assert (reply.receipt.resumed_from, reply.receipt.resumed_version) == ("blobs", 1)
            await mesh.drain("edge-north", undo=True)
            await mesh.drain("edge-south")
            async with client.attach("probe", "ana") as ana:
                back = await ana.send("append three")
            assert json.loads(back.text) == ["one", "two", "three"]
            assert (back.receipt.node, back.receipt.epoch) == ("edge-north", 3)


async def test_kill_9_of_the_node_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client(OSLO) as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 1.5 two"))
            await asyncio.sleep(0.5)
            await mesh.nodes["edge-north"].kill()
            reply = await turn
            assert json.loads(reply.text) == ["one", "two"]
            assert (reply.receipt.node, reply.receipt.epoch, reply.receipt.version) == ("edge-south", 2, 2)
            # And then the other edge: the cloud, with everything.
            await mesh.nodes["edge-south"].kill()
            reply = await ana.send("append three")
            assert json.loads(reply.text) == ["one", "two", "three"]
            assert (reply.receipt.node, reply.receipt.epoch) == ("cloud-1", 3)


async def test_the_same_turn_sent_again_is_applied_once(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana:
                first = await ana.send("append one", turn_id="t-1")
                await ana.send("append two", turn_id="t-2")
                again = await ana.send("append one", turn_id="t-1")
                assert again.receipt.replayed
                assert again.text == first.text
            await mesh.nodes["edge-north"].kill()
            async with client.attach("probe", "ana") as ana:
                elsewhere = await ana.send("append one", turn_id="t-1")
                assert (elsewhere.text, elsewhere.receipt.replayed) == (first.text, True)
                assert elsewhere.receipt.node == "cloud-1"
                assert await lines(ana) == ["one", "two"]


async def test_a_client_that_leaves_in_the_middle_finds_its_turn_done(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana:
                turn = asyncio.create_task(ana.send("slow-append 1 one", turn_id="t-1"))
                await started(mesh, "ana")
                await asyncio.sleep(0.3)
                turn.cancel()
            async with client.attach("probe", "ana") as ana:
                reply = await ana.send("slow-append 1 one", turn_id="t-1")
                assert json.loads(reply.text) == ["one"]
                assert (reply.receipt.version, reply.receipt.replayed) == (1, False), "it was joined"
                assert await lines(ana) == ["one"]


async def test_a_commit_with_an_old_epoch_is_refused_and_its_jail_killed(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, mesh.client() as other:
            async with client.attach("probe", "ana") as ana, other.attach("probe", "ana") as elsewhere:
                await ana.send("append one")
                # While a turn runs on the edge, the instance is given to the cloud, and the edge not told.
                # All that stands between it and a second truth is the epoch of its commit.
                turn = asyncio.create_task(ana.send("slow-append 2 two", turn_id="t-2"))
                await asyncio.sleep(0.5)
                await mesh.take_away_silently("probe", "ana", "cloud-1")
                await eventually(lambda: "EPOCH_STALE" in mesh.nodes["edge-north"].log(), 10.0)
                moved = await turn  # refused on the edge; sent again by the client, and applied once
                assert (moved.receipt.node, moved.receipt.epoch) == ("cloud-1", 2)
                reply = await elsewhere.send("append three")
                assert json.loads(reply.text) == ["one", "two", "three"]
                assert (reply.receipt.node, reply.receipt.epoch) == ("cloud-1", 2)
                await eventually(lambda: not mesh.occupied("edge-north"), 5.0, "its jail killed")


async def test_an_instance_taken_away_in_the_middle_of_a_turn_ends_at_once(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 4 two"))
            await asyncio.sleep(0.5)
            await mesh.take_away("probe", "ana")
            await eventually(lambda: not mesh.occupied("edge-north"), 2.0, "its jail killed")
            moved = await turn
            assert json.loads(moved.text) == ["one", "two"]
            assert (moved.receipt.node, moved.receipt.epoch) == ("cloud-1", 2)


async def test_a_coordinator_that_stops_while_turns_are_committed_loses_none(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH], coordinators=2) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append t0")
            # Again and again, so that stops fall into fetches, uploads and commits too.
            for round in range(6):
                stopping = mesh.coordinators[round % 2]
                turn = asyncio.create_task(ana.send(f"append t{round + 1}", timeout=30.0))
                await asyncio.sleep(0.004 * round)
                await stopping.stop()
                assert json.loads((await turn).text) == [f"t{i}" for i in range(round + 2)]
                await stopping.start()
                await mesh.wait_up("edge-north")


async def test_a_node_frozen_past_its_ttl_commits_nothing_when_it_wakes(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD]) as mesh:
        await mesh.deploy(PROBE)
        edge = mesh.nodes["edge-north"]
        async with mesh.client() as client, mesh.client() as other:
            async with client.attach("probe", "ana") as ana, other.attach("probe", "ana") as elsewhere:
                await ana.send("append one")
                turn = asyncio.create_task(ana.send("slow-append 1 two", turn_id="t-2"))
                await asyncio.sleep(0.4)
                edge.suspend()
                try:
                    reply = await elsewhere.send("append three")
                    assert (reply.receipt.node, reply.receipt.epoch) == ("cloud-1", 2)
                finally:
                    edge.resume()
                moved = await turn
                assert moved.receipt.node == "cloud-1"
                assert await lines(elsewhere) == ["one", "three", "two"]
                await eventually(lambda: not mesh.occupied("edge-north"), 10.0, "its jail killed")
                instance = await mesh.instance("probe", "ana")
                assert instance is not None
                assert (instance.node, instance.epoch) == ("cloud-1", 2)


async def test_killing_a_coordinator_or_restarting_etcd_loses_nothing(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD], coordinators=2) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 1 two"))
            await asyncio.sleep(0.3)
            await mesh.coordinators[0].kill()
            assert json.loads((await turn).text) == ["one", "two"]
            turn = asyncio.create_task(ana.send("slow-append 1 three"))
            await asyncio.sleep(0.3)
            await mesh.etcd.restart()
            assert json.loads((await turn).text) == ["one", "two", "three"]
            await asyncio.sleep(TTL * 1.5)  # long enough for a wrong mind to be made up
            reply = await ana.send("lines")
            assert json.loads(reply.text) == ["one", "two", "three"]
            assert (reply.receipt.node, reply.receipt.epoch) == ("edge-north", 1)


async def test_a_daemon_that_dies_finds_its_instances_again(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana, client.attach("probe", "ben") as ben:
                await ana.send("append a1")
                process = (await ana.send("process")).text
                await ben.send("append b1")
                turn = asyncio.create_task(ben.send("slow-append 1 b2"))
                await asyncio.sleep(0.3)
                mesh.daemon("edge-north").kill()
                # Ben's was in the middle of a turn: started again from what was committed.
                assert json.loads((await turn).text) == ["b1", "b2"]
                # Ana's was between turns: the very same process goes on.
                reply = await ana.send("append a2")
                assert json.loads(reply.text) == ["a1", "a2"]
                assert reply.receipt.resumed_from == "live"
                assert (await ana.send("process")).text == process
                assert (reply.receipt.node, reply.receipt.epoch) == ("edge-north", 1)


async def test_a_node_that_was_killed_and_restarted_resumes_from_its_disk(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            await mesh.between_turns("edge-north")
            await mesh.nodes["edge-north"].kill()
            await mesh.nodes["edge-north"].start()
            reply = await ana.send("append two")
            assert json.loads(reply.text) == ["one", "two"]
            assert (reply.receipt.resumed_from, reply.receipt.resumed_version) == ("disk", 1)


async def test_one_instance_cannot_see_another(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana, client.attach("probe", "ben") as ben:
                await ana.send("append secret")
                state = mesh.data_dir("edge-north") / "jails"
                assert any((jail / "state" / "lines").exists() for jail in state.iterdir())
                with pytest.raises(RoostError, match="No such file") as caught:
                    await ben.send(f"ls {state}")
                assert caught.value.reason is Reason.TURN_FAILED
                assert json.loads((await ben.send("ls /state")).text) == []
                visible = [p for p in json.loads((await ben.send("ls /proc")).text) if p.isdecimal()]
                assert len(visible) == 1  # itself: not even its init

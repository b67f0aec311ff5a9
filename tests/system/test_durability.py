"""What replies are worth, on real parts: nodes are killed with `kill -9`, coordinators stop in a commit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from roost.client import Delta, Event, Reply, Waiting
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, CLOUD, NORTH, Mesh, running_mesh

PROBE = AGENTS / "probe"
TTL = 9.0  # so that a node trusts itself for longer than these tests keep its coordinator from answering


async def committed(mesh: Mesh, version: int) -> None:
    async def there() -> bool:
        instance = await mesh.instance("probe", "ana")
        return instance is not None and instance.version == version

    await eventually(there, 20.0, f"version {version} is committed")


async def begun(mesh: Mesh, line: str) -> None:
    """Waits until an agent on the edge has written this line, which is in the middle of its turn."""

    def there() -> bool:
        files = mesh.data_dir("edge-north").glob("jails/*/state/lines")
        return any(line in file.read_text().split() for file in files)

    await eventually(there, 20.0, f"the turn of {line}")


async def test_what_async_gave_out_and_a_node_took_along_is_said_to_be_lost(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH, CLOUD], ttl=TTL) as mesh:
        await mesh.deploy(PROBE, durability='"async"')
        async with mesh.client() as client, mesh.client() as other:
            async with client.attach("probe", "ana") as ana, other.attach("probe", "ana") as elsewhere:
                first = await ana.send("append one")
                assert (first.receipt.version, first.receipt.durable) == (1, False)
                await committed(mesh, 1)
                assert (await elsewhere.send("lines")).receipt.lost == ()
                await committed(mesh, 2)
                mesh.coordinators[0].suspend()
                second = await ana.send("append two")
                assert json.loads(second.text) == ["one", "two"]
                assert (second.receipt.version, second.receipt.durable) == (3, False)
                await mesh.nodes["edge-north"].kill()
                await mesh.coordinators[0].kill()  # and with it what it had been sent
                await mesh.coordinators[0].start()
                third = await ana.send("append three", timeout=90.0)
                assert json.loads(third.text) == ["one", "three"]
                assert (third.receipt.node, third.receipt.resumed_version) == ("cloud-1", 2)
                assert third.receipt.lost == (
                    "version 3, which edge-north acknowledged before it was committed",
                )
                assert (await ana.send("append four")).receipt.lost == ()
                assert (await elsewhere.send("append five")).receipt.lost == (), "it was told of none of it"


async def test_strict_shows_nothing_of_a_reply_before_its_commit(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH], ttl=TTL) as mesh:
        await mesh.deploy(PROBE, durability='"strict"')
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            mesh.coordinators[0].suspend()
            try:
                stream = ana.stream("say secret")
                first = asyncio.ensure_future(anext(stream))
                await asyncio.wait({first}, timeout=2.0)
                assert not first.done()
            finally:
                mesh.coordinators[0].resume()
            reply = await first
            assert isinstance(reply, Reply)
            assert (reply.text, reply.receipt.durable) == ("secret", True)
            await stream.aclose()


async def test_a_turn_is_cancelled_in_its_middle_and_another_ends_at_its_deadline(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE, turn_timeout='"60s"')
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            turn = asyncio.create_task(ana.send("slow-append 50 two"))
            await begun(mesh, "two")
            ana.cancel()
            with pytest.raises(RoostError) as caught:
                await turn
            assert caught.value.reason is Reason.TURN_CANCELLED
            reply = await ana.send("lines")
            assert json.loads(reply.text) == ["one"]
            assert (reply.receipt.resumed_from, reply.receipt.lost) == ("disk", ()), "its process was ended"
            with pytest.raises(RoostError) as caught:
                await ana.send("slow-append 50 three", timeout=3.0)
            assert caught.value.reason is Reason.TURN_DEADLINE
            assert json.loads((await ana.send("append four")).text) == ["one", "four"]


async def test_two_clients_of_one_instance(tmp_path: Path) -> None:
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(PROBE)
        async with mesh.client() as client, mesh.client() as other:
            async with client.attach("probe", "ana") as ana, other.attach("probe", "ana") as too:
                await ana.send("append one")
                turn = asyncio.create_task(ana.send("slow-append 2 two", turn_id="t-2"))
                await begun(mesh, "two")
                joined = asyncio.create_task(events(too.stream("slow-append 2 two", turn_id="t-2")))
                waited = asyncio.create_task(waits(mesh))
                assert json.loads((await turn).text) == ["one", "two"]
                assert (await joined)[-1] == await turn, "one turn, one reply, one receipt"
                said = await waited
                assert Waiting("another turn is under way") in said
                assert Delta("three") in said
                assert next(event for event in said if isinstance(event, Reply)).receipt.version == 3
                # A connection that breaks cancels nothing: the turn is joined over another.
                turn = asyncio.create_task(ana.send("slow-append 2 four", turn_id="t-4"))
                await begun(mesh, "four")
                turn.cancel()
                again = await too.send("slow-append 2 four", turn_id="t-4")
                assert json.loads(again.text) == ["one", "two", "four"]
                assert (again.receipt.version, again.receipt.replayed) == (4, False)


async def waits(mesh: Mesh) -> list[Event]:
    async with mesh.client() as third, third.attach("probe", "ana") as chat:
        return await events(chat.stream("say three"))


async def events(stream: AsyncGenerator[Event, None]) -> list[Event]:
    async with aclosing(stream) as all_of_it:
        return [event async for event in all_of_it]

"""Calls that turns make outside, on real nodes that die in the middle: none is lost, and none made twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from protos.v1 import admin_pb2, admin_pb2_grpc, effects_pb2
from roost.client import AsyncChat
from shared import rpc
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.cli import Cli
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, Mesh, NodeSpec, running_mesh
from tests.support.web import Web, running_web

# A message is a list of steps: [name, repeat, seconds that it takes]. What is done asks a server outside, the
# one thing that all runs share. "pause" is no call: it only takes its time.
MODULE = """
import json, time, urllib.request
from roost import Agent

agent = Agent()
opener = urllib.request.build_opener()

def done(name, seconds, key=""):
    opener.open(f"http://shop.roost/{name}?{key}", timeout=20).close()
    time.sleep(seconds)
    return {"made": name}

@agent.turn
def shop(turn):
    results = []
    for name, repeat, seconds in json.loads(turn.message):
        if name == "pause":
            turn.say("paused")
            time.sleep(seconds)
        else:
            results.append(turn.call(name, done, name, seconds, repeat=repeat))
    turn.state["turns"] = turn.state.get("turns", 0) + 1
    return json.dumps([turn.state["turns"], results])
"""


@dataclass
class World:
    mesh: Mesh
    web: Web
    cli: Cli

    def made(self, name: str) -> list[str]:
        """The keys of the calls of this name that came to the server."""
        targets = [seen.target.strip("/").partition("?") for seen in self.web.seen]
        return [key for target, _, key in targets if target == name]

    async def begun(self, name: str, times: int = 1) -> None:
        await eventually(lambda: len(self.made(name)) == times, 10.0, f"{name} {times} times")

    async def effects(self, user: str = "ana") -> dict[str, str]:
        """The states of calls of turns that are not committed, by name."""
        request = admin_pb2.EffectsRequest(key=InstanceKey("default", "shop", user).to_proto())
        async with rpc.channel(self.mesh.addresses[-1]) as channel:
            reply = await admin_pb2_grpc.AdminStub(channel).Effects(request, timeout=5.0)
        return {
            call.name: effects_pb2.CallState.Name(call.state) for turn in reply.turns for call in turn.calls
        }

    async def resolve(self, *answer: str, user: str = "ana") -> dict[str, tuple[str, str]]:
        ran = await self.cli.run("effects", "shop", "--user", user, "--json", "--resolve", *answer)
        assert ran.code == 0, ran.stderr
        calls = [call for turn in ran.json["turns"] for call in turn["calls"]]
        return {call["name"]: (call["state"], call["result"]) for call in calls}

    async def kill_agent(self, node: str) -> None:
        """kill -9 of the agent's process, and of nothing else."""
        states = [
            self.mesh.data_dir(node) / "jails" / used / "state" for used in self.mesh.used_directories(node)
        ]
        uids = {state.stat().st_uid for state in states}
        processes = [p for p in self.mesh.nodes[node].tree() if p.uids().real in uids]
        assert len(processes) == 1, processes
        psutil.Process(processes[0].pid).kill()


@asynccontextmanager
async def running(directory: Path, *nodes: NodeSpec, coordinators: int = 1) -> AsyncIterator[World]:
    more = '[egress]\nprivate_networks = ["127.0.0.0/8"]\n'
    root = directory / "shop"
    root.mkdir()
    async with running_web() as web:
        (root / "shop.py").write_text(MODULE)
        (root / "agent.toml").write_text(
            '[agent]\nname = "shop"\n[run]\nentry = "shop:agent"\nturn_timeout = "30s"\n'
            f'[[network.upstream]]\nname = "shop"\nurl = "http://127.0.0.1:{web.port}"\n'
        )
        specs = [replace(node, more=more) for node in nodes]
        async with running_mesh(directory / "mesh", specs, coordinators=coordinators) as mesh:
            await mesh.deploy(root)
            yield World(mesh, web, Cli(mesh.addresses))


def steps(*steps: list[object]) -> str:
    return json.dumps(steps)


async def uncertain(turn: asyncio.Task[Any] | Any) -> RoostError:
    with pytest.raises(RoostError) as caught:
        await turn
    assert caught.value.reason is Reason.EFFECT_UNCERTAIN, caught.value
    return caught.value


async def send(chat: AsyncChat, message: str, turn_id: str) -> tuple[int, list[dict[str, Any]]]:
    turns, results = json.loads((await chat.send(message, turn_id=turn_id)).text)
    return turns, results


async def test_kill_9_in_a_never_call_parks_the_turn_until_somebody_says(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, NORTH) as world, world.mesh.client() as client:
        async with client.attach("shop", "ana") as ana:
            await send(ana, steps(["first", "never", 0]), "t-0")
            pay = steps(["look", "safe", 0], ["pay", "never", 1.5])
            turn = asyncio.create_task(ana.send(pay, turn_id="t-1"))
            await world.begun("pay")
            await world.kill_agent("edge-north")
            assert "'pay' of turn t-1" in (await uncertain(turn)).message
            await uncertain(ana.send(pay, turn_id="t-1"))
            assert len(world.made("pay")) == 1
            assert len(world.made("look")) == 1, "what a run did before a recorded call is known, too"
            instance = await world.mesh.instance("shop", "ana")
            assert instance is not None
            assert instance.parked == "pay (turn t-1)"
            assert "pay (turn t-1)" in (await world.cli.run("status")).stdout
            assert await world.effects() == {"look": "DONE", "pay": "UNCERTAIN"}
            # Other turns go on meanwhile.
            assert (await send(ana, steps(["other", "keyed", 0]), "t-2"))[0] == 2
            assert (await world.resolve("pay", "not-done"))["pay"] == ("not_made", "")
            turns, results = await send(ana, pay, "t-1")
            assert (turns, results) == (3, [{"made": "look"}, {"made": "pay"}])
            assert len(world.made("pay")) == 2, "once more, as a person said"
            assert await world.effects() == {}
            instance = await world.mesh.instance("shop", "ana")
            assert instance is not None
            assert instance.parked == ""
            # The daemon's death is no different.
            turn = asyncio.create_task(ana.send(steps(["fax", "never", 3]), turn_id="t-3"))
            await world.begun("fax")
            world.mesh.daemon("edge-north").kill()
            assert "'fax' of turn t-3" in (await uncertain(turn)).message
            assert len(world.made("fax")) == 1


async def test_kill_9_of_the_node_in_the_middle_of_calls(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH, CLOUD) as world, world.mesh.client() as client:
        async with (
            client.attach("shop", "ana") as ana,
            client.attach("shop", "ben") as ben,
            client.attach("shop", "cleo") as cleo,
        ):
            in_keyed = steps(["pay-a", "never", 0], ["mail-a", "keyed", 6])
            between = steps(["pay-b", "never", 0], ["mail-b", "keyed", 0], ["pause", "", 9])
            in_never = steps(["pay-c", "never", 9])
            turns = [
                asyncio.create_task(chat.send(message, turn_id="t-1"))
                for chat, message in ((ana, in_keyed), (ben, between), (cleo, in_never))
            ]

            async def all_there() -> bool:
                recorded = await world.effects("ben") == {"pay-b": "DONE", "mail-b": "DONE"}
                return recorded and bool(world.made("mail-a")) and bool(world.made("pay-c"))

            await eventually(all_there, 20.0)
            await world.mesh.nodes["edge-north"].kill()
            # In a never-call: nobody knows, until somebody says.
            await uncertain(turns[2])
            settled = await world.resolve("t-1:0", "done", "--result", '{"receipt": 5}', user="cleo")
            assert settled == {"pay-c": ("done", '{"receipt":5}')}
            assert await send(cleo, in_never, "t-1") == (1, [{"receipt": 5}])
            # In a keyed call: made again with the same key. After results, before the commit: none is.
            for turn, name in ((turns[0], "a"), (turns[1], "b")):
                reply = await turn
                assert reply.receipt.node == "cloud-1"
                assert json.loads(reply.text) == [1, [{"made": f"pay-{name}"}, {"made": f"mail-{name}"}]]
            first, second = world.made("mail-a")
            assert first == second != ""
            counts = {name: len(world.made(name)) for name in ("pay-a", "pay-b", "mail-b", "pay-c")}
            assert set(counts.values()) == {1}, counts
            for user in ("ana", "ben", "cleo"):
                assert await world.effects(user) == {}


async def test_who_lost_the_instance_begins_no_call(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH, CLOUD) as world, world.mesh.client() as client:
        async with client.attach("shop", "ana") as ana:
            await send(ana, steps(), "t-0")
            message = steps(["pause", "", 1.5], ["pay", "never", 0], ["mail", "keyed", 0])
            turn = asyncio.create_task(ana.send(message, turn_id="t-1"))
            await asyncio.sleep(0.5)
            await world.mesh.take_away_silently("shop", "ana", "cloud-1")
            reply = await turn
            assert (reply.receipt.node, reply.receipt.epoch) == ("cloud-1", 2)
            assert (len(world.made("pay")), len(world.made("mail"))) == (1, 1)
            assert "EPOCH_STALE" in world.mesh.nodes["edge-north"].log()


async def test_a_call_outlives_the_death_of_its_coordinator_and_a_restart_of_etcd(tmp_path: Path) -> None:
    async with running(tmp_path, NORTH, coordinators=2) as world, world.mesh.client() as client:
        async with client.attach("shop", "ana") as ana:
            message = steps(["pay", "never", 1], ["mail", "never", 1])
            turn = asyncio.create_task(ana.send(message, turn_id="t-1"))
            await world.begun("pay")
            await world.mesh.coordinators[0].kill()
            await world.begun("mail")
            await world.mesh.etcd.restart()
            assert json.loads((await turn).text) == [1, [{"made": "pay"}, {"made": "mail"}]]
            assert (len(world.made("pay")), len(world.made("mail"))) == (1, 1)

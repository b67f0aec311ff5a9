"""Turns that timers start, on a real mesh with nobody attached: once and never early, whatever dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from protos.v1 import timers_pb2
from roost.client import AsyncClient
from shared.errors import Reason, RoostError
from tests.support.cli import Cli
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, Mesh, running_mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "reminder"

# A message is arguments of wake_in as JSON, [[seconds, message, name], ...]. The reply tells which turns
# timers have started. Those run as long as their message says; "fail" fails.
MODULE = """
import json, time
from roost import Agent

agent = Agent()

@agent.turn
def clock(turn):
    ran = turn.state.setdefault("ran", [])
    if turn.timer:
        if turn.message == "fail":
            raise ValueError("told to")
        ran.append([turn.timer, turn.id, time.time()])
        time.sleep(float(turn.message))
        return "ran " + turn.timer
    for seconds, message, name in json.loads(turn.message):
        if seconds is None:
            turn.cancel_wake(name)
        else:
            turn.wake_in(seconds, message, name=name)
            if message == "never":
                raise ValueError("told to")
    return json.dumps([time.time(), ran])
"""


async def deploy(mesh: Mesh, directory: Path, run: str = "") -> None:
    root = directory / "clock"
    root.mkdir()
    (root / "clock.py").write_text(MODULE)
    (root / "agent.toml").write_text(f'[agent]\nname = "clock"\n[run]\nentry = "clock:agent"\n{run}\n')
    await mesh.deploy(root)


async def ask(
    client: AsyncClient, *timers: tuple[float | None, str, str], user: str = "ana"
) -> tuple[float, Any]:
    """The agent's time, and which turns timers have started until then."""
    async with client.attach("clock", user) as chat:
        now, ran = json.loads((await chat.send(json.dumps(timers))).text)
    return now, ran


async def timers(mesh: Mesh, user: str = "ana") -> dict[str, timers_pb2.TimerStatus]:
    instance = await mesh.instance("clock", user)
    return {timer.name: timer for timer in instance.timers} if instance else {}


async def wait_until_none(mesh: Mesh, timeout: float = 20.0, user: str = "ana") -> None:
    async def none() -> bool:
        return not await timers(mesh, user)

    await eventually(none, timeout, "no timer is left")


async def test_a_timer_wakes_what_hibernates_once_and_not_early(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh, mesh.client() as client:
        await deploy(mesh, tmp_path, 'idle_timeout = "500ms"')
        set_at, _ = await ask(client, (3.0, "0", "tea"), (1000.0, "0", "old"), (1.0, "fail", "bad"))
        assert sorted(await timers(mesh)) == ["bad", "old", "tea"]
        with pytest.raises(RoostError) as caught:
            await ask(client, (1.0, "never", "never"))
        assert caught.value.reason is Reason.TURN_FAILED
        await ask(client, (1000.0, "0", "new"), (None, "", "old"))

        async def failed() -> bool:
            return bool((await timers(mesh))["bad"].error)

        await eventually(failed, 10.0)
        bad = (await timers(mesh))["bad"]
        assert (bad.attempts, bad.failed, bad.error.startswith("TURN_FAILED")) == (1, False, True)
        told = (await Cli(mesh.addresses).run("status")).stdout
        assert "bad" in told
        assert "TURN_FAILED" in told

        async def ran() -> bool:
            return "tea" not in await timers(mesh)

        await eventually(ran, 15.0)
        await eventually(lambda: "timer tea ran" in mesh.nodes["edge-north"].log(), 5.0, "it is logged")
        _, turns = await ask(client, (None, "", "bad"), (None, "", "new"))
        assert [name for name, _, _ in turns] == ["tea"]
        assert turns[0][2] >= set_at + 3.0
        assert await timers(mesh) == {}
        with pytest.raises(RoostError) as caught:
            await ask(client, *((1000.0, "0", f"n{n}") for n in range(17)))
        assert caught.value.reason is Reason.TIMER_LIMIT
        assert await timers(mesh) == {}


async def test_timers_outlive_their_node_and_a_turn_that_is_cut_off_is_applied_once(
    tmp_path: Path,
) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh, mesh.client() as client:
        await deploy(mesh, tmp_path)
        await ask(client, (1.5, "4", "long"), (3.0, "0", "short"))

        async def begun() -> bool:
            return (await timers(mesh))["long"].attempts == 1

        await eventually(begun, 10.0)
        await asyncio.sleep(0.5)
        await mesh.nodes["edge-north"].kill()
        await wait_until_none(mesh, 40.0)
        instance = await mesh.instance("clock", "ana")
        assert instance is not None
        assert instance.node == "cloud-1"
        _, turns = await ask(client)
        assert sorted(name for name, _, _ in turns) == ["long", "short"]


async def test_a_timer_that_falls_due_while_no_coordinator_runs_is_late_and_not_lost(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH], coordinators=2) as mesh, mesh.client() as client:
        await deploy(mesh, tmp_path)
        await ask(client, (2.0, "0", "tea"))
        for coordinator in mesh.coordinators:
            await coordinator.kill()
        await asyncio.sleep(2.5)
        for coordinator in mesh.coordinators:
            await coordinator.start()
        await mesh.wait_up("edge-north")
        await wait_until_none(mesh)
        set_at, turns = await ask(client, (2.0, "1", "again"))
        assert [name for name, _, _ in turns] == ["tea"]
        # One coordinator less, and nobody's timer waits for it.
        await mesh.coordinators[0].kill()
        mesh.addresses.reverse()
        await wait_until_none(mesh, 30.0)
        _, turns = await ask(client)
        assert [name for name, _, _ in turns] == ["tea", "again"]
        assert turns[1][2] >= set_at + 2.0


async def test_many_that_fall_due_at_once_all_run_once(tmp_path: Path) -> None:
    users = [f"u{n}" for n in range(20)]
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh, mesh.client() as client:
        await deploy(mesh, tmp_path, 'idle_timeout = "1s"\n[resources]\nmemory = "48M"\ncpu = 0.2')
        await mesh.deploy(EXAMPLE)
        for user in users:
            await ask(client, (2.0, "0.2", "tea"), user=user)
        async with client.attach("reminder", "ana") as ana:
            assert (await ana.send("in 1 drink water")).text == "I will remind you in 1 s."
        for user in users:
            await wait_until_none(mesh, 60.0, user)
        for user in users[::5]:
            _, turns = await ask(client, user=user)
            assert [name for name, _, _ in turns] == ["tea"]
        log = mesh.nodes["edge-north"].log()
        assert log.count("timer tea ran") == len(users)
        async with client.attach("reminder", "ana") as ana:
            assert (await ana.send("list")).text.endswith("drink water")

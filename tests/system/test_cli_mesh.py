"""`roost up` with the real daemons: a whole mesh on this machine, used, broken and stopped as people do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from roost.up import record
from roost.up.processes import started_at
from tests.support.eventually import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"


class Here:
    """The `roost` command with its data in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.data = home / "roost" / "up"
        self._env = {k: v for k, v in os.environ.items() if k != "ROOST_COORDINATORS"}
        self._env["XDG_DATA_HOME"] = str(home)

    async def start(self, *args: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "roost.cli.main",
            *args,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )

    async def run(self, *args: str, code: int = 0) -> str:
        process = await self.start(*args)
        async with asyncio.timeout(100):
            out, err = await process.communicate()
        assert process.returncode == code, f"{out.decode()}\n{err.decode()}"
        return out.decode() + err.decode()

    async def say(self, message: str, near: str = "59.9,10.8") -> Any:
        told = await self.run("chat", "chef", "--user", "ana", "--near", near, "--message", message, "--json")
        return json.loads(told)

    def pid(self, name: str) -> int:
        running = record.read(self.data)
        assert running is not None
        return next(process.pid for process in running.processes if process.name == name)


@pytest.fixture
async def here(tmp_path: Path) -> AsyncIterator[Here]:
    here = Here(tmp_path)
    yield here
    await here.run("down")


async def test_up_deploy_chat_kill_chat_down_and_up_again(here: Here) -> None:
    assert "Roost is up." in await here.run("up", "--detach")
    assert "runs on this machine already" in await here.run("up", code=1)
    nodes = json.loads(await here.run("status", "--json"))["nodes"]
    assert sorted((n["node"]["id"], n["state"]) for n in nodes) == [
        ("cloud-1", "up"),
        ("edge-north", "up"),
        ("edge-south", "up"),
    ]
    await here.run("deploy", str(EXAMPLES / "chef"))
    first = await here.say("I'm vegan. I have 3 lemons.")
    assert first["receipt"]["node"] == "edge-north"

    os.kill(here.pid("edge-north"), signal.SIGKILL)
    moved = await here.say("what do you know about me?")
    assert moved["reply"] == "Diet: vegan. Pantry: 3 lemons."
    assert moved["receipt"]["node"] == "edge-south"
    assert moved["receipt"]["epoch"] == first["receipt"]["epoch"] + 1
    assert "edge-north was ended by SIGKILL" in await here.run("logs", "up")

    assert "Roost is down." in await here.run("down")
    assert "Nothing to stop" in await here.run("down")
    await here.run("up", "--detach")
    again = await here.say("what do you know about me?")
    assert (again["reply"], again["receipt"]["lost"]) == (moved["reply"], [])


async def test_a_killed_node_leaves_nothing_when_the_mesh_is_down(here: Here) -> None:
    """What it had is counted before and after, as by every system test."""
    await here.run("up", "--detach")
    await here.run("deploy", str(EXAMPLES / "chef"))
    await here.say("hello")
    os.kill(here.pid("edge-north"), signal.SIGKILL)
    await here.run("down")


async def test_when_up_is_killed_all_that_it_ran_ends(here: Here) -> None:
    await here.run("up", "--detach")
    running = record.read(here.data)
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    pids = [process.pid for process in running.processes]
    await eventually(lambda: not any(started_at(pid) for pid in pids), 30, "all have ended")
    await here.run("up", "--detach")


async def test_an_interrupt_stops_it_in_the_foreground(here: Here) -> None:
    process = await here.start("up")
    assert process.stdout is not None
    await asyncio.wait_for(process.stdout.readuntil(b"Ctrl-C"), 60)
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 60) == 0
    assert record.read(here.data) is None


async def test_what_scripts_rely_on(here: Here) -> None:
    await here.run("up", "--detach")
    await here.run("deploy", str(EXAMPLES / "chef"))
    reply = await here.say("I'm vegan and I have 500 g rice")
    assert set(reply) >= {"reply", "receipt", "turn_id", "why"}
    assert reply["receipt"]["lost"] == []
    ask = (
        "chat",
        "chef",
        "--user",
        "ana",
        "--message",
        "What do you know about me?",
        "--turn-id",
        "t-1",
        "--json",
    )
    first, again = [json.loads(await here.run(*ask)) for _ in range(2)]
    assert "rice" in first["reply"]
    assert again["reply"] == first["reply"]
    assert [first["receipt"]["replayed"], again["receipt"]["replayed"]] == [False, True]

    status = json.loads(await here.run("status", "--json"))
    (instance,) = status["instances"]
    assert (instance["key"]["user"], instance["node"], instance["epoch"]) == ("ana", "edge-north", 1)
    assert "edge-north" in await here.run("status")
    assert "edge-south" in await here.run("nodes")
    assert "edge-north" in await here.run("logs", "edge-north")

    for arguments, reason in (
        (("chat", "nobody", "--user", "ana", "--message", "hi"), "AGENT_UNKNOWN"),
        (("chat", "chef", "--user", "a/b", "--message", "hi"), "BAD_REQUEST"),
        (("deploy", "docs"), "AGENT_INVALID"),
    ):
        process = await here.start(*arguments, "--json")
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 1, arguments
        assert json.loads(out)["error"]["reason"] == reason
        assert "hint:" in err.decode()
        assert "Traceback" not in err.decode()
    await here.run("chat", "chef", code=2)
    assert "hint:" in await here.run("drain", "no-such-node", code=1)

    async def all_heard() -> bool:
        nodes = json.loads(await here.run("nodes", "--json"))["nodes"]
        return {peer for node in nodes for peer in node["peers"]} == {"edge-north", "edge-south", "cloud-1"}

    await eventually(all_heard, 15.0, "nodes that hear each other over mDNS")

    await here.run("drain", "edge-north")
    moved = await here.say("What do you know about me?")
    assert (moved["receipt"]["node"], moved["receipt"]["epoch"]) == ("edge-south", 2)
    await here.run("down")
    assert "COORDINATOR_UNREACHABLE" in await here.run("status", "--json", code=1)

"""`roost up` and the commands that scripts rely on, against real daemons."""

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

from tests.support.eventually import eventually
from tests.support.process import ROOT


class Cli:
    """The `roost` command with its data in a directory of its own."""

    def __init__(self, data: Path) -> None:
        self._env = {**os.environ, "XDG_DATA_HOME": str(data), "COLUMNS": "200"}

    async def run(self, *arguments: str, within: float = 60.0) -> tuple[int, str, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "roost.cli.main", *arguments),
            cwd=ROOT,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(within):
            out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()

    async def ok(self, *arguments: str) -> str:
        code, out, err = await self.run(*arguments)
        assert code == 0, out + err
        return out

    async def json(self, *arguments: str) -> Any:
        return json.loads(await self.ok(*arguments, "--json"))


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    cli = Cli(tmp_path)
    try:
        yield cli
    finally:
        await cli.run("down")


async def test_up_deploy_chat_status_down(cli: Cli, tmp_path: Path) -> None:
    assert "Roost is up" in await cli.ok("up", "--detach")
    code, _, err = await cli.run("up", "--detach")
    assert code == 1
    assert "already" in err

    await cli.ok("deploy", "examples/chef")
    chat = ("chat", "chef", "--user", "ana", "--near", "59.9,10.7", "--message")
    reply = await cli.json(*chat, "I'm vegan and I have 500 g rice")
    assert set(reply) >= {"reply", "receipt", "turn_id", "why"}
    assert reply["receipt"]["node"] == "edge-north"
    assert reply["receipt"]["lost"] == []
    again = await cli.json(*chat, "What do you know about me?", "--turn-id", "t-1")
    assert "rice" in again["reply"]
    repeated = await cli.json(*chat, "What do you know about me?", "--turn-id", "t-1")
    assert repeated["receipt"]["replayed"]
    assert repeated["reply"] == again["reply"]

    status = await cli.json("status")
    assert {n["id"]: n["role"] for n in status["nodes"]} == {
        "edge-north": "edge",
        "edge-south": "edge",
        "cloud-1": "cloud",
    }
    (instance,) = status["instances"]
    assert (instance["user"], instance["node"], instance["epoch"]) == ("ana", "edge-north", 1)
    assert "edge-north" in await cli.ok("status")
    assert "edge-south" in await cli.ok("nodes")
    assert await cli.ok("logs", "edge-north")

    # Those of the same site have found each other over mDNS, on loopback.
    async def all_heard() -> bool:
        heard = {p for n in (await cli.json("status"))["nodes"] for p in n["peers"]}
        return heard == {"edge-north", "edge-south", "cloud-1"}

    await eventually(all_heard, 15.0, "nodes that hear each other")

    for arguments, reason in (
        (("chat", "nobody", "--user", "ana", "--message", "hi"), "AGENT_UNKNOWN"),
        (("chat", "chef", "--user", "a/b", "--message", "hi"), "BAD_REQUEST"),
        (("deploy", "docs"), "AGENT_INVALID"),
        (("drain", "no-such-node"), "NODE_UNKNOWN"),
    ):
        code, out, err = await cli.run(*arguments, "--json")
        assert code == 1, arguments
        assert json.loads(out)["error"]["reason"] == reason
        assert "hint:" in err
        assert "Traceback" not in err
    assert (await cli.run("chat", "chef"))[0] == 2

    await cli.ok("drain", "edge-north")
    moved = await cli.json(*chat, "What do you know about me?")
    assert (moved["receipt"]["node"], moved["receipt"]["epoch"]) == ("edge-south", 2)

    await cli.ok("down")
    await cli.ok("down")  # nothing to stop is no error
    code, out, _ = await cli.run("status", "--json")
    assert code == 1
    assert json.loads(out)["error"]["reason"] == "COORDINATOR_UNREACHABLE"


async def test_state_outlives_down_and_up(cli: Cli) -> None:
    await cli.ok("up", "--detach")
    await cli.ok("deploy", "examples/hello")
    chat = ("chat", "hello", "--user", "ana", "--message", "hi")
    assert "visit 1." in (await cli.json(*chat))["reply"]
    await cli.ok("down")
    await cli.ok("up", "--detach")
    assert "visit 2." in (await cli.json(*chat))["reply"]


async def test_kill_9_of_up_leaves_nothing(cli: Cli, tmp_path: Path) -> None:
    await cli.ok("up", "--detach")
    await cli.ok("deploy", "examples/hello")
    await cli.json("chat", "hello", "--user", "ana", "--message", "hi")
    record = json.loads((tmp_path / "roost" / "up" / "up.json").read_text())
    os.kill(record["pid"], signal.SIGKILL)
    await cli.ok("up", "--detach")  # takes over from the one that was killed
    assert "visit 2." in (await cli.json("chat", "hello", "--user", "ana", "--message", "hi"))["reply"]


async def test_nodes_killed_one_by_one_leave_nothing_after_down(cli: Cli, tmp_path: Path) -> None:
    await cli.ok("up", "--detach")
    await cli.ok("deploy", "examples/hello")
    await cli.json("chat", "hello", "--user", "ana", "--near", "59.9,10.7", "--message", "hi")
    record = json.loads((tmp_path / "roost" / "up" / "up.json").read_text())
    (pid,) = (p["pid"] for p in record["processes"] if p["name"] == "edge-north")
    os.kill(pid, signal.SIGKILL)
    reply = await cli.json("chat", "hello", "--user", "ana", "--message", "hi")
    assert "visit 2." in reply["reply"]
    assert reply["receipt"]["node"] != "edge-north"

"""The operator's commands as they are typed, against a scripted mesh: status, nodes, drain, move, top."""

from __future__ import annotations

import asyncio
import sys

from protos.v1 import admin_pb2
from shared.errors import Reason, RoostError
from tests.support.cli_on_fakes import Cli, cli, terminal

__all__ = ["cli"]


async def test_status_json_has_the_names_of_the_proto(cli: Cli) -> None:
    result = await cli.run("status", "--json")
    assert result.code == 0
    told = result.json
    assert set(told) == {"nodes", "instances", "agents", "coordinator", "collection"}
    north, cloud = told["nodes"]
    assert north["node"]["id"] == "north"
    assert north["node"]["role"] == "edge"
    assert north["node"]["position"] == {"latitude": 59.91, "longitude": 10.75}
    assert north["reserved"] == {"memory_bytes": 512 << 20, "cpu_millis": 500, "pids": 64, "devices": []}
    assert (north["state"], north["instances"], north["peers"]) == ("up", 1, ["south"])
    assert (cloud["node"]["position"], cloud["reserved"]) == (None, None)
    assert told["instances"][0]["key"] == {"tenant": "default", "agent": "chef", "user": "ana"}
    assert told["instances"][0]["epoch"] == 3
    assert told["agents"][0]["name"] == "chef"
    assert told["coordinator"] == "c1"


async def test_status_is_plain_columns_for_programs(cli: Cli) -> None:
    result = await cli.run("status")
    lines = result.out.splitlines()
    assert lines[0].split()[:4] == ["node", "role", "site", "state"]
    assert "512M/2G" in lines[1]
    assert "1.5 ms" in lines[1]
    assert lines[2].split()[:4] == ["cloud-1", "cloud", "cloud", "suspect"]
    assert "\x1b" not in result.out.replace("\x1b[31m", "", 1), "no colours"


async def test_status_on_a_terminal_is_a_table_that_no_agent_can_steer(cli: Cli) -> None:
    async with terminal(cli, "status") as screen:
        await screen.shows("nearest with room [31m")
        await screen.shows("chef")
        assert await screen.ended() == 0
        assert "██░░" in screen.text


async def test_nodes_tells_addresses_and_peers(cli: Cli) -> None:
    result = await cli.run("nodes")
    assert cli.north.address in result.out
    assert "59.91, 10.75" in result.out
    assert list((await cli.run("nodes", "--json")).json) == ["nodes"]


async def test_drain_and_its_undo(cli: Cli) -> None:
    result = await cli.run("drain", "north")
    assert result.code == 0
    assert "nothing runs there; 2 sleep" in result.out
    await cli.run("drain", "north", "--undo")
    assert cli.coordinator.drained == [("north", False), ("north", True)]
    cli.coordinator.refusals.append(RoostError(Reason.NODE_UNKNOWN, "there is no node x", "see roost nodes"))
    assert (await cli.run("drain", "x")).code == 1


async def test_drain_can_be_watched_until_nothing_runs(cli: Cli) -> None:
    reply = admin_pb2.DrainReply
    cli.coordinator.drains.extend(
        [reply(instances=3, live=2), reply(instances=2, live=1, waiting=["no room"])]
    )
    result = await cli.run("drain", "north", "--wait")
    assert result.err.splitlines() == ["2 still run on north", "1 still run on north (no room)"]
    assert "it can be stopped" in result.out
    cli.coordinator.drains.extend([reply(instances=3, live=2)] * 3)
    late = await cli.run("drain", "north", "--wait", "--timeout", "0")
    assert late.code == 1
    assert "--undo" in late.err
    cli.coordinator.drains.clear()
    cli.coordinator.drains.append(reply(instances=3, live=2))
    assert "2 still run there" in (await cli.run("drain", "north")).out


async def test_move_says_what_it_does_and_how_long_it_paused(cli: Cli) -> None:
    result = await cli.run("move", "chef", "--user", "ana", "south")
    assert "south prepares" in result.err
    assert "from north to south (epoch 2). It paused for 12 ms" in result.out
    await cli.run("move", "chef", "south", "--user", "ana", "--now", "--wait", "5")
    first, second = cli.coordinator.moved
    assert (first.key.user, first.node, first.now, first.turn_ms) == ("ana", "south", False, 30_000)
    assert (second.node, second.now, second.turn_ms) == ("south", True, 5000)
    moved = await cli.run("move", "chef", "--user", "ana", "north", "--json")
    assert (moved.json["target"], moved.json["pause_ms"]) == ("north", 12.3)
    assert "is on north already" in (await cli.run("move", "chef", "--user", "ana", "north")).out
    cli.coordinator.refusals.append(RoostError(Reason.MOVE_GIVEN_UP, "it stays", "try again later"))
    refused = await cli.run("move", "chef", "--user", "ana", "south", "--json")
    assert (refused.code, refused.json["error"]["reason"]) == (1, "MOVE_GIVEN_UP")
    assert (await cli.run("move", "chef", "--user", "ana", "--wait", "-1")).code != 0


async def test_resize_says_what_it_has_now(cli: Cli) -> None:
    result = await cli.run("resize", "chef", "--user", "ana", "--memory", "256M", "--cpu", "1.5")
    assert result.code == 0
    assert "chef of ana has 256M memory, 1.5 cores, 9 pids now, on north." in result.out
    (request,) = cli.coordinator.resized
    assert (request.size.memory_bytes, request.size.cpu_millis, request.size.pids) == (256 << 20, 1500, 0)
    assert (await cli.run("resize", "chef", "--user", "ana", "--reset", "--json")).json["node"] == "north"
    for wrong in ((), ("--reset", "--pids", "9"), ("--memory", "much"), ("--cpu", "-1")):
        assert (await cli.run("resize", "chef", "--user", "ana", *wrong)).code != 0
    assert len(cli.coordinator.resized) == 2


async def test_output_that_nobody_reads_is_no_traceback(cli: Cli) -> None:
    command = f"{sys.executable} -m roost.cli.main --coordinator {cli.coordinator.address} status | true"
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-c",
        f"set -o pipefail; {command}",
        stderr=asyncio.subprocess.PIPE,
        env=cli.env(),
    )
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert err == b""
    assert process.returncode in (0, 141)


async def test_top_needs_a_terminal(cli: Cli) -> None:
    result = await cli.run("top")
    assert result.code == 1
    assert "roost status" in result.err


async def test_top_shows_its_age_when_the_coordinator_is_gone_and_q_leaves(cli: Cli) -> None:
    async with terminal(cli, "top") as screen:
        await screen.shows("nearest with room")
        await cli.coordinator.stop()
        await screen.shows("s old")
        screen.type("q")
        assert await screen.ended() == 0

"""`roost` as it is typed, a process of its own, against a scripted mesh: JSON shapes, exit codes, errors."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from protos.v1 import admin_pb2, common_pb2
from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.fake_mesh import FakeCoordinator, FakeMesh, FakeNode, cancellable, dying, failing, silent

HELLO = Path(__file__).parents[2] / "examples" / "hello"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1, "exactly one object, on one line"
        return json.loads(self.out)


@dataclass
class Cli:
    coordinator: FakeCoordinator
    north: FakeNode
    south: FakeNode
    home: Path

    async def run(self, *args: str, stdin: str = "", there: bool = True) -> Result:
        options = ["--coordinator", self.coordinator.address] if there else []
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "roost.cli.main",
            *options,
            *args,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.env(),
        )
        async with asyncio.timeout(40):
            out, err = await process.communicate(stdin.encode())
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())

    def env(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k != "ROOST_COORDINATORS"}
        return {**env, "XDG_DATA_HOME": str(self.home), "TERM": "xterm-256color"}


@pytest.fixture
async def cli(tmp_path: Path) -> AsyncIterator[Cli]:
    async with FakeMesh() as mesh:
        north, south = FakeNode("north"), FakeNode("south")
        coordinator = FakeCoordinator(north, south)
        await mesh.add(north, south, coordinator)
        coordinator.status = status(north.address)
        yield Cli(coordinator, north, south, tmp_path)


def status(address: str) -> admin_pb2.StatusReply:
    node = common_pb2.NodeInfo(
        id="north",
        role=common_pb2.EDGE,
        site="attic",
        address=address,
        position=common_pb2.Position(latitude=59.91, longitude=10.75),
        capacity=common_pb2.Resources(memory_bytes=2 << 30, cpu_millis=2000, pids=1000),
        api_version="v1",
        started_id="s1",
    )
    cloud = common_pb2.NodeInfo(id="cloud-1", role=common_pb2.CLOUD, site="cloud")
    return admin_pb2.StatusReply(
        nodes=[
            admin_pb2.NodeStatus(
                node=node,
                state="up",
                reserved=common_pb2.Resources(memory_bytes=512 << 20, cpu_millis=500, pids=64),
                instances=1,
                load=0.25,
                rtt_ms=1.5,
                peers=["south"],
                coordinator="c1",
            ),
            admin_pb2.NodeStatus(node=cloud, state="suspect", load=-1, rtt_ms=-1, coordinator="c1"),
        ],
        instances=[
            admin_pb2.InstanceStatus(
                key=common_pb2.InstanceKey(tenant="default", agent="chef", user="ana"),
                node="north",
                epoch=3,
                version=7,
                phase="live",
                why="nearest with room \x1b[31m",
                last_turn="t9",
            )
        ],
        agents=[common_pb2.AgentSpec(tenant="default", name="chef", version="abc")],
        coordinator="c1",
    )


# --- chat ----------------------------------------------------------------------------------------


async def test_chat_json_is_one_object(cli: Cli) -> None:
    result = await cli.run("chat", "chef", "--user", "ana", "--message", "hi", "--json", "--turn-id", "t1")
    assert result.code == 0
    assert result.json == {
        "reply": "HI",
        "receipt": {
            "node": "north",
            "epoch": 1,
            "version": 1,
            "resumed_from": "new",
            "resumed_version": 0,
            "lost": [],
            "replayed": False,
            "durable": True,
        },
        "turn_id": "t1",
        "why": "the nearest with room",
    }


async def test_chat_prints_the_reply_alone_to_programs(cli: Cli) -> None:
    result = await cli.run("chat", "chef", "--user", "ana", "--message", "hi", "--near=-33.9,18.4")
    assert (result.code, result.out, result.err) == (0, "HI\n", "")
    assert cli.coordinator.resolved[0].position.latitude == -33.9


async def test_chat_survives_a_node_that_dies(cli: Cli) -> None:
    cli.north.script.append(dying)
    result = await cli.run("chat", "chef", "--user", "ana", "--message", "hi", "--json")
    assert result.json["receipt"]["node"] == "south"


async def test_a_conversation_over_a_pipe_answers_line_by_line(cli: Cli) -> None:
    cli.north.script.append(failing(RoostError(Reason.TURN_FAILED, "the agent failed", "see its log")))
    result = await cli.run("chat", "chef", "--user", "ana", stdin="fails\n\nworks\n")
    assert result.out == "WORKS\n"
    assert result.err == "roost: the agent failed\nhint: see its log\n"
    assert result.code == 1


async def test_a_conversation_on_a_terminal_shows_replies_and_receipts(cli: Cli) -> None:
    cli.north.script.append(dying)
    async with terminal(cli, "chat", "chef", "--user", "ana") as screen:
        await screen.shows("Ctrl-D ends it")
        screen.type("hello\n")
        await screen.shows("HELLO")
        await screen.shows("south · epoch 1 · state version 1 · resumed from new")
        screen.type("again\n")
        await screen.shows("AGAIN")
        screen.type("\x04")
        assert await screen.ended() == 0


async def test_an_interrupt_cancels_the_turn_and_says_what_came_of_it(cli: Cli) -> None:
    cli.north.script.append(cancellable)
    async with terminal(cli, "chat", "chef", "--user", "ana") as screen:
        await screen.shows("Ctrl-C cancels a turn")
        screen.type("hello\n")
        await screen.shows("so far")
        screen.type("\x03")
        await screen.shows("roost: the turn was cancelled")
        screen.type("again\n")
        await screen.shows("AGAIN")
        screen.type("\x04")
        assert await screen.ended() == 0
    assert cli.north.cancels == [cli.north.turns[0][0]]


async def test_a_second_interrupt_ends_a_turn_that_hangs(cli: Cli) -> None:
    cli.north.script.append(silent)
    async with terminal(cli, "chat", "chef", "--user", "ana") as screen:
        await screen.shows("Ctrl-D ends it")
        screen.type("hello\n")
        await eventually(lambda: cli.north.turns, 10)
        screen.type("\x03")
        await screen.shows("Ctrl-C again leaves at once")
        screen.type("\x03")
        assert await screen.ended() == 130
        assert "Traceback" not in screen.text


async def test_an_error_has_a_message_a_hint_and_an_exit_code(cli: Cli) -> None:
    cli.coordinator.refusals.append(
        RoostError(Reason.AGENT_UNKNOWN, "no agent chef is deployed", "roost deploy DIR")
    )
    result = await cli.run("chat", "chef", "--user", "ana", "--message", "hi", "--json")
    assert result.code == 1
    assert result.err == "roost: no agent chef is deployed\nhint: roost deploy DIR\n"
    assert result.json == {
        "error": {
            "reason": "AGENT_UNKNOWN",
            "message": "no agent chef is deployed",
            "hint": "roost deploy DIR",
        }
    }


async def test_a_coordinator_that_is_down_ends_at_the_timeout(cli: Cli) -> None:
    await cli.coordinator.stop()
    result = await cli.run("chat", "chef", "--user", "ana", "--message", "hi", "--json", "--timeout", "0.5")
    assert result.code == 1
    assert result.json["error"]["reason"] == "COORDINATOR_UNREACHABLE"


@pytest.mark.parametrize(
    "args",
    [
        ("chat", "chef"),
        ("chat", "chef", "--user", "ana", "--json"),
        ("chat", "chef", "--user", "ana", "--turn-id", "t1"),
        ("chat", "chef", "--user", "ana", "--near", "91,0"),
        ("chat", "chef", "--user", "ana", "--near", "here"),
        ("chat", "chef", "--user", "ana", "--timeout", "0"),
        ("frobnicate",),
        (),
    ],
)
async def test_wrong_usage_exits_with_2(cli: Cli, args: tuple[str, ...]) -> None:
    result = await cli.run(*args)
    assert result.code == 2
    assert "usage:" in result.err


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("chat", "Chef!", "--user", "ana", "--message", "hi"), "BAD_REQUEST"),
        (("chat", "chef", "--user", "a/b", "--message", "hi"), "BAD_REQUEST"),
        (("--tenant", "No", "chat", "chef", "--user", "ana", "--message", "hi"), "BAD_REQUEST"),
        (("--coordinator", "nonsense", "status"), "BAD_REQUEST"),
    ],
)
async def test_names_that_cannot_be_are_refused(cli: Cli, args: tuple[str, ...], reason: str) -> None:
    result = await cli.run(*args, "--json", there="--coordinator" not in args)
    assert result.code == 1
    assert result.json["error"]["reason"] == reason


async def test_without_any_coordinator_it_says_how_to_get_one(cli: Cli) -> None:
    result = await cli.run("status", there=False)
    assert result.code == 1
    assert "roost up" in result.err
    assert "--coordinator" in result.err


async def test_what_roost_up_wrote_down_is_found(cli: Cli) -> None:
    record = cli.home / "roost" / "up" / "up.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"coordinators": [cli.coordinator.address]}))
    assert (await cli.run("status", "--json", there=False)).code == 0


# --- the operator's commands ---------------------------------------------------------------------


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


# --- deploy --------------------------------------------------------------------------------------


async def test_deploy_uploads_what_is_missing_and_says_what_changed(cli: Cli) -> None:
    result = await cli.run("--tenant", "acme", "deploy", str(HELLO), "--json")
    assert result.code == 0, result.err
    told = result.json
    assert (told["name"], told["changed"]) == ("hello", True)
    assert told["bytes"] > 0
    spec = cli.coordinator.deployed[0]
    assert (spec.tenant, spec.name) == ("acme", "hello")
    assert spec.policy_toml == (HELLO / "agent.toml").read_text()
    assert spec.bundle_root in cli.coordinator.blobs
    uploaded = dict(cli.coordinator.blobs)
    again = await cli.run("--tenant", "acme", "deploy", str(HELLO))
    assert "was deployed already" in again.out
    assert cli.coordinator.blobs == uploaded


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "can't be read"),
        ("[agent]\nname = 'x'", "run is missing"),
        ("[agent]\nname = 'x'\ncolour = 1\n[run]\nentry = 'x:agent'", "unknown key 'colour'"),
        ("[agent]\nname = 'x'\n[run]\nentry = 'x:agent'", "holds no x.py"),
        ("[agent]\nname = 'x'\n[run]\nentry = 'x:agent'\n[resources]\nmemory = '1 potato'", "not a size"),
    ],
)
async def test_a_bad_agent_is_refused_before_anything_is_sent(
    cli: Cli, tmp_path: Path, text: str | None, complaint: str
) -> None:
    directory = tmp_path / "agent"
    directory.mkdir()
    if text is not None:
        (directory / "agent.toml").write_text(text)
    result = await cli.run("deploy", str(directory), "--json")
    assert result.code == 1
    assert result.json["error"]["reason"] == "AGENT_INVALID"
    assert complaint in result.json["error"]["message"]
    assert result.json["error"]["hint"]
    assert not cli.coordinator.blobs


# --- logs ----------------------------------------------------------------------------------------


async def test_logs_of_one_and_of_all(cli: Cli) -> None:
    logs = cli.home / "roost" / "up" / "logs"
    logs.mkdir(parents=True)
    (logs / "edge-north.log").write_text("one\ntwo\n")
    (logs / "etcd.log").write_text("three\n")
    assert (await cli.run("logs", "edge-north", "-n", "1")).out == "two\n"
    assert [line.split() for line in (await cli.run("logs")).out.splitlines()] == [
        ["edge-north", "one"],
        ["edge-north", "two"],
        ["etcd", "three"],
    ]
    unknown = await cli.run("logs", "edge-west")
    assert unknown.code == 1
    assert "edge-north" in unknown.err


# --- terminals -----------------------------------------------------------------------------------


class Screen:
    """A program on a terminal of its own: what it writes, and what is typed to it."""

    def __init__(self, fd: int, process: asyncio.subprocess.Process) -> None:
        self.text = ""
        self._fd = fd
        self._process = process
        asyncio.get_running_loop().add_reader(fd, self._read)

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    async def shows(self, text: str) -> None:
        await eventually(lambda: text in self.text, 20, f"{text!r} on the screen")

    async def ended(self) -> int:
        return await asyncio.wait_for(self._process.wait(), 20)

    def close(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        try:
            self.text += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:  # the program has closed its side
            asyncio.get_running_loop().remove_reader(self._fd)


@asynccontextmanager
async def terminal(cli: Cli, *args: str) -> AsyncIterator[Screen]:
    main, sub = pty.openpty()
    command = [sys.executable, "-m", "roost.cli.main", "--coordinator", cli.coordinator.address, *args]
    # By way of setsid, so that the terminal is its own, and Ctrl-C typed there reaches it.
    process = await asyncio.create_subprocess_exec(
        "setsid",
        "--ctty",
        *command,
        stdin=sub,
        stdout=sub,
        stderr=sub,
        env={**cli.env(), "COLUMNS": "160"},
    )
    os.close(sub)
    screen = Screen(main, process)
    try:
        yield screen
    finally:
        screen.close()
        await process.wait()

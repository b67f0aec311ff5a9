"""`roost` as it is typed, a process of its own, against a scripted mesh: JSON shapes, exit codes, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.errors import Reason, RoostError
from tests.support.cli_on_fakes import Cli, cli, terminal
from tests.support.eventually import eventually
from tests.support.fake_mesh import cancellable, dying, failing, silent

__all__ = ["cli"]

HELLO = Path(__file__).parents[2] / "examples" / "hello"


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

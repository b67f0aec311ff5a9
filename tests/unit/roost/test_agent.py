"""The SDK, over a socketpair: what a node would see of an agent."""

from __future__ import annotations

import ast
import asyncio
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import roost.agent as sdk
from roost import Agent
from tests.support.sdk import Node, Serve

REPO = Path(sdk.__file__).parent.parent
SDK = ("__init__.py", "agent.py", "_effects.py", "_line.py", "_tasks.py", "_timers.py")  # in jails


def visits(turn: sdk.Turn) -> str:
    turn.state["visits"] = turn.state.get("visits", 0) + 1
    return f"{turn.user} {turn.state['visits']}"


def test_a_turn_is_answered_with_its_id(serve: Serve) -> None:
    assert serve(visits).turn("hi", "t1") == [{"kind": "reply", "id": "t1", "text": "ana 1"}]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_what_warms_it_up_has_run_before_it_is_ready_again(serve: Serve, kind: str) -> None:
    made: list[str] = []

    async def warm_up() -> None:
        made.append("async")

    node = serve(visits, warm_up if kind == "async" else lambda: made.append("plain"))
    assert made == [kind]
    assert node.turn("hi")[-1]["text"] == "ana 1"


def test_one_that_was_not_told_to_warm_up_answers_too(serve: Serve) -> None:
    made: list[str] = []
    node = serve(visits, lambda: made.append("plain"), told=False)
    assert node.turn("hi")[-1]["text"] == "ana 1"
    assert not made


def test_a_handler_finds_the_event_loop_that_was_made_when_it_warmed_up(serve: Serve) -> None:
    loops: list[asyncio.AbstractEventLoop] = []

    async def warm_up() -> None:
        loops.append(asyncio.get_running_loop())

    async def handler(turn: sdk.Turn) -> str:
        return str(asyncio.get_running_loop() in loops)

    assert serve(handler, warm_up).turn("hi")[-1]["text"] == "True"


def test_a_rehearsal_runs_nothing_of_the_agent_and_leaves_nothing(tmp_path: Path) -> None:
    sdk.rehearse(tmp_path, None)
    loop = asyncio.new_event_loop()
    sdk.rehearse(tmp_path, loop)
    assert list(tmp_path.iterdir()) == []
    assert loop.run_until_complete(asyncio.sleep(0, "it goes on")) == "it goes on"
    loop.close()


def test_a_zygote_rehearses_without_the_agents_kind_of_event_loop() -> None:
    """Such a loop may leave things in the process that a fork can't use."""

    class Policy(asyncio.DefaultEventLoopPolicy):
        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            raise AssertionError("a loop of the agent's")

    agent, turns = Agent(), list[str]()

    @agent.turn
    async def answer(turn: Any) -> str:
        turns.append(turn.message)
        return ""

    before = asyncio.get_event_loop_policy()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asyncio.set_event_loop_policy(Policy())
        try:
            agent.prepare(theirs)
        finally:
            asyncio.set_event_loop_policy(before)
    assert not turns
    assert not sdk._REHEARSAL_DIR.exists()


def test_warming_up_may_fail(serve: Serve, capfd: pytest.CaptureFixture[str]) -> None:
    def warm_up() -> None:
        raise RuntimeError("no network here")

    assert serve(visits, warm_up).turn("hi")[-1]["text"] == "ana 1"
    assert "no network here" in capfd.readouterr().err


def test_state_is_kept_across_turns_and_processes(serve: Serve, tmp_path: Path) -> None:
    first = serve(visits)
    first.turn("hi")
    assert first.turn("hi")[-1]["text"] == "ana 2"
    assert serve(visits).turn("hi")[-1]["text"] == "ana 3"
    assert json.loads((tmp_path / "roost.json").read_text()) == {"visits": 3}


def test_an_unchanged_state_is_not_written(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "roost.json").write_text('{"a":   1}')
    assert serve(lambda turn: str(turn.state["a"])).turn("hi")[-1]["text"] == "1"
    assert (tmp_path / "roost.json").read_text() == '{"a":   1}'


def test_a_live_agent_sees_its_state_as_a_resumed_one_would(serve: Serve) -> None:
    def handler(turn: sdk.Turn) -> str:
        seen = repr(turn.state.get("pair"))
        turn.state["pair"] = (1, 2)
        return seen

    node = serve(handler)
    node.turn("hi")
    assert node.turn("hi")[-1]["text"] == "[1, 2]"


def test_a_failed_turn_changes_no_state_and_the_agent_lives_on(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def handler(turn: sdk.Turn) -> str:
        turn.state["n"] = turn.state.get("n", 0) + 1
        if turn.message == "fail":
            raise ValueError("no such\nrecipe")
        return str(turn.state["n"])

    node = serve(handler)
    assert node.turn("ok")[-1]["text"] == "1"
    assert node.turn("fail", "t2") == [{"kind": "error", "id": "t2", "message": "ValueError: no such recipe"}]
    assert "Traceback" in capfd.readouterr().err
    assert node.turn("ok")[-1]["text"] == "2"


def test_after_a_failure_the_state_is_read_from_disk_again(serve: Serve, tmp_path: Path) -> None:
    def handler(turn: sdk.Turn) -> str:
        if turn.message == "fail":
            raise ValueError
        return str(turn.state.get("n"))

    node = serve(handler)
    assert node.turn("ok")[-1]["text"] == "None"
    node.turn("fail")
    (tmp_path / "roost.json").write_text('{"n": 7}')  # as the node would put it back
    assert node.turn("ok")[-1]["text"] == "7"


def test_a_state_that_cannot_be_read_is_never_taken_for_an_empty_one(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "roost.json").write_text('{"visits": ')
    reply = serve(visits).turn("hi")[-1]
    assert reply["kind"] == "error"
    assert "no valid JSON" in reply["message"]
    assert (tmp_path / "roost.json").read_text() == '{"visits": '


def test_a_state_that_json_cannot_hold_is_refused(serve: Serve) -> None:
    def handler(turn: sdk.Turn) -> str:
        turn.state["when"] = object()
        return "ok"

    assert serve(handler).turn("hi")[-1]["message"].startswith("TypeError: turn.state can't be saved as JSON")


def test_say_streams_provisional_pieces(serve: Serve) -> None:
    def handler(turn: sdk.Turn) -> str:
        turn.say("thinking…")
        return "done"

    assert serve(handler).turn("hi", "t1") == [
        {"kind": "delta", "id": "t1", "text": "thinking…"},
        {"kind": "reply", "id": "t1", "text": "done"},
    ]


def generator(turn: sdk.Turn) -> Iterator[str]:
    yield "a"
    yield "b"


async def async_generator(turn: sdk.Turn) -> Any:
    yield "a"
    yield "b"


@pytest.mark.parametrize("handler", [generator, async_generator])
def test_a_generator_streams_what_it_yields(serve: Serve, handler: Callable[..., Any]) -> None:
    said = serve(handler).turn("hi")
    assert [(m["kind"], m["text"]) for m in said] == [("delta", "a"), ("delta", "b"), ("reply", "ab")]


def test_an_async_handler_keeps_its_event_loop_between_turns(serve: Serve) -> None:
    import asyncio

    loops = []

    async def handler(turn: sdk.Turn) -> str:
        loops.append(asyncio.get_running_loop())
        return str(loops[0] is loops[-1])

    node = serve(handler)
    node.turn("hi")
    assert node.turn("hi")[-1]["text"] == "True"


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_a_reply_that_is_no_str_says_what_to_return(serve: Serve, value: object) -> None:
    error = serve(lambda turn: value).turn("hi")[-1]
    assert error["kind"] == "error"
    assert type(value).__name__ in error["message"]
    assert "return the reply as a str" in error["message"]


def test_text_that_utf8_cannot_carry_does_not_end_the_agent(serve: Serve) -> None:
    assert serve(lambda turn: "a\ud800b").turn("hi")[-1]["text"] == "a?b"


def test_a_reply_over_the_limit_is_an_error_that_changes_no_state(serve: Serve, tmp_path: Path) -> None:
    def handler(turn: sdk.Turn) -> str:
        turn.state["x"] = 1
        return "x" * (sdk.MAX_REPLY + 1)

    assert serve(handler).turn("hi")[-1]["kind"] == "error"
    assert not (tmp_path / "roost.json").exists()


def test_unknown_messages_of_a_newer_node_are_ignored(serve: Serve) -> None:
    node = serve(visits)
    node.send(kind="something-new")
    assert node.turn("hi")[-1]["text"] == "ana 1"


def test_an_agent_has_exactly_one_handler() -> None:
    agent = Agent()
    agent.turn(visits)
    with pytest.raises(RuntimeError, match="exactly one"):
        agent.turn(visits)


# --- alone, as in a jail -------------------------------------------------------------------------


@pytest.fixture
def jail(tmp_path: Path) -> Path:
    """A directory with an agent and the only files of roost that a jail has."""
    (tmp_path / "roost").mkdir()
    for name in SDK:
        shutil.copy(REPO / "roost" / name, tmp_path / "roost" / name)
    shutil.copy(REPO / "examples" / "hello" / "hello.py", tmp_path / "hello.py")
    return tmp_path


def run_alone(jail: Path, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", "-E", *args]  # no site-packages
    return subprocess.run(
        command, cwd=jail, text=True, capture_output=True, timeout=30, check=False, **options
    )


def test_four_files_and_the_standard_library_are_enough(jail: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-S", "-m", "roost.agent", "hello:agent"],
            cwd=jail,
            env={"ROOST_FD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
        )
    node = Node(ours)
    assert node.receive() == {"kind": "ready"}
    # there is no /state here that it may use, or there is one of root's: any well-formed answer will do
    assert node.turn("hi", "t1")[-1]["id"] == "t1"
    node.close()
    assert process.wait(10) == 0


def test_in_a_jail_the_client_is_absent_but_breaks_nothing(jail: Path) -> None:
    code = "import roost; roost.Agent; print(hasattr(roost, 'Client'))"
    assert run_alone(jail, "-c", code).stdout == "False\n"


def test_an_agent_that_cannot_be_imported_exits_with_3(jail: Path) -> None:
    (jail / "broken.py").write_text("import no_such_module\n")
    result = run_alone(jail, "-m", "roost.agent", "broken:agent")
    assert result.returncode == sdk.EXIT_IMPORT
    assert "no_such_module" in result.stderr


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("agent = 3", "not a roost.Agent"),
        ("from roost import Agent\nagent = Agent()", "no turn handler"),
        ("", "no attribute"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_an_entry_that_names_no_agent_exits_with_3(jail: Path, text: str, complaint: str) -> None:
    (jail / "broken.py").write_text(text)
    result = run_alone(jail, "-m", "roost.agent", "broken:agent")
    assert result.returncode == sdk.EXIT_IMPORT
    assert complaint in result.stderr


def test_without_a_node_it_talks_at_the_terminal_and_keeps_state(jail: Path) -> None:
    shutil.copy(REPO / "roost" / "_here.py", jail / "roost")
    first = run_alone(jail, "hello.py", input="hi\nhi\n")
    assert first.returncode == 0
    assert [line.split("this is ")[1] for line in first.stdout.splitlines()] == ["visit 1.", "visit 2."]
    assert "visit 3." in run_alone(jail, "hello.py", input="hi\n").stdout


RUNS = """
import sys
from roost import Agent
agent = Agent()

@agent.turn
def runs(turn):
    code = "import sys; open('out.txt', 'w').write(open('d/in').read()); print(1); sys.exit(3)"
    result = turn.run([sys.executable, "-c", code], files={"d/in": "given"}, outputs=["*"])
    slow = turn.run(["sh", "-c", "echo begun; sleep 100 & wait"], timeout=0.5)
    try:
        turn.run(["no-such-program"])
    except Exception as error:
        return f"{tuple(result)} {slow.stdout.strip()} {slow.timed_out} {error}"

agent.run()
"""


def test_without_a_node_a_task_runs_without_walls_and_says_so(jail: Path) -> None:
    shutil.copy(REPO / "roost" / "_here.py", jail / "roost")
    (jail / "runs.py").write_text(RUNS)
    ran = run_alone(jail, "runs.py", input="hi\n")
    files = {"d/in": b"given", "out.txt": b"given"}
    assert ran.stdout.startswith(
        f"{(3, '1' + chr(10), '', files, False, False, False, [])} begun True no-such"
    )
    assert ran.stderr.count("without walls or limits") == 3


@pytest.mark.parametrize("name", [*SDK, "zygote.py", "_memory.py"])
def test_the_files_that_jails_get_are_python_3_9(name: str) -> None:
    ast.parse((REPO / "roost" / name).read_text(), feature_version=(3, 9))

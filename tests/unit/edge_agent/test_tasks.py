"""Tasks of a turn, in fake jails: limits, bounds, and that none outlives its turn."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from edge_agent.control import Agent
from edge_agent.jail.api import MAX_MESSAGE, Exit
from edge_agent.jail.python import base_interpreter
from edge_agent.task_messages import MAX_FILES, MAX_FILES_BYTES, MAX_STREAM_BYTES
from edge_agent.tasks import suspended
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.fake_control import POLICY
from tests.support.fake_jails import FakeTask
from tests.support.tasks import Hearing, TaskBench

NEED = Resources(128 << 20, 500, 64)  # of a task that says nothing
CAPACITY = Resources(1 << 30, 2000, 256)  # four of those
Program = Callable[[FakeTask], Awaitable[int]]


@dataclass
class Turn:
    bench: TaskBench
    hearing: Hearing
    agent: Agent

    async def result(self, **asked: Any) -> dict[str, Any]:
        """Of one task, in a turn of its own."""
        self.hearing.heard.clear()
        async with self.bench.of_turn(self.hearing, self.agent) as tasks:
            tasks.begin(run(**asked))
            return await self.heard("a")

    async def heard(self, task: str) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [m for m in self.hearing.heard if m["task"] == task]

        await eventually(lambda: bool(found()), timeout=5.0)
        (message,) = found()
        assert (message["kind"], message["id"]) == ("result", "t1")
        return message


def run(task: str = "a", argv: object = ("work",), **asked: Any) -> dict[str, Any]:
    argv = list(argv) if isinstance(argv, tuple) else argv
    return {"kind": "run", "id": "t1", "task": task, "argv": argv, **asked}


Start = Callable[..., Turn]


@pytest.fixture
def turn(tmp_path: Path) -> Start:
    def start(program: Program, policy: str = "", capacity: Resources = CAPACITY) -> Turn:
        agent = Agent.of("v1", f"{POLICY}{policy}", "0" * 64)
        return Turn(TaskBench(tmp_path, program, capacity), Hearing(), agent)  # type: ignore[arg-type]

    return start


async def work(task: FakeTask) -> int:
    task.say(b"said", b"complained")
    return 3


async def hang(task: FakeTask) -> int:
    await asyncio.Event().wait()
    raise AssertionError


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def test_the_result_has_all_that_came_of_it(turn: Start) -> None:
    async def program(task: FakeTask) -> int:
        given = (task.state / "data" / "in.csv").read_bytes()
        (task.state / "out.txt").write_bytes(given[::-1])
        (task.state / "data" / "more.txt").write_bytes(b"m")
        (task.state / "link.txt").symlink_to("/etc/passwd")
        task.say(b"said", b"complained")
        return 3

    t = turn(program)
    files = {"data/in.csv": base64_of(b"1,2"), "data/other.csv": ""}
    assert await t.result(files=files, outputs=["*.txt", "none"]) == {
        "kind": "result",
        "id": "t1",
        "task": "a",
        "code": 3,
        "stdout": base64_of(b"said"),
        "stderr": base64_of(b"complained"),
        "truncated": False,
        "files": {"data/more.txt": base64_of(b"m"), "out.txt": base64_of(b"2,1")},
        "omitted": [],
        "timed_out": False,
        "out_of_memory": False,
    }


async def test_it_gets_what_it_asks_for_or_else_what_the_policy_allows(turn: Start) -> None:
    seen: list[Resources] = []

    async def program(task: FakeTask) -> int:
        seen.append(t.bench.reservations.total(0.0))
        return 0

    t = turn(program, "[tasks]\nat_once = 1\npids = 100\n")
    await t.result()
    await t.result(memory="64M", cpu=0.1, pids=1.0, timeout=1)
    await t.result(memory=16 << 20, argv=["python3", "-c", "1"])
    wanted = [Resources(128 << 20, 500, 100), Resources(64 << 20, 100, 1), Resources(16 << 20, 500, 100)]
    assert seen == wanted
    assert [spec.limits for spec in t.bench.jails.made] == wanted
    assert [spec.bundle for spec in t.bench.jails.made] == ["v1"] * 3
    assert t.bench.jails.made[2].argv == (base_interpreter(), "-c", "1")
    assert t.bench.reservations.total(0.0) == Resources()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"memory": "129M"}, "at most 128M as its 'memory', not 129M"),
        ({"cpu": 0.6}, "'cpu'"),
        ({"pids": 65}, "'pids'"),
        ({"timeout": 31}, "'timeout'"),
        ({"timeout": float("nan")}, "'timeout'"),
        ({"timeout": float("inf")}, "'timeout'"),
        ({"timeout": 0}, "'timeout'"),
        ({"memory": "1M"}, "'memory'"),
        ({"memory": "much"}, "'much' is not a size"),
        ({"memory": True}, "'memory'"),
        ({"memory": []}, "'memory'"),
        ({"argv": []}, "'argv'"),
        ({"argv": [""]}, "'argv'"),
        ({"argv": "ls"}, "'argv'"),
        ({"argv": ["a\0b"]}, "'argv'"),
        ({"argv": ["\ud800"]}, "'argv'"),
        ({"argv": ["x" * (61 << 10)]}, "'argv' is over 60 KiB"),
        ({"argv": ["x"] * 257}, "'argv'"),
        ({"files": []}, "'files'"),
        ({"files": {"../x": ""}}, "no path of a file"),
        ({"files": {"/etc/passwd": ""}}, "no path of a file"),
        ({"files": {"a//b": ""}}, "no path of a file"),
        ({"files": {"": ""}}, "no path of a file"),
        ({"files": {"a\0b": ""}}, "no path of a file"),
        ({"files": {"\ud800": ""}}, "no path of a file"),
        ({"files": {"a" * 256: ""}}, "no path of a file"),
        ({"files": {"a": "no base64"}}, "base64"),
        ({"files": {"a": None}}, "base64"),
        ({"files": {str(n): "" for n in range(MAX_FILES + 1)}}, "at most 256 paths"),
        ({"files": {"a": base64_of(bytes(MAX_FILES_BYTES)), "b": base64_of(b"x")}}, "over 4 MiB"),
        ({"files": {"a": "", "a/b": ""}}, "'a' is both a file and a directory"),
        ({"outputs": "*.png"}, "'outputs'"),
        ({"outputs": ["x" * 256]}, "'outputs'"),
        ({"outputs": ["x"] * 17}, "'outputs'"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name_and_the_turn_goes_on(
    turn: Start, asked: dict[str, Any], words: str
) -> None:
    t = turn(work)
    error = (await t.result(**asked))["error"]
    assert error["reason"] == Reason.BAD_REQUEST
    assert words in error["message"]
    assert error["hint"]
    assert (await t.result())["code"] == 3
    assert not t.bench.jails.tasks
    assert t.bench.reservations.total(0.0) == Resources()


@pytest.mark.parametrize("name", [None, "", "x" * 65, 1])
async def test_one_without_a_name_breaks_the_protocol(turn: Start, name: object) -> None:
    async with turn(work).bench.of_turn(Hearing()) as tasks:
        with pytest.raises(RoostError, match="'task'"):
            tasks.begin(run(task=name))  # type: ignore[arg-type]


async def test_an_agent_may_be_allowed_none(turn: Start) -> None:
    t = turn(work, "[tasks]\nat_once = 0\n")
    error = (await t.result())["error"]
    assert (error["reason"], error["hint"]) == (
        "BAD_REQUEST",
        "set tasks.at_once in agent.toml to allow them",
    )


async def test_a_node_without_room_says_so(turn: Start) -> None:
    t = turn(hang, capacity=NEED + NEED)
    async with t.bench.of_turn(t.hearing) as tasks:
        for name in "bcd":
            tasks.begin(run(name))
        error = (await t.heard("d"))["error"]
        assert error["reason"] == "NO_ROOM"
        assert "the rest of the turn is not affected" in error["hint"]
        assert len(t.bench.jails.tasks) == 2
    assert t.bench.reservations.total(0.0) == Resources()


async def test_too_many_at_once_are_refused_until_one_has_ended(turn: Start) -> None:
    goes_on = asyncio.Event()

    async def program(task: FakeTask) -> int:
        if task.spec.argv != ("short",):
            await asyncio.Event().wait()
        await goes_on.wait()
        return 0

    t = turn(program)
    async with t.bench.of_turn(t.hearing) as tasks:
        for name in ("1", "2", "3"):
            tasks.begin(run(name))
        tasks.begin(run("short", ("short",)))
        tasks.begin(run("5"))
        assert (await t.heard("5"))["error"]["message"] == "4 tasks of this turn run already"
        goes_on.set()
        assert (await t.heard("short"))["code"] == 0
        tasks.begin(run("6", ("short",)))
        assert (await t.heard("6"))["code"] == 0


async def test_one_that_takes_too_long_is_killed_and_what_it_said_comes_back(turn: Start) -> None:
    async def program(task: FakeTask) -> int:
        task.say(b"begun")
        (task.state / "half").write_text("h")
        return await hang(task)

    result = await turn(program).result(timeout=0.01, outputs=["*"])
    assert (result["timed_out"], result["code"]) == (True, -9)
    assert (result["stdout"], result["files"]) == (base64_of(b"begun"), {})


async def test_memory_that_runs_out_is_a_result(turn: Start) -> None:
    async def child(task: FakeTask) -> int:
        task.out_of_memory = True
        return 137

    async def init(task: FakeTask) -> int:
        task.say(b"begun")
        task.end(Exit(-9, out_of_memory=True))
        return await hang(task)

    for program, code in ((child, 137), (init, -9)):
        result = await turn(program).result()
        assert (result["code"], result["out_of_memory"], result["timed_out"]) == (code, True, False)


async def test_output_is_cut_and_that_is_said(turn: Start) -> None:
    piece = b"x" * 50_000

    async def program(task: FakeTask) -> int:
        for _ in range(MAX_STREAM_BYTES // len(piece) + 1):
            task.say(piece)
            await asyncio.sleep(0.001)  # a pipe holds one
        task.say(b"the end")
        return 0

    result = await turn(program).result()
    assert base64.b64decode(result["stdout"]) == b"x" * MAX_STREAM_BYTES
    assert (result["stderr"], result["truncated"], result["code"]) == ("", True, 0)


async def test_files_that_are_too_large_or_too_many_are_named(turn: Start) -> None:
    async def program(task: FakeTask) -> int:
        (task.state / "a-large").write_bytes(bytes(MAX_FILES_BYTES))
        (task.state / "b-larger").touch()
        os.truncate(task.state / "b-larger", 1 << 40)
        for n in range(MAX_FILES):
            (task.state / f"c{n:03}").touch()
        (task.state / "d\udcff").touch()
        (task.state / "d\n").touch()
        return 0

    result = await turn(program).result(outputs=["*"])
    assert len(result["files"]) == MAX_FILES
    assert len(base64.b64decode(result["files"]["a-large"])) == MAX_FILES_BYTES
    assert result["omitted"] == ["b-larger", "c255"]


async def test_the_largest_result_fits_into_one_message(turn: Start) -> None:
    sent: list[int] = []

    async def program(task: FakeTask) -> int:
        name = "ü" * 120
        for n in range(2 * MAX_FILES):
            (task.state / f"{name}-{n:03}").write_bytes(bytes(MAX_FILES_BYTES // MAX_FILES))
        for _ in range(MAX_STREAM_BYTES // 50_000 + 1):
            task.say(b"x" * 50_000, b"x" * 50_000)
            await asyncio.sleep(0.001)
        return 0

    t = turn(program)

    async def send(message: bytes) -> None:
        sent.append(len(message))
        t.hearing.heard.append(json.loads(message))

    t.hearing.send = send  # type: ignore[method-assign]
    result = await t.result(outputs=["*"])
    assert (len(result["files"]), len(result["omitted"])) == (MAX_FILES, MAX_FILES)
    assert MAX_MESSAGE * 0.8 < sent[0] <= MAX_MESSAGE


async def test_none_is_left_when_the_turn_ends(turn: Start) -> None:
    t = turn(hang)
    async with t.bench.of_turn(t.hearing) as tasks:
        for name in "bc":
            tasks.begin(run(name))
        await eventually(lambda: len(t.bench.jails.tasks) == 2, timeout=5.0)
        tasks.begin(run("d"))  # and one that is just being made
    assert not t.bench.jails.tasks
    assert t.bench.reservations.total(0.0) == Resources()
    assert t.hearing.heard == [], "the turn has its reply: nothing may follow"


async def test_none_is_left_when_the_turn_is_cancelled(turn: Start) -> None:
    t = turn(hang)

    async def whole_turn() -> None:
        async with t.bench.of_turn(t.hearing) as tasks:
            tasks.begin(run())
            await asyncio.Event().wait()

    running = asyncio.create_task(whole_turn())
    await eventually(lambda: len(t.bench.jails.tasks) == 1, timeout=5.0)
    running.cancel()
    await asyncio.wait({running})
    assert not t.bench.jails.tasks
    assert t.bench.reservations.total(0.0) == Resources()


async def test_half_an_answer_is_not_left_on_the_socket(turn: Start) -> None:
    t = turn(work)
    sending, reads = asyncio.Event(), asyncio.Event()

    async def slowly(message: bytes) -> None:
        sending.set()
        await reads.wait()
        t.hearing.heard.append(json.loads(message))

    t.hearing.send = slowly  # type: ignore[method-assign]

    async def whole_turn() -> None:
        async with t.bench.of_turn(t.hearing) as tasks:
            tasks.begin(run("b"))
            tasks.begin(run("c"))
            await sending.wait()

    running = asyncio.create_task(whole_turn())
    await sending.wait()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not running.done()
    reads.set()
    await running
    assert len(t.hearing.heard) == 1, "the one that was under way, whole, and no other"


async def test_without_trust_in_ownership_none_runs(turn: Start) -> None:
    t = turn(hang)
    async with t.bench.of_turn(t.hearing) as tasks:
        tasks.begin(run("b"))
        await eventually(lambda: len(t.bench.jails.tasks) == 1, timeout=5.0)
        tasks.end(suspended())
        assert (await t.heard("b"))["error"]["reason"] == "NODE_SUSPENDED"
        assert not t.bench.jails.tasks
        t.bench.now = 1e9
        tasks.begin(run("c"))
        assert (await t.heard("c"))["error"]["reason"] == "NODE_SUSPENDED"
        assert not t.bench.jails.tasks


async def test_a_jailer_that_refuses_is_told_to_the_agent(turn: Start) -> None:
    t = turn(work)
    t.bench.jails.refusals.append(RoostError(Reason.JAIL_FAILED, "no more uids"))
    assert (await t.result())["error"] == {"reason": "JAIL_FAILED", "message": "no more uids", "hint": ""}
    assert t.bench.reservations.total(0.0) == Resources()


async def test_an_agent_that_reads_no_answers_breaks_the_protocol(turn: Start) -> None:
    t = turn(work)
    t.hearing.send = hang  # type: ignore[method-assign, assignment]

    async def flood() -> None:
        async with t.bench.of_turn(t.hearing) as tasks:
            for _ in range(300):
                tasks.begin(run(argv=[]))
                await asyncio.sleep(0)

    with pytest.raises(RoostError, match="reads none of 256 answers"):
        async with asyncio.timeout(0.5):
            await flood()

"""`turn.run` of the SDK, over a socketpair: what a node would see of it."""

from __future__ import annotations

import asyncio
import base64
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import roost.agent as sdk
from roost import TaskError, TaskResult
from tests.support.sdk import Node, Serve

RESULT = {
    "code": 0,
    "stdout": "",
    "stderr": "",
    "truncated": False,
    "files": {},
    "omitted": [],
    "timed_out": False,
    "out_of_memory": False,
}


def answer(node: Node, asked: dict[str, Any], **fields: Any) -> None:
    node.send(kind="result", id=asked["id"], task=asked["task"], **{**RESULT, **fields})


def begin(node: Node, message: str = "hi", turn_id: str = "t") -> None:
    node.send(kind="turn", id=turn_id, user="ana", message=message)


def test_a_task_is_asked_for_and_its_result_read(serve: Serve) -> None:
    results: list[TaskResult] = []

    def handler(turn: sdk.Turn) -> str:
        files = {"a": b"\xff", "b": "text"}
        limits: Any = {"memory": "64M", "cpu": 0.5, "pids": 16, "timeout": 10}
        results.append(turn.run(["prog", "x"], files=files, outputs=["*.png"], **limits))
        return "ok" if results[0].ok else f"code {results[0].code}"

    node = serve(handler)
    begin(node)
    asked = node.receive()
    task = asked.pop("task")
    assert asked == {
        "kind": "run",
        "id": "t",
        "argv": ["prog", "x"],
        "files": {"a": "/w==", "b": "dGV4dA=="},
        "memory": "64M",
        "cpu": 0.5,
        "pids": 16,
        "timeout": 10,
        "outputs": ["*.png"],
    }
    answer(node, {"id": "t", "task": "of another"})
    answer(node, {"id": "t", "task": task}, code=3, stdout="aGn/", files={"o.png": "/w=="}, omitted=["p.png"])
    assert node.receive()["text"] == "code 3"
    assert results == [TaskResult(3, "hi\ufffd", "", {"o.png": b"\xff"}, False, False, False, ["p.png"])]


def test_a_task_that_can_not_run_raises_and_the_turn_goes_on(serve: Serve) -> None:
    def handler(turn: sdk.Turn) -> str:
        with pytest.raises(TaskError, match=r"no room \(less\)") as caught:
            turn.run(["x"])
        return caught.value.reason

    node = serve(handler)
    begin(node)
    asked = node.receive()
    assert set(asked) == {"kind", "id", "task", "argv", "files", "outputs"}, "the policy says the rest"
    error = {"reason": "NO_ROOM", "message": "no room", "hint": "less"}
    node.send(kind="result", id="t", task=asked["task"], error=error)
    assert node.receive()["text"] == "NO_ROOM"


def by_threads(turn: sdk.Turn) -> str:
    with ThreadPoolExecutor(8) as pool:
        return ",".join(r.stdout for r in pool.map(lambda n: turn.run([str(n)]), range(8)))


async def by_coroutines(turn: sdk.Turn) -> str:
    results = await asyncio.gather(*(turn.run_async([str(n)]) for n in range(20)))
    return ",".join(r.stdout for r in results)


@pytest.mark.parametrize(("handler", "count"), [(by_threads, 8), (by_coroutines, 20)])
def test_several_may_run_at_once(serve: Serve, handler: Callable[..., Any], count: int) -> None:
    node = serve(handler)
    for _ in range(2):
        begin(node)
        asked = [node.receive() for _ in range(count)]
        for one in reversed(asked):
            answer(node, one, stdout=base64.b64encode(one["argv"][0].encode()).decode())
        assert node.receive()["text"] == ",".join(map(str, range(count)))


def test_what_a_turn_leaves_running_ends_with_it(serve: Serve) -> None:
    ended: queue.Queue[Exception] = queue.Queue()
    turns: list[sdk.Turn] = []
    asked_for = threading.Event()

    def left(turn: sdk.Turn) -> None:
        try:
            turn.run(["x"])
        except TaskError as error:
            ended.put(error)

    def handler(turn: sdk.Turn) -> str:
        if turn.message == "leave":
            turns.append(turn)
            threading.Thread(target=left, args=(turn,)).start()
            asked_for.wait(10)
        return "done"

    node = serve(handler)
    begin(node, "leave", "t1")
    asked = node.receive()
    asked_for.set()
    assert node.receive()["text"] == "done"
    answer(node, asked)  # too late
    assert node.turn("hi", "t2")[-1]["text"] == "done"
    assert "the turn ended" in str(ended.get(timeout=10))
    for late in (lambda: turns[0].run(["y"]), lambda: turns[0].say("y")):
        with pytest.raises(RuntimeError, match="this turn has ended"):
            late()
    assert node.turn("hi", "t3")[-1]["text"] == "done", "nothing else was sent"


def test_a_node_that_goes_away_ends_whoever_waits_for_a_task(serve: Serve) -> None:
    ended: queue.Queue[Exception] = queue.Queue()

    def handler(turn: sdk.Turn) -> str:
        try:
            turn.run(["x"])
        except Exception as error:
            ended.put(error)
        return ""

    node = serve(handler)
    begin(node)
    node.receive()
    node.close()
    assert isinstance(ended.get(timeout=10), (TaskError, OSError))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda turn: turn.run("ls -l"), "list of str"),
        (lambda turn: turn.run(["x", 1]), "list of str"),
        (lambda turn: turn.run(["x"], files={"a": bytes((4 << 20) + 1)}), "over 4 MiB"),
        (lambda turn: turn.run(["x" * (9 << 20)]), "over the limit of 8 MiB"),
    ],
)
def test_what_a_node_would_not_take_is_not_sent(serve: Serve, call: Callable[..., Any], error: str) -> None:
    assert error in serve(call).turn("hi")[-1]["message"]

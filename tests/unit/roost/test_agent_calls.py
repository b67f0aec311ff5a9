"""`turn.call` of the SDK, over a socketpair: what a node would see of it."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest

import roost.agent as sdk
from roost import CallError
from roost._effects import hash_of
from tests.support.sdk import Node, Serve


def begin(node: Node) -> None:
    node.send(kind="turn", id="t", user="ana", message="hi")


def answer(node: Node, asked: dict[str, Any], **fields: Any) -> None:
    kind = "called" if asked["kind"] == "call" else "kept"
    node.send(kind=kind, id="t", call=asked["call"], **fields)


def keep(node: Node) -> dict[str, Any]:
    """The end of a call, which is made durable."""
    done = node.receive()
    answer(node, done, **{name: done[name] for name in ("result", "failed") if name in done})
    return done


def test_a_call_is_asked_for_made_and_kept(serve: Serve) -> None:
    made: list[Any] = []

    def pay(amount: int, *, to: str) -> tuple[int, str]:
        made.append((amount, to))
        return amount, to

    node = serve(lambda turn: str(turn.call("pay", pay, 5, to="ben", repeat="never")))
    begin(node)
    asked = node.receive()
    assert asked == {
        "kind": "call",
        "id": "t",
        "call": 0,
        "name": "pay",
        "arguments": hash_of([5], {"to": "ben"}),
        "repeat": "never",
    }
    assert not made
    answer(node, asked, key="")
    assert keep(node) == {"kind": "done", "id": "t", "call": 0, "result": [5, "ben"]}
    assert node.receive()["text"] == "[5, 'ben']", "as JSON has it, in each run"
    assert made == [(5, "ben")]


def test_a_result_that_is_known_is_returned_and_nothing_is_made(serve: Serve) -> None:
    node = serve(lambda turn: str(turn.call("pay", pytest.fail, repeat="never")))
    begin(node)
    answer(node, node.receive(), result={"id": 7})
    assert node.receive()["text"] == "{'id': 7}"


def test_a_keyed_call_gets_its_key(serve: Serve) -> None:
    node = serve(lambda turn: turn.call("pay", lambda *, key: key, repeat="keyed"))
    begin(node)
    answer(node, node.receive(), key="k1")
    assert keep(node)["result"] == "k1"
    assert node.receive()["text"] == "k1"


def test_nobody_waits_for_the_end_of_a_safe_call(serve: Serve) -> None:
    node = serve(lambda turn: turn.call("look", lambda: "seen", repeat="safe"))
    begin(node)
    answer(node, node.receive(), key="")
    assert node.receive() == {"kind": "done", "id": "t", "call": 0, "result": "seen"}
    assert node.receive()["text"] == "seen"


def fails() -> None:
    raise ValueError("no\nmoney")


@pytest.mark.parametrize("known", [False, True])
def test_a_call_that_raised_raises_the_same_in_each_run(serve: Serve, known: bool) -> None:
    def handler(turn: sdk.Turn) -> str:
        try:
            turn.call("pay", fails, repeat="never")
        except CallError as error:
            return f"{error.reason}: {error}"
        return "no error"

    node = serve(handler)
    begin(node)
    if known:
        answer(node, node.receive(), failed="ValueError: no money")
    else:
        answer(node, node.receive(), key="")
        assert keep(node)["failed"] == "ValueError: no money"
    assert node.receive()["text"] == "FAILED: 'pay' failed: ValueError: no money"


def test_what_may_not_be_called_is_not(serve: Serve) -> None:
    node = serve(lambda turn: turn.call("pay", pytest.fail, repeat="never"))
    begin(node)
    error = {"reason": "EFFECT_UNCERTAIN", "message": "nobody knows", "hint": "say so"}
    answer(node, node.receive(), error=error)
    assert node.receive()["message"] == "CallError: nobody knows (say so)"


def test_a_result_that_json_can_not_hold_is_a_failure(serve: Serve) -> None:
    node = serve(lambda turn: turn.call("pay", object, repeat="keyed") if turn else "")
    begin(node)
    answer(node, node.receive(), key="k")
    assert "takes no arguments" in keep(node)["failed"]
    assert node.receive()["kind"] == "error"
    node = serve(lambda turn: turn.call("pay", object, repeat="never"))
    begin(node)
    answer(node, node.receive(), key="")
    assert "must return what JSON can hold" in keep(node)["failed"]
    assert node.receive()["kind"] == "error"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"repeat": "maybe"}, 'repeat is "safe"'),
        ({"name": "", "repeat": "safe"}, "1 to 128 printable"),
        ({"name": "a\x07", "repeat": "safe"}, "1 to 128 printable"),
        ({"repeat": "keyed", "key": 1}, "gets its `key` from turn.call"),
    ],
)
def test_calls_that_make_no_sense_are_told_to_their_author(
    serve: Serve, arguments: dict[str, Any], said: str
) -> None:
    name = arguments.pop("name", "pay")
    node = serve(lambda turn: turn.call(name, print, **arguments))
    begin(node)
    assert said in node.receive()["message"]


def test_an_async_function_needs_an_async_call(serve: Serve) -> None:
    async def later() -> None: ...

    node = serve(lambda turn: turn.call("pay", later, repeat="safe"))
    begin(node)
    assert "call_async" in node.receive()["message"]


def test_several_at_once_have_numbers_in_the_order_in_which_they_were_begun(serve: Serve) -> None:
    async def keyed(turn: sdk.Turn) -> str:
        calls = [
            turn.call_async(f"work {n}", functools.partial(with_key, n), repeat="keyed") for n in range(8)
        ]
        return str(await asyncio.gather(*calls))

    async def with_key(n: int, *, key: str) -> int:
        return int(key) * n

    node = serve(keyed)
    begin(node)
    asked = sorted((node.receive() for _ in range(8)), key=lambda message: message["call"])
    assert [(a["call"], a["name"]) for a in asked] == [(n, f"work {n}") for n in range(8)]
    for one in reversed(asked):
        answer(node, one, key="2")
    for _ in range(8):
        keep(node)
    assert node.receive()["text"] == str([2 * n for n in range(8)])


def test_the_hash_of_arguments_is_of_what_they_say() -> None:
    assert hash_of([1, {"b": 2, "a": 1}], {}) == hash_of([1, {"a": 1, "b": 2}], {})
    assert hash_of([b"x"], {}) == hash_of([b"x"], {})
    assert hash_of([object()], {}) == hash_of([object()], {}), "an address says nothing"
    different: list[tuple[list[Any], dict[str, Any]]]
    different = [([1], {}), ([], {"a": 1}), ([b"x"], {}), ([b"y"], {}), (["x"], {})]
    assert len({hash_of(args, kwargs) for args, kwargs in different}) == 5

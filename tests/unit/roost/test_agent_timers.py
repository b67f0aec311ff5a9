"""`turn.wake_at` and the rest of timers in the SDK, over a socketpair: what a node would see of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import roost.agent as sdk
from tests.support.sdk import Node, Serve


def begin(node: Node, **more: Any) -> None:
    node.send(kind="turn", id="t", user="ana", message="hi", **more)


def test_what_is_set_and_cancelled_is_told(serve: Serve) -> None:
    def handler(turn: sdk.Turn) -> str:
        turn.wake_in(90, "tea", name="kettle")
        turn.wake_at(datetime(2030, 1, 1, tzinfo=UTC))
        turn.wake_at(1e9, "old")
        turn.cancel_wake("kettle")
        return str(turn.timer)

    node = serve(handler)
    begin(node)
    told = [node.receive() for _ in range(4)]
    assert all((m.pop("kind"), m.pop("id")) == ("timer", "t") for m in told)
    assert told == [
        {"name": "kettle", "message": "tea", "after": 90},
        {"name": "wake", "message": "", "at": 1893456000.0},
        {"name": "wake", "message": "old", "at": 1e9},
        {"name": "kettle", "cancel": True},
    ]
    assert node.receive()["text"] == "None"


def test_a_turn_that_a_timer_started_says_which(serve: Serve) -> None:
    node = serve(lambda turn: turn.timer)
    begin(node, timer="kettle")
    assert node.receive()["text"] == "kettle"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda turn: turn.wake_in(0.5), "after 1 s at the soonest"),
        (lambda turn: turn.wake_in(float("nan")), "no number of seconds"),
        (lambda turn: turn.wake_in("5"), "no number of seconds"),
        (lambda turn: turn.wake_at(datetime(2030, 1, 1)), "give it a time zone"),
        (lambda turn: turn.wake_in(5, "x" * 5000), "at most 4 KiB"),
        (lambda turn: turn.wake_in(5, 7), "is a str"),
        (lambda turn: turn.wake_in(5, name=""), "1 to 64 printable"),
        (lambda turn: turn.cancel_wake("a\n"), "1 to 64 printable"),
    ],
)
def test_what_can_not_be_is_told_to_its_author(
    serve: Serve, wrong: Callable[[sdk.Turn], Any], said: str
) -> None:
    node = serve(wrong)
    begin(node)
    assert said in node.receive()["message"]

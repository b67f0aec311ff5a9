"""Calls of a turn without an instance."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from edge_agent.effects import Effects, TurnCalls
from edge_agent.jail.api import Exit
from shared.effects import Call
from shared.identity import InstanceKey
from tests.support.fake_control import FakeControl, Owned

KEY = InstanceKey("default", "probe", "ana")


class Ended:
    """A jail that can only be killed."""

    def __init__(self) -> None:
        self.killed = asyncio.Event()

    async def kill(self) -> Exit:
        self.killed.set()
        return Exit(-9, out_of_memory=False)


def calls_of(
    control: FakeControl, told: list[dict[str, Any]], jail: Ended, recorded: Sequence[Call] = ()
) -> TurnCalls:
    """Those of turn t1. `told` gets what the agent is told."""
    effects = Effects(KEY, 1, control)
    tell = lambda answer: told.append(json.loads(answer))  # noqa: E731
    return TurnCalls(effects, "t1", jail, tell, recorded)  # type: ignore[arg-type]


def no_calls() -> TurnCalls:
    """For turns that make none."""
    return calls_of(FakeControl({KEY: Owned(epoch=1)}), [], Ended())

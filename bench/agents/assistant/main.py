"""The same agent on Roost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from assistant import LOOP, reply

from roost import Agent, Turn

agent = Agent()
# What the framework makes at its first use is made here, once for all forks; and what is called some times is
# written to no more, as the interpreter has made it fit by then.
for message in (LOOP, "a table for two") * 8:
    asyncio.run(reply(message))


@agent.turn
async def answer(turn: Turn) -> AsyncIterator[str]:
    turn.state["turns"] = turn.state.get("turns", 0) + 1
    yield await reply(turn.message)


@agent.warm_up
async def rehearse() -> None:
    await reply("a table for one")

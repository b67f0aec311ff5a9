"""A jail started by each of the three ways, by what a node's daemon starts them with: `edge_agent.starts`."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import assert_never

from edge_agent.control import Agent
from edge_agent.jail.api import Jail, JailSpec
from edge_agent.jail.python import python_argv
from edge_agent.reservations import Reservations
from edge_agent.starts import Exec, FromZygote, Parked, Starts, Way, name_of
from edge_agent.turns import wait_ready
from shared.resources import Resources
from tests.support.egress import no_egress
from tests.support.jailer import RunningJailer

WAYS = ("exec", "zygote", "parked")
_ROOM = Resources(4 << 30, 64_000, 4096)
_SECONDS = 30.0


@asynccontextmanager
async def starts_of(jailer: RunningJailer) -> AsyncIterator[Starts]:
    """Its reconcile loop runs only while somebody waits in `start_by`."""
    starts = Starts(jailer.jails, Reservations("test", _ROOM), no_egress(), time.monotonic)
    try:
        yield starts
    finally:
        await starts.close()


async def start_by(jailer: RunningJailer, starts: Starts, agent: Agent, wanted: str) -> Jail:
    """A jail of `agent`, ready for its first turn, started by the way `wanted` and no other."""
    async with asyncio.timeout(_SECONDS):
        while True:
            for way in starts.ways(agent, "", is_new_here=True):
                if name_of(way) == wanted:
                    return await _started(jailer, agent, way)
            await starts.reconcile()
            await asyncio.sleep(0.2)


async def _started(jailer: RunningJailer, agent: Agent, way: Way) -> Jail:
    match way:
        case Parked(jail):
            return jail
        case FromZygote(zygote):
            pass
        case Exec():
            zygote = ""
        case _:
            assert_never(way)
    argv = python_argv(agent.policy.run.entry)
    jail_id = f"{agent.version}-{uuid.uuid4().hex[:16]}"
    jail = await jailer.jails.make(
        JailSpec(jail_id, agent.version, argv, limits=agent.policy.need, zygote=zygote)
    )
    await jail.start()
    await wait_ready(jail, _SECONDS)
    return jail

"""While memory is short, the idle sleep and nobody else: with jails that are fake, on a clock that stands."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.pool import PAUSE
from edge_agent.pressure import Reading
from edge_agent.relief import ReliefLoop
from shared.errors import RoostError
from tests.unit.edge_agent.test_instance import Bench, bench  # noqa: F401
from tests.unit.edge_agent.test_supervisor import ANA, BEN, say, supervisor_of

SHORT, ENOUGH = Reading(0.5, 0.04), Reading(0.0, 0.6)


async def test_the_idlest_sleeps_and_one_in_a_turn_never(bench: Bench) -> None:  # noqa: F811
    supervisor = supervisor_of(bench)
    readings = [SHORT]
    loop = ReliefLoop(lambda: readings[0], supervisor, bench.parts.starts, lambda: bench.now[0])
    await say(supervisor, ANA, "one")
    bench.now[0] = 3.0
    await say(supervisor, BEN, "one")
    bench.now[0] = 7.0
    await loop.reconcile()
    assert {i.key for i in supervisor.idle()} == {BEN}, "ben has been idle for 4 s"
    bench.now[0] = 9.0
    turn = asyncio.create_task(say(supervisor, BEN, "hang"))
    while not supervisor._instances[BEN].busy:  # noqa: ASYNC110
        await asyncio.sleep(0)
    await loop.reconcile()
    assert supervisor._instances[BEN].busy
    assert list(bench.jails.running), "in the middle of a turn"
    turn.cancel()
    await asyncio.gather(turn, return_exceptions=True)
    assert await say(supervisor, ANA, "two") == "one,two", "it wakes, pressure or not"
    bench.now[0] = 100.0
    readings[0] = ENOUGH
    await loop.reconcile()
    assert ANA in {i.key for i in supervisor.idle()}


async def test_nothing_is_parked_while_memory_is_short(bench: Bench) -> None:  # noqa: F811
    starts = bench.parts.starts
    supervisor = supervisor_of(bench)
    readings = [ENOUGH]
    loop = ReliefLoop(lambda: readings[0], supervisor, starts, lambda: bench.now[0])
    await say(supervisor, ANA, "one")
    bench.now[0] += 2 * PAUSE
    for _ in range(3):
        await starts.reconcile()
        await asyncio.gather(*starts._tasks)
    assert starts.parked == 1
    readings[0] = SHORT
    bench.now[0] = 10.0
    await loop.reconcile()
    assert {i.key for i in supervisor.idle()} == {ANA}, "parked ones go first"
    await starts.reconcile()
    await asyncio.gather(*starts._tasks)
    assert starts.parked == 0
    await loop.reconcile()
    assert supervisor.idle() == []
    await starts.reconcile()
    assert not starts._tasks, "and none is made anew"
    readings[0] = ENOUGH
    await loop.reconcile()
    await starts.reconcile()
    await asyncio.gather(*starts._tasks)
    assert starts.parked == 1


async def test_a_machine_that_says_nothing_is_a_failed_pass(bench: Bench) -> None:  # noqa: F811
    def unreadable() -> Reading:
        raise OSError("no /proc")

    loop = ReliefLoop(unreadable, supervisor_of(bench), bench.parts.starts, lambda: 0.0)
    with pytest.raises(RoostError, match="memory"):
        await loop.reconcile()

"""What an instance that waits for its user takes of the daemon's memory: a node has thousands of them."""

from __future__ import annotations

import asyncio
import gc
import os
import tracemalloc
import weakref
from dataclasses import replace

from edge_agent.control import Agent
from edge_agent.jail.api import Jail
from edge_agent.jail.cgroups.freezing import Freezing
from edge_agent.jail.jailed import JailedAgent
from edge_agent.jail.wire import Wire, pair
from edge_agent.tasks import Tasks, TurnTasks
from shared.resources import Resources
from tests.support.fake_control import POLICY
from tests.unit.edge_agent.test_instance import Bench, bench
from tests.unit.edge_agent.test_supervisor import ANA, BEN, say, supervisor_of

__all__ = ["bench"]

_JAILS = 50
_MOST = 3000  # bytes of a jail's object, with its sockets


class WatchedTasks(Tasks):
    """Knows which of those that it gave out are kept by somebody."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.kept: weakref.WeakSet[TurnTasks] = weakref.WeakSet()

    def of_turn(self, agent: Agent, jail: Jail, turn_id: str) -> TurnTasks:
        made = super().of_turn(agent, jail, turn_id)
        self.kept.add(made)
        return made


async def test_nothing_of_a_turn_that_has_ended_is_kept(bench: Bench) -> None:
    parts = bench.parts
    tasks = WatchedTasks(bench.jails, parts.reservations, parts.tenure, parts.clock)
    bench.parts = replace(parts, tasks=tasks)
    supervisor = supervisor_of(bench)
    for key in (ANA, BEN):
        await say(supervisor, key, "task ls")
        await say(supervisor, key, "two")
    gc.collect()
    assert len(bench.jails.running) == 2
    assert not tasks.kept


def test_instances_of_a_version_share_what_is_known_of_it() -> None:
    one, other = (Agent.of("v1", POLICY.encode().decode(), "0" * 64) for _ in range(2))
    assert one is other


async def _answered(jail: JailedAgent, init: Wire) -> None:
    asking = asyncio.create_task(jail.files.remove("x"))
    await asyncio.sleep(0)
    (frame,) = init.receive()
    init.send({"id": frame.body["id"], "ok": {}})
    await asking


async def test_a_jail_that_does_nothing_takes_little() -> None:
    ends = [(pair(), pair()) for _ in range(_JAILS)]
    inits = [Wire(inner) for (_, inner), _ in ends]
    limits = Resources(1 << 20, 1000, 10)
    gc.collect()
    tracemalloc.start()
    try:
        jails = [
            JailedAgent(
                None,  # type: ignore[arg-type]
                f"jail-{n}",
                True,
                limits,
                control.detach(),
                turns.detach(),
                Freezing((os.open(os.devnull, os.O_RDWR),)),
            )
            for n, ((control, _), (turns, _)) in enumerate(ends)
        ]
        for jail, init in zip(jails, inits, strict=True):
            await _answered(jail, init)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    for jail in jails:
        jail._control.close()
        jail._turns.close()
        jail._freezing.close()
    for wire, (_, (_, agents)) in zip(inits, ends, strict=True):
        wire.close()
        agents.close()
    assert taken / _JAILS < _MOST

"""When somebody is asked to look at a jail's /state: with a group and a jail that are not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edge_agent.jail.cell import Running
from edge_agent.jail.cgroups.base import Usage
from edge_agent.jail.shares import Shares


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.cpu = 1.0
        self.asked = 0
        groups: Any = SimpleNamespace(usage=lambda jail_id: Usage(0, self.cpu, 1, 0))
        loop: Any = None  # of no use here
        self.shares = Shares(groups, loop, self._ask, lambda: self.now)
        self.cell: Any = SimpleNamespace(
            jail_id="a",
            phase=Running(),
            measuring=None,
            measure_after=0.0,
            cpu_seconds=0.0,
        )

    def _ask(self, cell: Any) -> None:
        assert cell is self.cell
        self.asked += 1


def test_one_that_did_nothing_is_not_asked() -> None:
    world = World()
    world.shares.measure(world.cell)
    world.shares.measured(world.cell)
    world.shares.measure(world.cell)
    assert world.asked == 1
    world.cpu += 1
    world.shares.measure(world.cell)
    assert world.asked == 2


def test_one_that_has_not_answered_is_not_asked_again() -> None:
    world = World()
    for _ in range(3):
        world.cpu += 1
        world.shares.measure(world.cell)
    assert world.asked == 1


def test_a_large_state_is_looked_at_less_often_but_not_seldom() -> None:
    for took, pause in ((0.01, 0.2), (0.2, 4.0), (5.0, 10.0)):
        world = World()
        world.shares.measure(world.cell)
        world.now += took
        world.shares.measured(world.cell)
        world.cpu += 1
        world.now += pause - 0.01
        world.shares.measure(world.cell)
        assert world.asked == 1
        world.now += 0.02
        world.shares.measure(world.cell)
        assert world.asked == 2

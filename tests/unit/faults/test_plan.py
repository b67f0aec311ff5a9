"""A plan is a function of its seed, and aims at everything."""

from __future__ import annotations

from itertools import islice

from tests.faults.plan import COORDINATORS, ETCDS, NODES, USERS, WEIGHTS, Fault, draw
from tests.support import failpoints

TTL = 2.0


def plan(seed: int, count: int) -> list[Fault]:
    return list(islice(draw(seed, TTL), count))


def test_the_same_seed_gives_the_same_plan() -> None:
    assert plan(7, 200) == plan(7, 200)
    assert plan(7, 200) != plan(8, 200)
    assert plan(7, 50) == plan(7, 200)[:50]


def test_three_hundred_faults_are_of_every_kind_and_at_every_part() -> None:
    faults = plan(1, 300)
    assert {fault.kind for fault in faults} == set(WEIGHTS)
    assert {fault.target for fault in faults} >= {*USERS, *NODES, *COORDINATORS, *ETCDS}
    points = {fault.detail.split()[0] for fault in faults if fault.kind == "failpoint"}
    assert points == {*failpoints.NODE, *failpoints.COORDINATOR}


def test_they_last_shorter_and_longer_than_a_node_may_be_silent() -> None:
    seconds = [fault.seconds for fault in plan(1, 300)]
    assert 0 < min(seconds) < TTL / 3 < TTL * 1.5 < max(seconds)

"""How many jails wait for users."""

from __future__ import annotations

from edge_agent.pool import FEW, MOST, PAUSE, QUIET, SOON, WINDOW, Demand, at_once, decide, to_warm
from shared.resources import Resources

NEED = Resources(100, 100, 10)
PLENTY = Resources(10**9, 10**9, 10**9)


def demand(*starts: float, waiting: int = 0) -> Demand:
    return Demand(NEED, starts, waiting)


def test_nothing_is_parked_for_what_nobody_started() -> None:
    assert decide({}, PLENTY, 0.0) == {}
    assert decide({"a": demand()}, PLENTY, 0.0) == {}


def test_it_grows_with_each_start_and_shrinks_to_one_and_to_none() -> None:
    assert decide({"a": demand(0.0)}, PLENTY, 2 * PAUSE) == {"a": 1}
    assert decide({"a": demand(0.0, 1.0, 2.0, waiting=1)}, PLENTY, 2.0 + 2 * PAUSE) == {"a": 2}
    assert decide({"a": demand(0.0, 1.0, 2.0, waiting=3)}, PLENTY, 2.0 + WINDOW) == {"a": -2}
    assert decide({"a": demand(0.0, waiting=1)}, PLENTY, WINDOW) == {}
    assert decide({"a": demand(0.0, waiting=1)}, PLENTY, QUIET) == {"a": -1}


def test_who_has_just_come_is_not_disturbed_while_enough_wait() -> None:
    assert decide({"a": demand(0.0)}, PLENTY, PAUSE / 2) == {}
    assert decide({"a": demand(0.0, 1.0, 2.0, waiting=1)}, PLENTY, 2.0 + PAUSE / 2) == {}
    assert decide({"a": demand(0.0, 1.0, 2.0, 2.1, waiting=1)}, PLENTY, 2.1) == {"a": 3}, "too few"
    assert decide({"a": demand(0.0, waiting=3)}, PLENTY, 0.0) == {"a": -2}, "only making is put off"


def test_a_flood_is_bounded() -> None:
    flooded = demand()
    for i in range(1000):
        flooded = flooded.started(i / 1000)
    assert decide({"a": flooded}, PLENTY, 1.0) == {"a": MOST}


def test_it_gives_way_to_instances() -> None:
    demands = {"a": demand(0.0, 0.1, 0.2, waiting=3)}
    assert decide(demands, Resources(250, 10**9, 10**9), 1.0) == {"a": -1}
    assert decide(demands, Resources(0, 0, 0), 1.0) == {"a": -3}
    assert decide(demands, Resources(-100, 5, 5), 1.0) == {"a": -3}, "over capacity"


def test_scarce_room_goes_to_what_was_wanted_last() -> None:
    demands = {"old": demand(0.0, 0.1, waiting=2), "new": demand(1.0, 1.1)}
    assert decide(demands, Resources(300, 10**9, 10**9), 2.0) == {"new": 2, "old": -1}


def test_one_at_a_time_while_enough_wait() -> None:
    assert at_once(demand(0.0, 0.1, 0.2, 0.3, waiting=2), 1.0) == 1
    assert at_once(demand(0.0, 0.1, 0.2, 0.3, waiting=1), 1.0) == 2
    assert at_once(demand(0.0), 1.0) == 1


def test_those_who_come_next_find_warm_ones() -> None:
    five = demand(0.0, 1.0, 2.0, 3.0, 4.0, waiting=5)
    assert to_warm(five, 0, 5, 5.0) == 5, "as many as came of late"
    assert to_warm(five, 0, 5, 2.0 + SOON) == 2, "those of the last seconds"
    assert to_warm(five, 0, 5, 60.0) == FEW, "always a few"
    assert to_warm(five, 3, 2, 5.0) == 2
    assert to_warm(five, 5, 0, 5.0) == 0
    assert to_warm(five, 5, 4, 60.0) == 0, "none gets cold again"


def test_no_more_get_warm_than_wait_cold() -> None:
    assert to_warm(demand(0.0, waiting=1), 0, 1, 1.0) == 1
    assert to_warm(demand(0.0, waiting=1), 0, 0, 1.0) == 0, "it is on its way"
    assert to_warm(demand(0.0, waiting=1), 1, 0, 1.0) == 0


def test_nothing_gets_warm_beside_who_has_just_come_while_enough_are() -> None:
    four = demand(0.0, 0.1, 0.2, 0.3, waiting=4)
    assert to_warm(four, 2, 2, 0.3 + PAUSE / 2) == 0
    assert to_warm(four, 2, 2, 0.3 + 2 * PAUSE) == 2
    assert to_warm(four, 1, 3, 0.3 + PAUSE / 2) == 3, "too few"


def test_acting_on_the_answer_settles() -> None:
    demands = {name: demand(0.0, 1.0) for name in "abc"}
    spare = Resources(500, 10**9, 10**9)
    changes = decide(demands, spare, 2.0)
    acted = {n: Demand(NEED, d.starts, d.waiting + changes.get(n, 0)) for n, d in demands.items()}
    assert sum(d.waiting for d in acted.values()) == 5
    assert decide(acted, spare, 2.0) == {}

"""Room on a node: never promised twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.reservations import Reservations
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources, fits

SMALL = Resources(100, 100, 10)
CAPACITY = Resources(250, 1000, 100)


def key(n: int) -> InstanceKey:
    return InstanceKey("default", "probe", f"u{n}")


def test_full_means_no_and_says_what_is_taken() -> None:
    room = Reservations("edge-1", CAPACITY)
    room.claim(key(1), 1, SMALL, now=0)
    room.reserve(key(2), 1, SMALL, now=0, hold=10)
    with pytest.raises(RoostError, match="no room for default/probe/u3") as caught:
        room.claim(key(3), 1, SMALL, now=5)
    assert caught.value.reason is Reason.NODE_FULL


def test_a_task_takes_room_as_an_instance_does() -> None:
    room = Reservations("edge-1", CAPACITY)
    room.claim(key(1), 1, SMALL, now=0)
    room.claim("task-1", 0, SMALL, now=0)
    with pytest.raises(RoostError, match="no room for task-2"):
        room.claim("task-2", 0, SMALL, now=0)
    room.release("task-1", 0)
    room.claim("task-2", 0, SMALL, now=0)


def test_a_reservation_that_nobody_claims_runs_out() -> None:
    room = Reservations("edge-1", CAPACITY)
    room.reserve(key(1), 1, Resources(250, 1, 1), now=0, hold=10)
    room.claim(key(2), 1, SMALL, now=10)
    assert room.total(10) == SMALL


def test_a_claim_on_what_is_reserved_counts_once_and_stays() -> None:
    room = Reservations("edge-1", CAPACITY)
    room.reserve(key(1), 1, Resources(250, 1, 1), now=0, hold=10)
    room.claim(key(1), 1, Resources(250, 1, 1), now=9)
    room.reserve(key(1), 1, Resources(250, 1, 1), now=9, hold=10)  # of the next epoch, say
    assert room.total(1000) == Resources(250, 1, 1)
    room.release(key(1), 1)
    assert room.total(1000) == Resources()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reserve", "claim", "release"]),
            st.integers(0, 5),
            st.integers(0, 150),
            st.floats(0, 5),
        )
    )
)
def test_never_more_than_the_capacity(steps: list[tuple[str, int, int, float]]) -> None:
    room, now = Reservations("edge-1", CAPACITY), 0.0
    for what, n, memory, pause in steps:
        now += pause
        try:
            match what:
                case "reserve":
                    room.reserve(key(n), 1, Resources(memory, 10, 1), now, hold=3)
                case "claim":
                    room.claim(key(n), 1, Resources(memory, 10, 1), now)
                case _:
                    room.release(key(n), 1)
        except RoostError as error:
            assert error.reason is Reason.NODE_FULL
        assert fits(Resources(), room.total(now), CAPACITY)

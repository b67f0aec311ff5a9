"""Who sleeps when memory is short."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.pressure import LEAST_IDLE, Idle, MachineMemory, Reading, decide
from shared.identity import InstanceKey

PLENTY = Reading(0.0, 0.5)
STALLED = Reading(0.3, 0.15)
SCARCE = Reading(0.0, 0.03)


def idle(count: int, since: float = 0.0) -> list[Idle]:
    return [Idle(InstanceKey("t", "a", f"u{n:03}"), since + n) for n in range(count)]


def test_with_plenty_nobody_sleeps() -> None:
    assert decide(PLENTY, False, 3, idle(50), 100.0).sleep == ()
    assert not decide(PLENTY, False, 3, idle(50), 100.0).end_parked


def test_an_agent_at_a_limit_of_its_own_sends_nobody_to_sleep() -> None:
    waiting = decide(Reading(1.0, 0.5), False, 0, idle(50), 100.0)
    assert (waiting.pressed, waiting.sleep) == (False, ())


@pytest.mark.parametrize("reading", [STALLED, SCARCE])
def test_parked_jails_go_first_then_the_idlest(reading: Reading) -> None:
    first = decide(reading, False, 2, idle(20), 100.0)
    assert (first.pressed, first.end_parked, first.sleep) == (True, True, ())
    second = decide(reading, True, 0, idle(20), 100.0)
    assert second.end_parked, "and no new ones"
    assert second.sleep == tuple(i.key for i in idle(3)), "an eighth, rounded up"
    assert len(decide(reading, True, 0, idle(1), 100.0).sleep) == 1


def test_who_was_talked_to_just_now_stays() -> None:
    assert decide(SCARCE, True, 0, idle(1), LEAST_IDLE - 0.1).sleep == ()
    assert len(decide(SCARCE, True, 0, idle(1), LEAST_IDLE).sleep) == 1


def test_it_does_not_flap() -> None:
    between = Reading(0.05, 0.15)
    assert not decide(between, False, 0, [], 0.0).pressed, "not begun"
    assert decide(between, True, 0, [], 0.0).pressed, "not ended"
    little = Reading(0.0, 0.06)
    assert not decide(little, False, 0, [], 0.0).pressed
    assert decide(little, True, 0, [], 0.0).pressed
    assert not decide(Reading(0.0, 0.1), True, 0, [], 0.0).pressed


@given(
    st.builds(Reading, st.floats(0, 1), st.floats(0, 1)),
    st.booleans(),
    st.integers(0, 3),
    st.lists(st.floats(0, 100), max_size=40),
)
def test_only_the_idlest_ever_sleep(reading: Reading, pressed: bool, parked: int, since: list[float]) -> None:
    who = [Idle(InstanceKey("t", "a", f"u{n}"), at) for n, at in enumerate(since)]
    relief = decide(reading, pressed, parked, who, 100.0)
    assert not (relief.sleep and (parked or not relief.pressed))
    asleep = [i.since for i in who if i.key in relief.sleep]
    awake = [i.since for i in who if i.key not in relief.sleep]
    assert not asleep or max(asleep) <= min(awake, default=100.0)
    assert all(100.0 - at >= LEAST_IDLE for at in asleep)


def test_what_the_kernel_says(tmp_path: Path) -> None:
    now = [0.0]
    memory = MachineMemory(lambda: now[0], tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree:  10 kB\nMemAvailable:  250 kB\n")
    assert memory.read() == Reading(0.0, 0.25), "a kernel without pressure"
    (tmp_path / "pressure").mkdir()

    def stalled(total: int) -> None:
        text = f"some avg10=9.00 avg60=0.00 avg300=0.00 total={total}\nfull avg10=0.00 total=7\n"
        (tmp_path / "pressure/memory").write_text(text)

    stalled(5_000_000)
    assert memory.read().stalled == 0.0, "nothing to compare with"
    stalled(5_500_000)
    now[0] = 2.0
    assert memory.read() == Reading(0.25, 0.25)
    now[0] = 4.0
    assert memory.read().stalled == 0.0, "over at once, whatever the averages say"


def test_this_machine_can_be_read() -> None:
    reading = MachineMemory().read()
    assert 0 < reading.available <= 1

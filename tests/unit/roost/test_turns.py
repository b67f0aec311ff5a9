"""What a client does next: the decision alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roost._turns import Failed, Failure, GiveUp, Progress, Refused, ResolveAgain, SendAgain, Step, decide
from shared.errors import Reason, Remedy, RoostError

PLENTY = 60.0


def error(reason: Reason) -> RoostError:
    return RoostError(reason, "it did not work")


def replay(*failures: Failure) -> list[Step]:
    """The steps that a turn with these failures takes."""
    progress = Progress()
    steps = []
    for failure in failures:
        progress, step = decide(progress, failure, PLENTY)
        steps.append(step)
    return steps


@pytest.mark.parametrize("reason", [r for r in Reason if error(r).remedy is Remedy.GIVE_UP])
def test_what_trying_again_cannot_help_ends_the_turn(reason: Reason) -> None:
    for failure in (Failed("north", error(reason)), Refused(error(reason))):
        (step,) = replay(failure)
        assert step == GiveUp(failure.error)


@pytest.mark.parametrize(
    "reason", [Reason.NODE_FULL, Reason.NODE_UNREACHABLE, Reason.NODE_STOPPING, Reason.NODE_SUSPENDED]
)
def test_a_node_that_failed_is_excluded_at_once(reason: Reason) -> None:
    progress, step = decide(Progress(), Failed("north", error(reason)), PLENTY)
    assert step == ResolveAgain(0.0)
    assert progress.exclude == {"north"}


def test_each_further_node_is_excluded_too_and_a_repeated_one_ends_the_round() -> None:
    progress = Progress()
    for node in ("north", "south"):
        progress, step = decide(progress, Failed(node, error(Reason.NODE_UNREACHABLE)), PLENTY)
        assert step == ResolveAgain(0.0)
    assert progress.exclude == {"north", "south"}
    progress, step = decide(progress, Failed("north", error(Reason.NODE_UNREACHABLE)), PLENTY)
    assert step == ResolveAgain(0.05)
    assert progress == Progress(pauses=1), "after a pause all nodes may be asked again"


def test_when_the_coordinators_have_no_other_node_the_round_is_over() -> None:
    excluding = Progress(exclude=frozenset({"north"}))
    for reason in (Reason.NO_ROOM, Reason.NODE_UNREACHABLE):
        assert decide(excluding, Refused(error(reason)), PLENTY) == (Progress(pauses=1), ResolveAgain(0.05))


@pytest.mark.parametrize(
    "reason",
    [Reason.TICKET_EXPIRED, Reason.TICKET_WRONG_NODE, Reason.EPOCH_STALE, Reason.TURN_NOT_COMMITTED],
)
def test_a_ticket_is_renewed_once_a_round_without_excluding_its_node(reason: Reason) -> None:
    failure = Failed("north", error(reason))
    assert replay(failure, failure, failure) == [ResolveAgain(0.0), ResolveAgain(0.05), ResolveAgain(0.0)]
    assert decide(Progress(), failure, PLENTY)[0].exclude == frozenset()


def test_a_node_that_asks_for_patience_gets_the_same_turn_again() -> None:
    assert replay(Failed("north", error(Reason.STORE_UNAVAILABLE))) == [SendAgain(0.05)]


def test_pauses_double_up_to_a_second() -> None:
    steps = replay(*[Refused(error(Reason.COORDINATOR_UNREACHABLE))] * 7)
    pauses = [step.pause for step in steps if isinstance(step, ResolveAgain)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_at_the_deadline_it_gives_up_with_the_last_error() -> None:
    last = error(Reason.NO_ROOM)
    assert decide(Progress(), Refused(last), 0.04)[1] == GiveUp(last), "the pause would outlast the deadline"
    unreachable = error(Reason.NODE_UNREACHABLE)
    assert decide(Progress(), Failed("north", unreachable), -0.1)[1] == GiveUp(unreachable)


failures = st.one_of(
    st.builds(
        Failed, st.sampled_from(["north", "south", "cloud"]), st.builds(error, st.sampled_from(Reason))
    ),
    st.builds(Refused, st.builds(error, st.sampled_from(Reason))),
)


@given(st.lists(failures, max_size=60))
def test_whatever_the_mesh_answers_there_is_no_busy_loop(sequence: list[Failure]) -> None:
    at_once = 0  # tries since the last pause
    progress = Progress()
    for failure in sequence:
        progress, step = decide(progress, failure, PLENTY)
        match step:
            case GiveUp(reason):
                assert reason.remedy is Remedy.GIVE_UP
                return
            case SendAgain(pause) | ResolveAgain(pause):
                at_once = 0 if pause else at_once + 1
        assert at_once <= 4, "three nodes and one ticket"

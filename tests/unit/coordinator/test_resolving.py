from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.records import NodeRecord, NodeState, Phase, Stored
from coordinator.resolving import Answer, Challenge, Move, Wake, decide
from tests.unit.coordinator.support import info, instance

NOBODY: frozenset[str] = frozenset()


def record(phase: Phase = Phase.LIVE) -> Stored[object]:
    return Stored(instance(phase=phase), 5)


def owner(state: NodeState = NodeState.UP, draining: bool = False) -> NodeRecord:
    return NodeRecord(info("a"), "me", state, draining)


def test_a_new_instance_is_placed() -> None:
    assert decide(None, None, NOBODY) == Move(None)


def test_a_live_owner_is_the_answer() -> None:
    for phase in (Phase.LIVE, Phase.PLACED):
        assert decide(record(phase), owner(), NOBODY) == Answer(record(phase))  # type: ignore[arg-type]


def test_a_sleeper_is_woken_where_it_sleeps() -> None:
    asleep = record(Phase.HIBERNATED)
    assert decide(asleep, owner(), NOBODY) == Wake(asleep)  # type: ignore[arg-type]


def test_a_lost_or_forgotten_owner_is_left_for_good() -> None:
    for gone in (owner(NodeState.LOST), None):
        assert decide(record(), gone, NOBODY) == Move(record(), "is lost")  # type: ignore[arg-type]


def test_an_owner_that_failed_the_client_is_asked_about_before_anything_moves() -> None:
    assert decide(record(), owner(), frozenset({"a"})) == Challenge(record())  # type: ignore[arg-type]
    assert decide(record(), owner(NodeState.LOST), frozenset({"a"})) == Move(record(), "is lost")  # type: ignore[arg-type]
    assert decide(record(), owner(), frozenset({"b"})) == Answer(record())  # type: ignore[arg-type]


def test_a_draining_owner_gives_it_up_if_it_can() -> None:
    assert decide(record(), owner(draining=True), NOBODY) == Move(record(), "is draining", may_stay=True)  # type: ignore[arg-type]


@given(
    st.sampled_from(Phase), st.sampled_from(NodeState), st.booleans(), st.frozensets(st.sampled_from("ab"))
)
def test_only_a_live_owner_that_is_not_excluded_is_ever_the_answer(
    phase: Phase, state: NodeState, draining: bool, exclude: frozenset[str]
) -> None:
    step = decide(record(phase), owner(state, draining), exclude)  # type: ignore[arg-type]
    if isinstance(step, Answer | Wake):
        assert state is NodeState.UP
        assert "a" not in exclude

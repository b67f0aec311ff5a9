from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.liveness import EndLink, LinkView, MarkLost, Observed, Pulse, absences, decide
from coordinator.records import NodeState
from tests.unit.coordinator.support import node

TTL = 6.0


def observed(**changes: object) -> Observed:
    values: dict[str, object] = {"me": "me", "vouches": True, "ttl": TTL, "grace_from": 0.0, "nodes": {}}
    return Observed(**{**values, **changes})  # type: ignore[arg-type]


def lost_nodes(seen: Observed, now: float) -> list[str]:
    return [a.node.value.info.id for a in decide(seen, now) if isinstance(a, MarkLost)]


def test_a_node_whose_heartbeats_come_is_left_alone() -> None:
    seen = observed(nodes={"a": node("a")}, links={"a": LinkView("s1", 5, heard=100.0)})
    assert decide(seen, 100.0 + TTL) == []


def test_a_silent_node_is_lost_after_the_ttl_and_not_before() -> None:
    seen = observed(nodes={"a": node("a")}, links={"a": LinkView("s1", 5, heard=100.0)})
    assert decide(seen, 106.1) == [MarkLost(node("a"), None, "silent for 6.1 s")]


def test_a_link_that_ended_is_silence_from_the_last_word_on() -> None:
    seen = observed(nodes={"a": node("a")}, heard={"a": 100.0})
    assert lost_nodes(seen, 105.9) == []
    assert lost_nodes(seen, 106.1) == ["a"]


def test_a_node_never_heard_here_has_a_ttl_from_when_this_process_began() -> None:
    seen = observed(nodes={"a": node("a")}, grace_from=200.0)
    assert lost_nodes(seen, 205.9) == []
    assert lost_nodes(seen, 206.1) == ["a"]


def test_a_node_that_said_goodbye_is_lost_at_once_and_only_to_the_coordinator_that_heard_it() -> None:
    link = {"a": LinkView("s1", 5, heard=100.0)}
    [action] = decide(observed(nodes={"a": node("a")}, links=link, left=frozenset("a")), 100.1)
    assert isinstance(action, MarkLost)
    assert "goodbye" in action.why
    assert decide(observed(nodes={"a": node("a", "other")}, left=frozenset("a")), 100.1) == []


def test_after_a_sleep_of_this_process_silence_starts_anew() -> None:
    seen = observed(nodes={"a": node("a")}, links={"a": LinkView("s1", 5, heard=100.0)}, grace_from=500.0)
    assert lost_nodes(seen, 505.0) == []
    assert lost_nodes(seen, 506.1) == ["a"]


def test_who_does_not_hold_its_own_lease_calls_nobody_lost() -> None:
    seen = observed(nodes={"a": node("a"), "b": node("b", "gone")}, absent_since={"gone": 0.0}, vouches=False)
    assert decide(seen, 1e6) == []


def test_nodes_of_a_coordinator_that_lives_are_its_business() -> None:
    assert decide(observed(nodes={"a": node("a", "other")}), 1e6) == []


def test_nodes_of_an_absent_coordinator_are_lost_after_a_full_ttl() -> None:
    seen = observed(nodes={"a": node("a", "other")}, absent_since={"other": 100.0})
    assert lost_nodes(seen, 105.9) == []
    assert decide(seen, 106.1) == [
        MarkLost(node("a", "other"), "other", "its coordinator other has been gone for 6.1 s")
    ]


def test_after_a_sleep_of_this_process_absence_starts_anew() -> None:
    seen = observed(nodes={"a": node("a", "other")}, absent_since={"other": 100.0}, grace_from=500.0)
    assert lost_nodes(seen, 505.0) == []
    assert lost_nodes(seen, 506.1) == ["a"]


def test_a_lost_node_is_not_lost_again() -> None:
    assert decide(observed(nodes={"a": node("a", state=NodeState.LOST)}), 1e6) == []


def test_a_link_ends_when_the_node_is_linked_elsewhere_or_lost_or_replaced() -> None:
    link = {"a": LinkView("s1", 5, heard=100.0)}
    for newer, replaced in (
        (node("a", "other", revision=6), False),
        (node("a", state=NodeState.LOST, revision=6), False),
        (node("a", started_id="s2", revision=6), True),
        (node("a", "other", started_id="s2", revision=6), True),
    ):
        [action] = decide(observed(nodes={"a": newer}, links=link), 101.0)
        assert isinstance(action, EndLink)
        assert action.replaced is replaced


def test_a_record_older_than_the_registration_ends_nothing() -> None:
    link = {"a": LinkView("s1", 5, heard=100.0)}
    assert decide(observed(nodes={"a": node("a", "other", revision=4)}, links=link), 101.0) == []


def test_a_drained_node_keeps_its_link() -> None:
    link = {"a": LinkView("s1", 5, heard=100.0)}
    assert decide(observed(nodes={"a": node("a", revision=9)}, links=link), 101.0) == []


def test_absence_is_counted_from_when_it_was_first_seen_and_forgotten_on_return() -> None:
    nodes = [node("a", "other").value, node("b", "me").value, node("c", "dead", NodeState.LOST).value]
    first = absences({}, nodes, [], "me", 10.0)
    assert first == {"other": 10.0}
    assert absences(first, nodes, [], "me", 20.0) == {"other": 10.0}
    back = absences(first, nodes, ["other"], "me", 30.0)
    assert back == {}
    assert absences(back, nodes, [], "me", 40.0) == {"other": 40.0}


def test_a_gap_between_beats_is_a_sleep() -> None:
    pulse = Pulse(0.0, limit=3.0)
    for now in (1.0, 2.0, 4.9):
        pulse.beat(now)
    assert pulse.grace_from == 0.0
    pulse.beat(8.0)
    assert pulse.grace_from == 8.0
    pulse.beat(9.0)
    assert pulse.grace_from == 8.0


times = st.floats(0, 30)  # against a TTL of 6: both outcomes are common


@given(times, times, st.none() | times, st.sampled_from(["me", "other"]), st.none() | times, times)
def test_nobody_is_lost_within_a_ttl_of_any_sign_of_life(
    grace: float, heard: float, linked: float | None, coordinator: str, absent: float | None, now: float
) -> None:
    seen = observed(
        nodes={"a": node("a", coordinator)},
        links={"a": LinkView("s1", 5, linked)} if linked is not None and coordinator == "me" else {},
        heard={"a": heard},
        absent_since={"other": absent} if absent is not None else {},
        grace_from=grace,
    )
    if lost_nodes(seen, now):
        assert now - grace > TTL
        if coordinator == "me":
            assert now - (heard if linked is None else linked) > TTL
        else:
            assert absent is not None
            assert now - absent > TTL

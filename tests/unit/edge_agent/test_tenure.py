"""A node's belief in itself runs out before the coordinator's does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_agent.tenure import TRUSTED_SHARE, Tenure


def test_a_new_node_is_not_trusted() -> None:
    assert not Tenure().trusted(0.0)


def test_counts_from_when_the_heartbeat_was_sent() -> None:
    tenure = Tenure()
    tenure.welcomed(sent_at=100.0, ttl=6.0)
    assert tenure.trusted(103.9)
    assert not tenure.trusted(104.0)
    tenure.sent(1, 103.0)
    tenure.sent(2, 105.0)
    tenure.acknowledged(1)  # however late the answer came
    assert tenure.trusted_until() == 107.0
    tenure.acknowledged(2)
    assert tenure.trusted_until() == 109.0


def test_unknown_and_late_acknowledgements_count_for_nothing() -> None:
    tenure = Tenure()
    tenure.sent(1, 1.0)
    tenure.acknowledged(1)  # before any welcome
    assert not tenure.trusted(1.0)
    tenure.welcomed(sent_at=10.0, ttl=6.0)
    tenure.acknowledged(1)  # of an earlier link
    assert tenure.trusted_until() == 14.0
    tenure.sent(3, 12.0)
    tenure.acknowledged(3)
    tenure.acknowledged(3)
    tenure.acknowledged(99)
    assert tenure.trusted_until() == 16.0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30), st.floats(0.1, 10))
def test_never_outlasts_the_coordinators_patience(steps: list[tuple[float, bool]], ttl: float) -> None:
    """The coordinator waits for a TTL from when it *received* a heartbeat, which is after it was sent."""
    tenure, now, last_heard = Tenure(), 0.0, 0.0
    tenure.welcomed(0.0, ttl)
    for seq, (pause, arrives) in enumerate(steps):
        now += pause
        tenure.sent(seq, now)
        if arrives:
            last_heard = now
            tenure.acknowledged(seq)
        assert tenure.trusted_until() <= last_heard + ttl * TRUSTED_SHARE + 1e-9

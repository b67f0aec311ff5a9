"""Slots: which pair of uids a jail gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.jail.config import JailerConfig
from edge_agent.jail.directories import Slots
from edge_agent.jail.protocol import Refused


def test_the_lowest_free_slot_is_given() -> None:
    slots = Slots(5)
    slots.mark(1)
    assert [slots.take(), slots.take(), slots.take()] == [0, 2, 3]
    slots.release(2)
    slots.release(0)
    assert [slots.take(), slots.take(), slots.take()] == [0, 2, 4]
    with pytest.raises(Refused) as refused:
        slots.take()
    assert refused.value.hint


@given(st.sets(st.integers(0, 9)), st.lists(st.integers(0, 9) | st.none(), max_size=60))
def test_no_slot_is_given_twice(marked: set[int], releases: list[int | None]) -> None:
    """`None` takes one, a number gives that one back if it is taken."""
    slots, taken = Slots(10), set(marked)
    for slot in marked:
        slots.mark(slot)
    for release in releases:
        if release is None:
            try:
                slot = slots.take()
            except Refused:
                assert len(taken) == 10
                continue
            assert slot not in taken
            assert slot == min(set(range(10)) - taken)
            taken.add(slot)
        elif release in taken:
            slots.release(release)
            taken.remove(release)


def test_a_uid_tells_its_slot(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp()
    config = JailerConfig(path, path, uid_base=1_000_000)
    assert [config.slot_of(config.agent_uid(slot)) for slot in (0, 7, 32_767)] == [0, 7, 32_767]
    for stranger in (0, 999_999, 1_000_000, config.init_uid(3), config.agent_uid(32_768)):
        assert config.slot_of(stranger) is None

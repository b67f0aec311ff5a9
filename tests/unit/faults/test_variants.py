"""Variants take the place of what the daemons use; that each is caught is for tests/faults to show."""

from __future__ import annotations

import coordinator.app
import edge_agent.app
from coordinator.transitions import commit, place
from shared.identity import InstanceKey
from tests.faults.schedules import AIMED_AT
from tests.faults.variants import VARIANTS, epoch_unchecked, unfenced

KEY = InstanceKey("default", "ledger", "ana")


def test_each_variant_has_a_schedule_aimed_at_it() -> None:
    assert set(VARIANTS) == set(AIMED_AT)


def test_what_they_take_the_place_of_is_used() -> None:
    assert coordinator.app.Ownership.commit.__globals__["commit"] is commit, "by that name"
    for variant in VARIANTS.values():
        for planted in (*variant.coordinator, *variant.node):
            real = getattr(planted.module, planted.name)
            assert planted.make(real) is not real
    assert {"Commits", "Link"} <= set(edge_agent.app.run.__code__.co_names), "constructed there"


def test_what_the_broken_coordinators_take() -> None:
    first = commit(place(None, KEY, "e0", "", "v1", 0.0), "e0", 1, 1, "root", "t1")
    second = place(first, KEY, "e1", "", "v1", 0.0)
    taken = epoch_unchecked(commit)(second, "e0", 1, 2, "late", "t2")
    assert (taken.node, taken.epoch, taken.version, taken.root) == ("e1", 2, 2, "late")
    taken = unfenced(commit)(second, "e0", 1, 1, "another", "t2")
    assert (taken.node, taken.epoch, taken.version, taken.root) == ("e1", 2, 1, "another")

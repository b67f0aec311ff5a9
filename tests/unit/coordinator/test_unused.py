from __future__ import annotations

from coordinator.records import Stored
from coordinator.unused import Waiting, waiting
from tests.unit.coordinator.support import KEY, instance


def test_a_placement_waits_from_when_it_was_first_seen() -> None:
    placed = Stored(instance(), 5)
    first = waiting({}, [placed], 10.0)
    assert first == {KEY: Waiting(placed, 10.0)}
    assert waiting(first, [placed], 20.0) == first


def test_one_that_was_written_anew_waits_anew_and_one_that_is_used_is_forgotten() -> None:
    first = waiting({}, [Stored(instance(), 5)], 10.0)
    moved = Stored(instance(epoch=2), 6)
    assert waiting(first, [moved], 20.0) == {KEY: Waiting(moved, 20.0)}
    assert waiting(first, [], 20.0) == {}

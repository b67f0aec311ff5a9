"""What is left of a jail goes, however long its processes take to end."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from edge_agent.jail.graves import Graves


class Stubborn:
    """Control groups in which something is for so many tries."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self.killed = 0

    def kill(self, jail_id: str) -> None:
        self.killed += 1

    def remove(self, jail_id: str) -> bool:
        self.tries -= 1
        return self.tries < 0


class Clock:
    """A loop's timers."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._now = 0.0

    def after(self, seconds: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self._now + seconds, len(self._due), callback))

    def run(self) -> None:
        while self._due:
            self._now, _, callback = heapq.heappop(self._due)
            callback()


def _buried(tries: int, unborn: bool) -> tuple[Stubborn, list[str]]:
    groups, clock, told = Stubborn(tries), Clock(), []
    graves: Any = Graves(groups, clock)  # type: ignore[arg-type]
    graves.bury("a", lambda: told.append(f"gone, {'a' in graves}"), unborn)
    assert ("a" in graves, graves.empty) == (tries > 0, tries == 0)
    clock.run()
    assert graves.empty
    return groups, told


def test_it_is_told_once_when_nothing_is_left() -> None:
    for tries in (0, 1, 7):
        groups, told = _buried(tries, unborn=False)
        assert told == ["gone, False"]
        assert groups.killed == 0, "who died by the kernel's own means is not killed again"


def test_who_was_never_heard_of_is_killed_each_time_as_it_may_just_have_come() -> None:
    groups, told = _buried(7, unborn=True)
    assert (groups.killed, told) == (8, ["gone, False"])


def test_who_does_not_die_is_killed_again_now_and_then() -> None:
    groups, _ = _buried(2500, unborn=False)
    assert groups.killed == 2

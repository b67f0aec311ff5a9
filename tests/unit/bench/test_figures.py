from __future__ import annotations

import asyncio

import pytest

from bench.jails.figures import faster, percentile, summary, verdicts
from bench.jails.starts import AT_ONCE, Failed, Patterns


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(100, 0.5, 50), (100, 0.99, 99), (100, 1.0, 100), (1, 0.5, 1), (3, 0.95, 3)],
)
def test_a_percentile_is_one_of_the_values(count: int, share: float, expected: float) -> None:
    assert percentile([float(i) for i in range(count, 0, -1)], share) == expected


def test_sequential_starts_have_the_bare_name() -> None:
    figures = summary("parked", "sequential", [0.001, 0.002, 0.003])
    assert figures == {
        "parked.p50_ms": 2.0,
        "parked.p95_ms": 3.0,
        "parked.p99_ms": 3.0,
        "parked.success": 1.0,
    }
    assert "parked.burst.p50_ms" in summary("parked", "burst", [0.001])


def test_failed_starts_count_against_success_and_have_no_time() -> None:
    assert summary("runc", "sequential", [0.001, None, None, None]) == {
        "runc.p50_ms": 1.0,
        "runc.p95_ms": 1.0,
        "runc.p99_ms": 1.0,
        "runc.success": 0.25,
    }
    assert summary("runc", "burst", [None]) == {"runc.burst.success": 0.0}


def test_targets_are_held_against_what_was_measured_alone() -> None:
    figures = {"parked.p50_ms": 3.0, "bwrap.p50_ms": 600.0, "exec.burst.success": 0.99, "bwrap.success": 0.5}
    figures |= faster(figures)
    assert {name: met for name, _, _, met in verdicts(figures)} == {
        "parked.p50_ms": False,
        "bwrap_by_parked": True,
        "exec.burst.success": False,
    }
    assert faster({"parked.p50_ms": 1.0}) == {}


class _Fake:
    """Each start waits until `together` of them are under way."""

    name = "fake"
    seconds = 0.5

    def __init__(self, together: int = 1, fails: int = 0) -> None:
        self.together, self.fails = together, fails
        self.asked: list[int] = []
        self.under_way = self.ended = 0
        self.all_there = asyncio.Event()

    async def ready(self, starts: int) -> None:
        self.asked.append(starts)

    async def start(self, message: str = "") -> _Fake:
        self.under_way += 1
        if self.under_way % self.together == 0:
            self.all_there.set()
        await self.all_there.wait()
        if self.under_way <= self.fails:
            raise Failed("it would not")
        return self

    async def end(self) -> None:
        self.ended += 1

    def remark(self) -> str:
        return ""


async def test_sequential_starts_come_one_after_another_and_failures_go_on() -> None:
    fake, patterns = _Fake(fails=1), Patterns(3)
    assert list(await patterns.sequential(fake)) == [None, 0.5, 0.5]
    assert (fake.asked, fake.ended) == ([1, 1, 1], 2)
    assert patterns.failures == ["fake: it would not"]


async def test_a_burst_begins_all_at_once() -> None:
    fake = _Fake(together=AT_ONCE)
    async with asyncio.timeout(5):
        assert list(await Patterns(AT_ONCE + 2).burst(fake)) == [0.5] * (AT_ONCE + 2)
    assert fake.asked == [AT_ONCE, 2]

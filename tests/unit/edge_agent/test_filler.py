"""The filling of one instance: what is told, what is killed, and what the next start may do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from edge_agent.filler import Filler
from edge_agent.jail.api import Exit, JailGone
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.eventually import eventually

KEY = InstanceKey("default", "probe", "ana")
LOST = RoostError(Reason.RESTORE_INCOMPLETE, "a chunk is lost")


@dataclass
class FakeFilling:
    """Runs `work`."""

    work: Callable[[], object] = lambda: None
    unfinished: bool = True
    waited_for: str = ""
    closed: bool = False
    quiet: asyncio.Lock = field(default_factory=asyncio.Lock)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        await self.done.wait()
        self.work()

    async def served(self) -> None:
        await eventually(lambda: not self.waited_for, 5)

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeJail:
    ended: bool = False
    kills: int = 0
    refuses: bool = False

    async def kill(self) -> None:
        self.kills += 1
        if self.refuses:
            raise RoostError(Reason.JAIL_FAILED, "the jailer does not answer")
        self.ended = True


def begun(filling: FakeFilling, jail: FakeJail, served_seconds: float = 60.0) -> Filler:
    filler = Filler(KEY, served_seconds)
    filler.begin(filling, jail)  # type: ignore[arg-type]
    return filler


def fails(error: Exception) -> Callable[[], object]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (LOST, Reason.RESTORE_INCOMPLETE),
        (OSError(28, "No space left"), Reason.NODE_FAILED),
        (ValueError("a bug"), Reason.INTERNAL),
    ],
)
async def test_a_failure_kills_the_jail_and_is_told_until_the_end(
    error: Exception, reason: Reason, refuses: bool
) -> None:
    filling, jail = FakeFilling(fails(error)), FakeJail(refuses=refuses)
    filler = begun(filling, jail)
    filling.done.set()
    await eventually(lambda: jail.kills == 1, 5)
    assert filler.failure is not None
    assert filler.failure.reason is reason
    assert filler.may
    for _ in range(2):
        await filler.end()
        assert (filler.failure, filler.may, filling.closed) == (None, False, True), "the next has all first"
    filler.begin(None, jail)  # type: ignore[arg-type]
    assert filler.may


@pytest.mark.parametrize("error", [LOST, JailGone(Exit(1, out_of_memory=False))])
async def test_the_end_of_the_jail_is_no_failure_of_the_filling(error: Exception) -> None:
    filling, jail = FakeFilling(fails(error)), FakeJail(ended=True)
    filler = begun(filling, jail)
    filling.done.set()
    await asyncio.sleep(0.01)
    assert (filler.failure, jail.kills) == (None, 0)
    await filler.end()
    assert filler.may


async def test_no_snapshot_is_made_after_a_failure() -> None:
    filling, jail = FakeFilling(fails(LOST)), FakeJail(refuses=True)
    filler = begun(filling, jail)
    async with filling.quiet:
        waiting = asyncio.create_task(_snapshot(filler))
        filling.done.set()
        await eventually(lambda: filler.failure is not None, 5)
    with pytest.raises(RoostError, match="a chunk is lost"):
        await waiting


async def _snapshot(filler: Filler) -> None:
    async with filler.quiet():
        pass


async def test_a_snapshot_that_fails_counts_as_a_failure() -> None:
    filling, jail = FakeFilling(), FakeJail()
    filler = begun(filling, jail)
    with pytest.raises(RoostError):
        async with filler.quiet():
            raise RoostError(Reason.STATE_CHANGED, "it was cut")
    await filler.end()
    assert not filler.may


async def test_what_is_filled_and_captured_is_forgotten() -> None:
    filling, jail = FakeFilling(), FakeJail()
    filler = begun(filling, jail)
    async with filler.quiet() as known:
        assert known is filling
    filling.unfinished = False
    assert not filler.unfinished
    await _snapshot(filler)
    async with filler.quiet() as known:
        assert known is None
    await filler.end()


async def test_who_waits_for_a_file_is_not_to_blame_for_the_time() -> None:
    filling, jail = FakeFilling(waited_for="big"), FakeJail()
    filler = begun(filling, jail)
    late = RoostError(Reason.TURN_TIMEOUT, "too slow")
    assert filler.told_instead(late).reason is Reason.BLOBS_UNAVAILABLE
    assert "'big'" in filler.told_instead(late).message
    assert filler.told_instead(LOST) is LOST
    await filler.end()
    assert not filler.may, "the next start has all files first"
    assert filler.told_instead(late) is late


async def test_a_snapshot_waits_for_who_waits() -> None:
    filling, jail = FakeFilling(waited_for="big"), FakeJail()
    filler = begun(filling, jail)
    asyncio.get_running_loop().call_later(0.02, lambda: setattr(filling, "waited_for", ""))
    await filler.served()
    assert not filling.waited_for
    await filler.end()


async def test_a_snapshot_does_not_wait_for_ever_for_who_waits() -> None:
    filler = begun(FakeFilling(waited_for="big"), FakeJail(), served_seconds=0.02)
    with pytest.raises(RoostError) as caught:
        await filler.served()
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
    await filler.end()
    assert not filler.may


async def test_the_end_waits_for_what_can_not_be_cut_off_and_passes_a_cancellation_on() -> None:
    filling, jail = FakeFilling(), FakeJail()
    release = asyncio.Event()

    async def run() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await release.wait()

    filling.run = run  # type: ignore[method-assign]
    filler = begun(filling, jail)
    await asyncio.sleep(0)
    ending = asyncio.create_task(filler.end())
    await asyncio.sleep(0.01)
    assert not ending.done()
    assert not filling.closed
    ending.cancel()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await ending
    assert filling.closed

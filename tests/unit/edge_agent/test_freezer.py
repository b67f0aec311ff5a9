"""A jail is frozen while a reason holds and thawed when none does, whatever is cut off or fails meanwhile."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from edge_agent.freezer import Freezer
from edge_agent.jail.api import Exit, JailGone
from shared.errors import Reason, RoostError

STUCK = RoostError(Reason.JAIL_FAILED, "they did not stop")
GONE = JailGone(Exit(-signal.SIGKILL, out_of_memory=False))


class SlowJail:
    """What is asked of it is under way until `go_on`. One that is being frozen stands still already."""

    def __init__(self, slow: bool = True) -> None:
        self.frozen = False
        self.slow = slow
        self.asked: list[str] = []
        self._under_way: asyncio.Future[None] | None = None

    @property
    def busy(self) -> str:
        """With what?"""
        return self.asked[-1] if self._under_way is not None else ""

    async def freeze(self) -> None:
        self.frozen = True
        try:
            await self._take_time("freeze")
        except BaseException:
            self.frozen = False
            raise

    async def thaw(self) -> None:
        await self._take_time("thaw")
        self.frozen = False

    async def _take_time(self, what: str) -> None:
        self.asked.append(what)
        if self.slow:
            self._under_way = asyncio.get_running_loop().create_future()
            try:
                await self._under_way
            finally:
                self._under_way = None

    def go_on(self, error: Exception | None = None) -> None:
        assert self._under_way is not None
        if error is None:
            self._under_way.set_result(None)
        else:
            self._under_way.set_exception(error)


async def passes() -> None:
    """All that can go on goes on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def attached(slow: bool = True) -> tuple[Freezer, Any]:
    freezer, jail = Freezer(), SlowJail(slow)
    freezer.attach(jail)  # type: ignore[arg-type]
    return freezer, jail


async def begun(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(work)
    await passes()
    return task


async def cut_off(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    await passes()


async def capture(freezer: Freezer) -> None:
    async with freezer.frozen("capture"):
        pass


async def test_it_is_frozen_until_the_last_reason_goes() -> None:
    freezer, jail = await attached(slow=False)
    await freezer.hold("a")
    await freezer.hold("b")
    await freezer.drop("a")
    assert jail.frozen
    await freezer.drop("b")
    await freezer.drop("b")
    assert not jail.frozen
    assert jail.asked == ["freeze", "thaw"]


async def test_after_a_block_it_is_thawed_while_other_things_go_on() -> None:
    freezer, jail = await attached()
    block = await begun(capture(freezer))
    jail.go_on()
    await block
    settled = await begun(freezer.settled())
    assert not settled.done()
    assert jail.frozen
    jail.go_on()
    await settled
    assert not jail.frozen


async def test_a_hold_that_is_cut_off_holds_and_goes_with_its_reason() -> None:
    freezer, jail = await attached()
    await cut_off(await begun(freezer.hold("a")))
    jail.go_on()
    await passes()
    assert jail.frozen
    jail.slow = False
    await freezer.drop("a")
    assert not jail.frozen


@pytest.mark.parametrize("error", [None, STUCK])
async def test_a_block_that_is_cut_off_while_it_freezes_leaves_it_running(error: Exception | None) -> None:
    freezer, jail = await attached()
    await cut_off(await begun(capture(freezer)))
    jail.slow = False
    jail.go_on(error)
    await passes()
    assert not jail.frozen


@pytest.mark.parametrize("error", [None, STUCK])
async def test_a_reason_that_goes_while_it_is_being_frozen_for_it(error: Exception | None) -> None:
    freezer, jail = await attached()
    held = await begun(freezer.hold("a"))
    dropped = await begun(freezer.drop("a"))
    jail.slow = False
    jail.go_on(error)
    await asyncio.gather(held, dropped)
    assert not jail.frozen
    await freezer.hold("b")
    assert jail.frozen


async def test_a_drop_that_is_cut_off_thaws_all_the_same() -> None:
    freezer, jail = await attached()
    held = await begun(freezer.hold("a"))
    await cut_off(await begun(freezer.drop("a")))
    jail.slow = False
    jail.go_on()
    await held
    assert not jail.frozen


async def test_a_reason_that_comes_while_it_is_being_thawed() -> None:
    freezer, jail = await attached(slow=False)
    await freezer.hold("a")
    jail.slow = True
    dropped = await begun(freezer.drop("a"))
    held = await begun(freezer.hold("b"))
    jail.slow = False
    jail.go_on()
    await asyncio.gather(held, dropped)
    assert jail.frozen


async def test_what_can_not_be_frozen_is_told_and_tried_again_by_the_next() -> None:
    freezer, jail = await attached()
    holds = [await begun(freezer.hold(reason)) for reason in ("a", "b")]
    jail.go_on(STUCK)
    for held in holds:
        with pytest.raises(RoostError, match="did not stop"):
            await held
    jail.slow = False
    await freezer.hold("b")
    assert jail.frozen
    await freezer.drop("b")
    assert jail.frozen, "for a"
    await freezer.drop("a")
    assert not jail.frozen


async def test_what_can_not_be_thawed_is_told_to_who_waits_and_tried_again_by_the_next() -> None:
    freezer, jail = await attached()
    block = await begun(capture(freezer))
    jail.go_on()
    await block
    settled = await begun(freezer.settled())
    jail.go_on(STUCK)
    with pytest.raises(RoostError, match="did not stop"):
        await settled
    jail.slow = False
    await freezer.settled()
    assert not jail.frozen


async def test_a_jail_that_is_gone_keeps_nobody_waiting() -> None:
    freezer, jail = await attached()
    waiting = [await begun(freezer.hold("a")), await begun(freezer.drop("a"))]
    jail.go_on(GONE)
    await asyncio.gather(*waiting)
    await freezer.hold("a")
    assert jail.asked == ["freeze"]


async def test_the_next_jail_is_not_taken_for_the_last_one() -> None:
    freezer, old = await attached()
    held = await begun(freezer.hold("a"))
    freezer.detach()
    jail = SlowJail(slow=False)
    freezer.attach(jail)  # type: ignore[arg-type]
    old.go_on()
    await held
    assert jail.frozen
    await freezer.drop("a")
    assert not jail.frozen
    assert old.asked == ["freeze"]


@pytest.mark.parametrize("frozen", [True, False])
async def test_one_that_an_earlier_daemon_left_is_set_right(frozen: bool) -> None:
    for hold in (True, False):
        freezer, jail = Freezer(), SlowJail(slow=False)
        jail.frozen = frozen
        freezer.adopt(jail)  # type: ignore[arg-type]
        await (freezer.hold("a") if hold else freezer.drop("a"))
        assert jail.frozen is hold


class Interleavings(RuleBasedStateMachine):
    """Callers come, go and are cut off while the jail takes its time, fails, or is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.freezer, self.jail = Freezer(), SlowJail()
        self.reasons: set[str] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.captures: dict[asyncio.Task[None], asyncio.Event] = {}
        self.failed = False  # and nobody has asked for it again
        self.freezer.attach(self.jail)  # type: ignore[arg-type]

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        result = self.loop.run_until_complete(work)
        self.loop.run_until_complete(passes())
        over = [task for task in self.captures if task.done()]
        for task in over:
            del self.captures[task]
        if over and not self.captures:
            self.reasons.discard("capture")
        return result

    @rule(reason=st.sampled_from(("a", "b")))
    def hold(self, reason: str) -> None:
        self.reasons.add(reason)
        self.failed = False
        self.tasks.append(self._run(begun(self.freezer.hold(reason))))

    @rule(reason=st.sampled_from(("a", "b")))
    def drop(self, reason: str) -> None:
        self.reasons.discard(reason)
        self.failed = self.failed and bool(self.reasons)
        self.tasks.append(self._run(begun(self.freezer.drop(reason))))

    @precondition(lambda self: not self.captures)
    @rule()
    def capture(self) -> None:
        end = asyncio.Event()

        async def block() -> None:
            async with self.freezer.frozen("capture"):
                await end.wait()

        self.reasons.add("capture")
        self.failed = False
        task = self._run(begun(block()))
        self.tasks.append(task)
        self.captures[task] = end
        self._run(passes())

    @precondition(lambda self: self.captures)
    @rule()
    def captured(self) -> None:
        """The end of its block, once it is frozen."""
        for end in self.captures.values():
            end.set()
        self._run(passes())

    @precondition(lambda self: any(not task.done() for task in self.tasks))
    @rule(pick=st.integers(0, 9))
    def cut_off(self, pick: int) -> None:
        waiting = [task for task in self.tasks if not task.done()]
        waiting[pick % len(waiting)].cancel()
        self._run(passes())

    @precondition(lambda self: self.jail.busy)
    @rule()
    def go_on(self) -> None:
        self.jail.go_on()
        self._run(passes())

    @precondition(lambda self: self.jail.busy)
    @rule()
    def fail(self) -> None:
        froze = self.jail.busy == "freeze"
        self.failed = froze is bool(self.reasons)
        self.jail.go_on(STUCK)
        self._run(passes())

    @rule()
    def another_jail(self) -> None:
        old, self.jail = self.jail, SlowJail()
        self.failed = False

        async def replace() -> None:
            self.freezer.detach()
            if old.busy:
                old.go_on(GONE)
            await passes()
            self.freezer.attach(self.jail)  # type: ignore[arg-type]

        self._run(replace())

    @precondition(lambda self: not self.failed)
    @rule()
    def it_is_as_it_should_be(self) -> None:
        while self.jail.busy:
            self.jail.go_on()
            self._run(passes())
        assert self.jail.frozen is bool(self.reasons)

    def teardown(self) -> None:
        if not self.failed:
            self.it_is_as_it_should_be()
        for task in self.tasks:
            task.cancel()
        self._run(passes())
        self.jail.slow = False
        if self.jail.busy:
            self.jail.go_on()
        for reason in ("a", "b"):
            self._run(self.freezer.drop(reason))
        assert not self.jail.frozen
        for task in self.tasks:
            if not task.cancelled():
                task.exception()
        self.loop.close()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)

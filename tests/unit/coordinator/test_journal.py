from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.journal import Journals, ending
from coordinator.ownership import Beside, Extra, Ownership, Placed
from shared.effects import MAX_UNFINISHED, Call, CallState, Repeat
from shared.errors import Reason, RoostError
from tests.unit.coordinator.support import KEY, Fault, FlakyStore, NoCache, OldCache

NEVER = Call(0, "pay", "a1", Repeat.NEVER, CallState.BEGUN)


class Bench:
    def __init__(self, cache: object | None = None) -> None:
        self.store = FlakyStore()
        self.ownership = Ownership(self.store, cache or NoCache(), lambda: 1e9, 1.0)  # type: ignore[arg-type]
        self.journals = Journals(self.store, self.ownership, 1.0)

    async def place(self, node: str) -> None:
        outcome = await self.ownership.place(KEY, await self.ownership.read(KEY), node, "nearest", "v1")
        assert isinstance(outcome, Placed)

    async def parked(self) -> str:
        record = await self.ownership.read(KEY)
        assert record is not None
        return record.value.parked


@pytest.fixture
async def bench() -> Bench:
    bench = Bench()
    await bench.place("a")
    return bench


async def reason(awaitable: object) -> Reason:
    with pytest.raises(RoostError) as caught:
        await awaitable  # type: ignore[misc]
    return caught.value.reason


def with_journal(turn_id: str, calls: int) -> Beside:
    async def extra(fresh: bool) -> Extra:
        return Extra(writes=ending(KEY, turn_id, calls))

    return extra


async def test_only_the_owner_writes_and_reads(bench: Bench) -> None:
    (begun,) = await bench.journals.write("a", KEY, 1, "t1", [NEVER])
    assert begun.same_as(replace(NEVER, epoch=1))
    await bench.place("b")
    done = replace(begun, state=CallState.DONE, result="1")
    assert await reason(bench.journals.write("a", KEY, 1, "t1", [done])) is Reason.EPOCH_STALE
    assert await reason(bench.journals.read("a", KEY, 1, "t1")) is Reason.EPOCH_STALE
    assert await bench.journals.read("b", KEY, 2, "t1") == (begun,)
    assert await bench.journals.read("b", KEY, 2, "t2") == ()


async def test_a_stale_cache_lets_nobody_write() -> None:
    cache = OldCache()
    bench = Bench(cache)
    await bench.place("a")
    other = Ownership(bench.store, NoCache(), lambda: 1e9, 1.0)
    seen = await other.read(KEY)
    await other.place(KEY, seen, "b", "moved", "v1")
    assert await reason(bench.journals.write("a", KEY, 1, "t1", [NEVER])) is Reason.EPOCH_STALE
    assert await bench.journals.unfinished(KEY) == []
    await bench.journals.write("b", KEY, 2, "t1", [NEVER])


async def test_what_was_written_before_counts_and_what_came_between_does_not(bench: Bench) -> None:
    bench.store.faults = [Fault.NONE, Fault.ANSWER_LOST]
    assert await reason(bench.journals.write("a", KEY, 1, "t1", [NEVER])) is Reason.STORE_UNAVAILABLE
    (begun,) = await bench.journals.write("a", KEY, 1, "t1", [NEVER])
    done = replace(begun, state=CallState.DONE, result="1")
    await bench.journals.write("a", KEY, 1, "t1", [done])
    assert (await bench.journals.write("a", KEY, 1, "t1", [done]))[0].result == "1"
    late = replace(begun, state=CallState.UNCERTAIN)
    assert await reason(bench.journals.write("a", KEY, 1, "t1", [late])) is Reason.TURN_NOT_COMMITTED
    assert await bench.parked() == ""


async def test_a_journal_ends_with_its_turns_commit_and_with_no_other(bench: Bench) -> None:
    safe = Call(1, "ask", "a1", Repeat.SAFE, CallState.DONE, "{}")
    await bench.journals.write("a", KEY, 1, "t1", [NEVER, safe])
    await bench.journals.write("a", KEY, 1, "t2", [NEVER])
    await bench.ownership.commit("a", KEY, 1, 1, "r1", "t1", with_journal("t1", 2))
    assert [j.turn_id for j in await bench.journals.unfinished(KEY)] == ["t2"]
    assert await reason(bench.ownership.commit("a", KEY, 2, 2, "r2", "t2", with_journal("t2", 1)))
    assert [j.turn_id for j in await bench.journals.unfinished(KEY)] == ["t2"]


async def test_a_person_settles_what_is_uncertain_once(bench: Bench) -> None:
    (begun,) = await bench.journals.write("a", KEY, 1, "t1", [NEVER])
    assert await reason(bench.journals.settle(KEY, "t1", begun, True, "1")) is Reason.BAD_REQUEST
    (lost,) = await bench.journals.write("a", KEY, 1, "t1", [replace(begun, state=CallState.UNCERTAIN)])
    (other,) = await bench.journals.write("a", KEY, 1, "t2", [replace(NEVER, state=CallState.UNCERTAIN)])
    assert await bench.parked() == "pay (turn t2)"
    assert await reason(bench.journals.settle(KEY, "t1", lost, True, "{")) is Reason.BAD_REQUEST
    await bench.journals.settle(KEY, "t1", lost, True, '{"id":1}')
    await bench.journals.settle(KEY, "t1", lost, True, '{"id":1}')
    assert await reason(bench.journals.settle(KEY, "t1", lost, False, "")) is Reason.BAD_REQUEST
    (settled,) = await bench.journals.read("a", KEY, 1, "t1")
    assert (settled.state, settled.result) == (CallState.DONE, '{"id":1}')
    assert await bench.parked() == "pay (turn t2)"
    await bench.place("b")
    assert await bench.parked() == "pay (turn t2)", "wherever it goes"
    await bench.journals.settle(KEY, "t2", other, False, "ignored")
    assert await bench.parked() == ""
    (settled,) = await bench.journals.read("b", KEY, 2, "t2")
    assert (settled.state, settled.result) == (CallState.NOT_MADE, "")


async def test_journals_of_turns_that_were_given_up_go_but_for_open_ones(bench: Bench) -> None:
    done = replace(NEVER, state=CallState.DONE, result="1")
    for n in range(MAX_UNFINISHED + 3):
        await bench.journals.write("a", KEY, 1, f"t{n}", [NEVER if n == 1 else done])
    left = await bench.journals.forget_old("a", KEY, 1)
    assert left == [f"t{n}" for n in range(MAX_UNFINISHED + 2, 2, -1)] + ["t1"]
    assert [j.turn_id for j in await bench.journals.unfinished(KEY)] == left
    await bench.place("b")
    await bench.journals.write("b", KEY, 2, "more", [done])
    assert await reason(bench.journals.forget_old("a", KEY, 1)) is Reason.EPOCH_STALE

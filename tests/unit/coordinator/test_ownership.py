from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.ownership import Overtaken, Ownership, Placed
from coordinator.records import InstanceRecord, Phase, instance_key
from coordinator.store.base import Put
from coordinator.transitions import (
    InvariantBroken,
    _checked,
    commit,
    hibernate,
    place,
    replace_state,
    wake,
)
from shared.errors import Reason, RoostError
from tests.unit.coordinator.support import KEY, Fault, FlakyStore, NoCache, OldCache, instance


def stale(action: Callable[[], object]) -> None:
    with pytest.raises(RoostError) as caught:
        action()
    assert caught.value.reason is Reason.EPOCH_STALE
    assert caught.value.hint


# --- transitions -----------------------------------------------------------------------------------


def test_the_first_owner_is_in_epoch_1_and_nothing_is_committed() -> None:
    new = place(None, KEY, "a", "nearest", "v1", 5.0)
    assert new == instance(placed_at_unix=5.0)


def test_a_move_is_a_new_epoch_and_keeps_what_is_committed() -> None:
    old = instance(epoch=3, version=7, root="r7", last_turn="t7", phase=Phase.LIVE)
    new = place(old, KEY, "b", "moved", "v2", 5.0)
    assert (new.epoch, new.node, new.phase, new.agent_version) == (4, "b", Phase.PLACED, "v2")
    assert (new.version, new.root, new.last_turn) == (7, "r7", "t7")


def test_a_commit_is_the_next_version_by_the_owner_in_its_epoch() -> None:
    old = instance(epoch=3, version=7, root="r7", last_turn="t7")
    new = commit(old, "a", 3, 8, "r8", "t8")
    assert (new.version, new.root, new.last_turn, new.phase) == (8, "r8", "t8", Phase.LIVE)
    assert commit(new, "a", 3, 8, "r8", "t8") is new, "sent again"
    stale(lambda: commit(new, "a", 3, 8, "other", "t8"))
    stale(lambda: commit(new, "a", 3, 10, "r10", "t10"))
    stale(lambda: commit(new, "a", 3, 7, "r7", "t7"))
    stale(lambda: commit(new, "b", 3, 9, "r9", "t9"))
    stale(lambda: commit(new, "a", 2, 9, "r9", "t9"))
    stale(lambda: commit(new, "a", 4, 9, "r9", "t9"))
    stale(lambda: commit(None, "a", 1, 1, "r1", "t1"))


def test_waking_and_hibernating_are_the_owners() -> None:
    placed = instance()
    live = wake(placed, "a", 1, "v2")
    assert (live.phase, live.agent_version) == (Phase.LIVE, "v2")
    asleep = hibernate(live, "a", 1)
    assert asleep.phase is Phase.HIBERNATED
    assert hibernate(asleep, "a", 1) is asleep
    for transition in (
        lambda: wake(placed, "b", 1, "v"),
        lambda: hibernate(placed, "a", 2),
        lambda: wake(None, "a", 1, "v"),
    ):
        stale(transition)


def test_a_replaced_state_is_the_next_version_in_a_new_epoch_of_the_same_owner() -> None:
    old = instance(epoch=3, version=7, root="r7", last_turn="t7", phase=Phase.LIVE, state_bytes=5)
    new = replace_state(old, KEY, 8, "r8", 9, "restored")
    assert (new.epoch, new.node, new.version, new.root, new.parent) == (4, "a", 8, "r8", "r7")
    assert (new.phase, new.last_turn, new.state_bytes) == (Phase.HIBERNATED, "t7", 9)
    assert replace_state(new, KEY, 8, "r8", 9, "restored") is new, "sent again"
    stale(lambda: commit(new, "a", 3, 8, "r8'", "t8"))
    for version in (7, 9):
        with pytest.raises(RoostError) as caught:
            replace_state(old, KEY, version, "r", 0, "restored")
        assert caught.value.reason is Reason.STATE_CHANGED


def test_an_imported_instance_is_nobodys_until_it_is_placed() -> None:
    new = replace_state(None, KEY, 1, "r1", 9, "imported")
    assert (new.epoch, new.node, new.version) == (1, "", 1)
    stale(lambda: commit(new, "a", 1, 2, "r2", "t"))
    assert place(new, KEY, "a", "nearest", "v1", 5.0).epoch == 2


def test_a_version_names_the_one_before() -> None:
    old = instance(epoch=3, version=7, root="r7")
    new = commit(old, "a", 3, 8, "r8", "t8", 100)
    assert (new.parent, new.state_bytes) == ("r7", 100)
    assert place(new, KEY, "b", "moved", "v", 5.0).parent == "r7"


@pytest.mark.parametrize(
    "change",
    [
        {"node": "b"},
        {"epoch": 2},
        {"epoch": 5},
        {"version": 9, "root": "r"},
        {"version": 6, "root": "r"},
        {"root": "other"},
        {"epoch": 4, "version": 8, "root": "r8"},
        {"version": 8, "root": ""},
    ],
)
def test_what_would_break_an_invariant_is_never_written(change: dict[str, Any]) -> None:
    old = {"epoch": 3, "version": 7, "root": "r7"}
    with pytest.raises(InvariantBroken):
        _checked(instance(**old), instance(**{**old, **change}))


# --- transactions ----------------------------------------------------------------------------------


def ownership(store: FlakyStore, cache: object | None = None) -> Ownership:
    return Ownership(store, cache or NoCache(), lambda: 1e9, 1.0)  # type: ignore[arg-type]


async def placed(store: FlakyStore, node: str = "a") -> Placed:
    outcome = await ownership(store).place(KEY, await ownership(store).read(KEY), node, "nearest", "v1")
    assert isinstance(outcome, Placed)
    return outcome


async def test_of_two_who_place_at_once_one_is_overtaken_and_told_the_winner() -> None:
    store = FlakyStore()
    outcomes = await asyncio.gather(*(ownership(store).place(KEY, None, n, "nearest", "v1") for n in "abc"))
    winners = [o for o in outcomes if isinstance(o, Placed)]
    assert len(winners) == 1
    assert all(o.record == winners[0].record for o in outcomes if isinstance(o, Overtaken))


async def test_fault_answer_to_a_commit_lost_it_is_read_back_and_succeeds() -> None:
    store = FlakyStore()
    await placed(store)
    store.faults = [Fault.NONE, Fault.ANSWER_LOST]
    stored = await ownership(store).commit("a", KEY, 1, 1, "r1", "t1")
    assert stored.value.version == 1
    assert stored == await ownership(store).read(KEY)


async def test_fault_commit_lost_on_the_way_is_unavailable_and_can_be_repeated() -> None:
    store = FlakyStore()
    await placed(store)
    store.faults = [Fault.NONE, Fault.REQUEST_LOST]
    with pytest.raises(RoostError) as caught:
        await ownership(store).commit("a", KEY, 1, 1, "r1", "t1")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert (await ownership(store).commit("a", KEY, 1, 1, "r1", "t1")).value.version == 1


async def test_fault_answer_lost_and_written_over_meanwhile_is_not_taken_for_applied() -> None:
    store = FlakyStore()
    first = await placed(store)

    class Meddling(FlakyStore):
        async def txn(self, *args: Any, **kwargs: Any) -> Any:
            await store.txn(*args, **kwargs)
            moved = place(instance(version=1, root="r1"), KEY, "b", "moved", "v1", 1e9)
            await store.txn([], [Put(instance_key(KEY), moved.encode())])
            raise RoostError(Reason.STORE_UNAVAILABLE, "no answer", "wait")

        async def get(self, key: str, timeout: float = 5.0) -> Any:
            return await store.get(key)

    assert first.record.value.version == 0
    with pytest.raises(RoostError) as caught:
        await ownership(Meddling()).commit("a", KEY, 1, 1, "r1", "t1")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_fresh_cache_spares_the_read_and_a_stale_one_costs_it() -> None:
    store, cache = FlakyStore(), OldCache()
    mine = ownership(store, cache)
    await mine.place(KEY, None, "a", "nearest", "v1")
    reads = 0
    real_get = store.get

    async def counted(key: str, timeout: float = 5.0) -> Any:
        nonlocal reads
        reads += 1
        return await real_get(key, timeout)

    store.get = counted  # type: ignore[method-assign]
    await mine.commit("a", KEY, 1, 1, "r1", "t1")
    assert reads == 0
    cache.lag = 1
    await mine.commit("a", KEY, 1, 2, "r2", "t2")
    assert reads == 1


async def test_a_stale_cache_refuses_nobody() -> None:
    store, cache = FlakyStore(), OldCache()
    mine = ownership(store, cache)
    outcome = await mine.place(KEY, None, "a", "nearest", "v1")
    assert isinstance(outcome, Placed)
    await ownership(store).place(KEY, outcome.record, "b", "moved", "v1")  # by another coordinator
    assert (await mine.commit("b", KEY, 2, 1, "r1", "t1")).value.node == "b"
    with pytest.raises(RoostError) as caught:
        await mine.commit("a", KEY, 1, 1, "r1", "t1")
    assert caught.value.reason is Reason.EPOCH_STALE


async def test_hibernating_what_was_seen_leaves_alone_what_changed_since() -> None:
    store = FlakyStore()
    seen = (await placed(store)).record
    await ownership(store).wake(KEY, "a", 1, "v1")
    await ownership(store).hibernate_if_unchanged(seen)
    record = await ownership(store).read(KEY)
    assert record is not None
    assert record.value.phase is Phase.LIVE
    await ownership(store).hibernate_if_unchanged(record)
    record = await ownership(store).read(KEY)
    assert record is not None
    assert record.value.phase is Phase.HIBERNATED


@given(st.lists(st.sampled_from(Fault), max_size=8), st.lists(st.sampled_from(Fault), max_size=8))
def test_whatever_is_interrupted_repeating_it_ends_as_if_nothing_had_been(
    in_place: list[Fault], in_commit: list[Fault]
) -> None:
    """place, then commit, each repeated until it is answered: one epoch, one version, whatever was lost."""

    async def scenario() -> InstanceRecord:
        store = FlakyStore()
        store.faults = list(in_place)
        await until_answered(lambda: place_if_absent(store))
        store.faults = list(in_commit)
        await until_answered(lambda: ownership(store).commit("a", KEY, 1, 1, "r1", "t1"))
        store.faults = []
        record = await ownership(store).read(KEY)
        assert record is not None
        return record.value

    record = asyncio.run(scenario())
    assert (record.epoch, record.version, record.node) == (1, 1, "a")


async def place_if_absent(store: FlakyStore) -> None:
    found = await ownership(store).read(KEY)
    if found is None:
        await ownership(store).place(KEY, None, "a", "nearest", "v1")


async def until_answered(action: Callable[[], Coroutine[Any, Any, object]]) -> None:
    for _ in range(20):
        try:
            await action()
            return
        except RoostError as error:
            assert error.reason is Reason.STORE_UNAVAILABLE, error
    raise AssertionError("the faults are finite")


class Mesh(RuleBasedStateMachine):
    """Two coordinators, three nodes, one instance; calls fail in every way, and caches are as old as can be.

    The model: what every node believes that it owns, and every commit that was acknowledged.
    """

    faults = st.lists(st.sampled_from(Fault), max_size=3)

    @initialize()
    def start(self) -> None:
        self.store = FlakyStore()
        self.caches = [OldCache(), OldCache()]
        self.coordinators = [ownership(self.store, cache) for cache in self.caches]
        self.owners: dict[int, str] = {}  # epoch -> node, of every answer ever given
        self.acknowledged: dict[int, tuple[int, str]] = {}  # version -> (epoch, root)
        self.history: list[InstanceRecord] = []
        self.turn = 0

    def call(self, faults: list[Fault], action: Coroutine[Any, Any, Any]) -> Any:
        """The action's answer, or None when it was refused or unanswered."""
        self.store.faults = list(faults)
        try:
            return asyncio.run(action)
        except RoostError as error:
            assert error.reason in (Reason.STORE_UNAVAILABLE, Reason.EPOCH_STALE), error
            return None
        finally:
            self.store.faults = []

    @rule(who=st.integers(0, 1), node=st.sampled_from("abc"), lag=st.integers(0, 3), faults=faults)
    def place_it(self, who: int, node: str, lag: int, faults: list[Fault]) -> None:
        self.caches[who].lag = lag
        expected = self.caches[who].instance(KEY)
        outcome = self.call(faults, self.coordinators[who].place(KEY, expected, node, "why", "v1"))
        if isinstance(outcome, Placed):
            record = outcome.record.value
            assert self.owners.setdefault(record.epoch, record.node) == record.node, "two owners of one epoch"
            assert record.node == node

    @rule(
        who=st.integers(0, 1),
        epochs_back=st.integers(0, 2),
        lag=st.integers(0, 3),
        faults=faults,
        again=st.booleans(),
    )
    def commit_it(self, who: int, epochs_back: int, lag: int, faults: list[Fault], again: bool) -> None:
        """By the owner of a recent epoch: the next version after what it last saw, and perhaps again."""
        if not self.owners:
            return
        epoch = max(1, max(self.owners) - epochs_back)
        node = self.owners.get(epoch)
        record = self.current()
        if node is None or record is None:
            return
        self.caches[who].lag = lag
        self.turn += 1
        version, root = record.version + 1, f"root-{self.turn}"
        for _ in range(2 if again else 1):
            done = self.call(
                faults, self.coordinators[who].commit(node, KEY, epoch, version, root, f"t{self.turn}")
            )
            if done is not None:
                known = self.acknowledged.setdefault(version, (epoch, root))
                assert known == (epoch, root), "one version was acknowledged twice"

    @rule(who=st.integers(0, 1), lag=st.integers(0, 3), faults=faults)
    def sleep_it(self, who: int, lag: int, faults: list[Fault]) -> None:
        if self.owners:
            self.caches[who].lag = lag
            epoch = max(self.owners)
            self.call(faults, self.coordinators[who].hibernate(self.owners[epoch], KEY, epoch))

    @rule(who=st.integers(0, 1), faults=faults)
    def wake_it(self, who: int, faults: list[Fault]) -> None:
        if self.owners:
            epoch = max(self.owners)
            self.call(faults, self.coordinators[who].wake(KEY, self.owners[epoch], epoch, "v1"))

    @invariant()
    def epochs_and_versions_only_grow_and_nothing_acknowledged_is_lost(self) -> None:
        if not hasattr(self, "store"):
            return
        record = self.current()
        if record is None:
            assert not self.owners
            return
        if self.history:
            last = self.history[-1]
            assert record.epoch >= last.epoch
            assert record.version >= last.version
        self.history.append(record)
        assert self.owners.get(record.epoch, record.node) == record.node
        if self.acknowledged:
            latest = max(self.acknowledged)
            assert record.version >= latest
            if record.version == latest:
                assert record.root == self.acknowledged[latest][1]

    def current(self) -> InstanceRecord | None:
        found = asyncio.run(ownership(self.store).read(KEY))
        return found.value if found else None


Mesh.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestMesh = Mesh.TestCase

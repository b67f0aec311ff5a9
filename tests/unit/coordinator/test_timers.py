"""Timers: what turns do to them, what is due where, and what becomes of attempts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.alarms import AT_ONCE, AT_ONCE_OF_A_NODE, Alarms, Seen, choose, first_due, is_due, is_mine
from coordinator.ownership import Ownership, Placed
from coordinator.placement import Client
from coordinator.records import AgentRecord, NodeRecord, NodeState, Stored
from coordinator.resolving import Resolved
from coordinator.timers import (
    FIRST_BACKOFF,
    MAX_ATTEMPTS,
    Changes,
    InstanceTimers,
    Timer,
    Timers,
    after_failure,
    changed,
    claimed,
    timers_key,
    turn_id_of,
)
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.timers import LATEST, MAX_TIMERS, SOONEST, Setting
from tests.support.eventually import eventually
from tests.unit.coordinator.support import KEY, Fault, FlakyStore, NoCache, instance, node

NOW = 1e9


def timer(name: str = "wake", **changes: object) -> Timer:
    whole = Timer(name, "hi", NOW, turn_id_of(KEY, "t1", name), NOW)
    return replace(whole, **changes)  # type: ignore[arg-type]


def of(*timers: Timer, key: InstanceKey = KEY, revision: int = 5) -> Stored[InstanceTimers]:
    return Stored(InstanceTimers(key, timers), revision)


# --- what turns do to them -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "due"),
    [
        (Setting("a", "", at=NOW + 60), NOW + 60),
        (Setting("a", "", after=60.0), NOW + 60),
        (Setting("a", "", at=0.0), NOW + SOONEST),
        (Setting("a", "", after=0.0), NOW + SOONEST),
        (Setting("a", "", at=1e300), NOW + LATEST),
    ],
)
def test_when_it_is_due(setting: Setting, due: float) -> None:
    (set_by_t1,) = changed(InstanceTimers(KEY), Changes("t1", [setting]), NOW).timers
    assert (set_by_t1.due, set_by_t1.next) == (due, due)
    assert set_by_t1.turn_id == turn_id_of(KEY, "t1", "a")


def test_a_turn_replaces_cancels_and_ends() -> None:
    before = InstanceTimers(KEY, (timer("a"), timer("b", attempts=3, failed=True), timer("c")))
    changes = Changes("t2", [Setting("b", "new", after=5.0)], ["c", "no-such"])
    after = changed(before, changes, NOW)
    assert [t.name for t in after.timers] == ["a", "b"]
    assert after.timers[1] == Timer("b", "new", NOW + 5, turn_id_of(KEY, "t2", "b"), NOW + 5)
    again = turn_id_of(KEY, "t2", "b")
    ended = changed(after, Changes(again, [Setting("b", "and again", after=5.0)], ended="b"), NOW)
    assert ended.timers[1].turn_id == turn_id_of(KEY, again, "b") != again
    assert [t.name for t in changed(after, Changes(again, ended="b"), NOW).timers] == ["a"]
    newer = changed(after, Changes("an older turn of b", ended="b"), NOW)
    assert newer == after, "what was set since is another timer"


def test_there_are_so_many_and_no_more() -> None:
    full = changed(
        InstanceTimers(KEY), Changes("t1", [Setting(f"n{n}", "", after=5.0) for n in range(MAX_TIMERS)]), NOW
    )
    assert len(changed(full, Changes("t2", [Setting("n0", "", after=9.0)]), NOW).timers) == MAX_TIMERS
    one_more = Changes("t2", [Setting("more", "", after=9.0)])
    with pytest.raises(RoostError) as caught:
        changed(full, one_more, NOW)
    assert caught.value.reason is Reason.TIMER_LIMIT
    changed(full, replace(one_more, cancelled=["n3"]), NOW)


def test_records_read_back_as_they_were_written() -> None:
    from coordinator.store.base import Record

    timers = of(timer("ä\n", error="x: y"), timer("b", attempts=2, epoch=3, started_id="s", failed=True))
    assert InstanceTimers.decode(Record(timers_key(KEY), timers.value.encode(), 5)) == timers
    with pytest.raises(RoostError):
        InstanceTimers.decode(Record(timers_key(KEY), b'{"a": [1]}', 5))


# --- what is due, and where ----------------------------------------------------------------------


def seen(*timers: Timer, owner: Stored[NodeRecord] | None = None, epoch: int = 1) -> Seen:
    record = owner.value if owner else None
    return Seen(of(*timers), instance(epoch=epoch, node="a") if owner else None, record)


UP, LOST = node("a", started_id="s1"), node("a", state=NodeState.LOST)


@pytest.mark.parametrize(
    ("one", "owner", "epoch", "due"),
    [
        (timer(due=NOW + 1, next=NOW + 1), UP, 1, False),
        (timer(), UP, 1, True),
        (timer(), None, 1, True),
        (timer(failed=True), UP, 1, False),
        (timer(next=NOW + 9, attempts=1), UP, 1, False),
        (claimed(timer(), 1, "s1", NOW + 9), UP, 1, False),
        (claimed(timer(), 1, "s1", NOW), UP, 1, True),
        (claimed(timer(), 1, "s0", NOW + 9), UP, 1, True),
        (claimed(timer(), 1, "s1", NOW + 9), UP, 2, True),
        (claimed(timer(), 1, "s1", NOW + 9), LOST, 1, True),
    ],
    ids=["early", "due", "unplaced", "failed", "backoff", "claimed", "run out", "restarted", "moved", "lost"],
)
def test_what_is_due(one: Timer, owner: Stored[NodeRecord] | None, epoch: int, due: bool) -> None:
    assert is_due(one, seen(one, owner=owner, epoch=epoch), NOW) is due


def test_of_an_instance_the_one_that_is_due_longest_comes_first() -> None:
    timers = (timer("a", due=NOW - 1), timer("b", due=NOW - 2), timer("c", due=NOW + 1, next=NOW + 1))
    first = first_due(seen(*timers), NOW)
    assert first is not None
    assert first.name == "b"
    assert first_due(seen(timers[2]), NOW) is None


@given(
    st.sampled_from([UP, LOST, None]),
    st.sets(st.sampled_from(["c1", "c2", "c3"]), min_size=1),
    st.sampled_from(["c1", "c2", "c3"]),
)
def test_a_timer_is_one_coordinators(owner: Stored[NodeRecord] | None, alive: set[str], holder: str) -> None:
    one = seen(timer(), owner=owner)
    whose = [me for me in alive if is_mine(one, me, ["a"] if me == holder else [], alive)]
    if owner is UP:
        assert whose == [holder] * (holder in alive)
    else:
        assert len(whose) == 1


def test_so_many_start_at_once_and_the_oldest_first() -> None:
    due = []
    for n in range(1000):
        key = InstanceKey("acme", "chef", f"u{n}")
        one = timer(due=NOW - n)
        where = instance(key=key, node=f"n{n % 50}")
        due.append((Seen(of(one, key=key), where, UP.value), one))
    chosen = choose(due, [], Counter())
    assert len(chosen) == AT_ONCE
    assert [t.due for _, t in chosen] == [NOW - n for n in range(999, 999 - AT_ONCE, -1)]
    running = {InstanceKey("acme", "chef", "u999")}
    busy = Counter({"n48": AT_ONCE_OF_A_NODE - 1})
    chosen = choose(due, running, busy)
    users = [s.timers.value.key.user for s, _ in chosen]
    assert (len(users), "u999" in users) == (AT_ONCE - 1, False)
    assert [u for u in users if int(u[1:]) % 50 == 48] == ["u998"]


# --- attempts ------------------------------------------------------------------------------------


def failing(reason: Reason) -> RoostError:
    return RoostError(reason, "told to")


def test_an_agents_failures_are_counted_and_waited_for_longer_each_time() -> None:
    one, waits = timer(), []
    while not one.failed:
        one = after_failure(claimed(one, 1, "s1", NOW + 99), failing(Reason.TURN_FAILED), NOW)
        waits.append(one.next - NOW)
    assert one.attempts == MAX_ATTEMPTS
    assert waits[:-1] == [FIRST_BACKOFF * 4**n for n in range(MAX_ATTEMPTS - 1)]
    assert one.error == "TURN_FAILED: told to"
    assert not one.started_id


@pytest.mark.parametrize("reason", [Reason.NODE_SUSPENDED, Reason.STORE_UNAVAILABLE, Reason.EFFECT_UNCERTAIN])
def test_what_is_not_the_agents_fault_uses_up_no_attempt(reason: Reason) -> None:
    one = timer()
    for _ in range(3 * MAX_ATTEMPTS):
        one = after_failure(claimed(one, 1, "s1", NOW + 99), failing(reason), NOW)
    assert (one.attempts, one.failed) == (0, False)
    assert one.next > NOW


# --- transactions --------------------------------------------------------------------------------


async def test_a_commit_and_its_timers_are_one_transaction_whatever_is_lost() -> None:
    for fault in Fault:
        store = FlakyStore()
        ownership = Ownership(store, NoCache(), lambda: NOW, 1.0)
        assert isinstance(await ownership.place(KEY, None, "a", "nearest", "v1"), Placed)
        timers = Timers(store, lambda key: None, lambda: NOW)
        beside = timers.beside(KEY, Changes("t1", [Setting("a", "", after=5.0)]), [])
        store.faults = [Fault.NONE, Fault.NONE, fault]
        for _ in range(2):
            try:
                await ownership.commit("a", KEY, 1, 1, "r1", "t1", beside)
                break
            except RoostError as error:
                assert error.reason is Reason.STORE_UNAVAILABLE
                assert (await timers.read(KEY)).revision == 0
        assert [t.name for t in (await timers.read(KEY)).value.timers] == ["a"]
        refused = timers.beside(KEY, Changes("t2", cancelled=["a"]), [])
        with pytest.raises(RoostError):
            await ownership.commit("b", KEY, 1, 2, "r2", "t2", refused)
        assert [t.name for t in (await timers.read(KEY)).value.timers] == ["a"]


async def test_a_stale_cache_of_timers_costs_a_read_and_loses_nothing() -> None:
    store = FlakyStore()
    ownership = Ownership(store, NoCache(), lambda: NOW, 1.0)
    await ownership.place(KEY, None, "a", "nearest", "v1")
    old = of(revision=0)
    timers = Timers(store, lambda key: old, lambda: NOW)
    for n in (1, 2, 3):
        beside = timers.beside(KEY, Changes(f"t{n}", [Setting(f"a{n}", "", after=5.0)]), [])
        await ownership.commit("a", KEY, 1, n, f"r{n}", f"t{n}", beside)
    found = await timers.read(KEY)
    assert [t.name for t in found.value.timers] == ["a1", "a2", "a3"]
    one = found.value.timers[1]
    assert await timers.claim(found, one, claimed(one, 1, "s1", NOW + 9)) is not None
    assert await timers.claim(found, one, claimed(one, 1, "s1", NOW + 9)) is None, "by whoever came second"
    await timers.change(KEY, one.turn_id, lambda t: replace(t, error="x"))
    await timers.change(KEY, "no such turn", lambda t: None)
    assert [t.error for t in (await timers.read(KEY)).value.timers] == ["", "x", ""]
    await timers.change(KEY, one.turn_id, lambda t: None)
    assert [t.name for t in (await timers.read(KEY)).value.timers] == ["a1", "a3"]


# --- alarms --------------------------------------------------------------------------------------


@dataclass
class World:
    """One node, `a`, linked to this coordinator. `answers`: what wakes end with, first to last."""

    store: FlakyStore = field(default_factory=FlakyStore)
    answers: list[RoostError | None] = field(default_factory=list)
    woken: list[link_pb2.Wake] = field(default_factory=list)
    now: float = NOW
    refusal: RoostError | None = None
    links: dict[str, str] = field(default_factory=lambda: {"a": "s1"})
    hold: asyncio.Event = field(default_factory=asyncio.Event)
    stored: Stored[InstanceTimers] | None = None

    def __post_init__(self) -> None:
        self.hold.set()
        self.timers = Timers(self.store, lambda key: None, lambda: self.now)
        self.alarms = Alarms("me", self, self.timers, self, self, lambda: self.now)

    async def set(self, *timers: Timer) -> None:
        await self.timers.claim(of(*timers, revision=0), timers[0], timers[0])

    async def one_pass(self) -> None:
        self.stored = await self.timers.read(KEY)
        await self.alarms.reconcile()
        await eventually(lambda: not self.alarms._running or not self.hold.is_set(), 5.0)

    async def left(self) -> tuple[Timer, ...]:
        return (await self.timers.read(KEY)).value.timers

    # View, Resolver, Nodes
    def scheduled(self) -> list[Seen]:
        assert self.stored is not None
        return [Seen(self.stored, instance(), UP.value)]

    def linked(self) -> Collection[str]:
        return self.links

    def alive(self) -> Collection[str]:
        return ["me"]

    def agent(self, tenant: str, name: str) -> AgentRecord | None:
        return None

    async def resolve(self, key: InstanceKey, client: Client) -> Resolved:
        if self.refusal is not None:
            raise self.refusal
        return Resolved(instance(), "a:1")

    def started_id(self, name: str) -> str | None:
        return self.links.get(name)

    async def wake(self, name: str, wake: link_pb2.Wake, timeout: float) -> None:
        self.woken.append(wake)
        await self.hold.wait()
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        await self.timers.change(KEY, wake.timer.turn_id, lambda _: None)  # by its commit


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.alarms.close()


async def test_what_is_due_is_woken_once(world: World) -> None:
    await world.set(timer(due=NOW + 5, next=NOW + 5))
    await world.one_pass()
    assert not world.woken, "early is not allowed"
    world.now = NOW + 5
    await world.one_pass()
    await world.one_pass()
    assert [(w.epoch, w.timer.name, w.timer.turn_id) for w in world.woken] == [
        (1, "wake", turn_id_of(KEY, "t1", "wake"))
    ]
    assert await world.left() == ()


async def test_a_turn_that_fails_is_tried_again_and_given_up_in_the_end(world: World) -> None:
    await world.set(timer())
    world.answers = [failing(Reason.TURN_FAILED)] * (MAX_ATTEMPTS + 1)
    for _ in range(MAX_ATTEMPTS + 2):
        await world.one_pass()
        world.now += 10_000
    assert len(world.woken) == MAX_ATTEMPTS
    assert len({w.timer.turn_id for w in world.woken}) == 1
    (left,) = await world.left()
    assert (left.failed, left.error) == (True, "TURN_FAILED: told to")


async def test_nobody_starts_it_again_while_its_node_is_at_it(world: World) -> None:
    await world.set(timer())
    world.hold.clear()
    await world.one_pass()
    await eventually(lambda: world.woken, 5.0)
    other = Alarms("other", world, world.timers, world, world, lambda: world.now)
    world.stored = await world.timers.read(KEY)
    await other.reconcile()
    await other.close()
    await world.one_pass()
    assert len(world.woken) == 1


async def test_a_link_that_ends_is_no_attempt_and_the_end_of_a_daemon_is(world: World) -> None:
    await world.set(timer())
    world.answers = [failing(Reason.NODE_UNREACHABLE)] * 99
    for _ in range(2 * MAX_ATTEMPTS):
        await world.one_pass()
        world.now += 10_000
    (left,) = await world.left()
    assert (left.attempts, left.started_id, left.failed) == (1, "s1", False)
    world.woken.clear()
    for n in range(MAX_ATTEMPTS + 2):
        world.links["a"] = f"started again {n}"
        await world.one_pass()
        world.now += 10_000
    (left,) = await world.left()
    assert (len(world.woken), left.failed) == (MAX_ATTEMPTS - 1, True)
    assert "cut off" in left.error


async def test_what_can_not_be_placed_waits_and_is_not_used_up(world: World) -> None:
    await world.set(timer())
    world.refusal = failing(Reason.NO_ROOM)
    for _ in range(20):
        await world.one_pass()
        world.now += 100
    (left,) = await world.left()
    assert (left.attempts, world.woken) == (0, [])
    world.refusal = None
    await world.one_pass()
    assert await world.left() == ()


async def test_what_was_applied_before_is_done(world: World) -> None:
    await world.set(timer())
    world.answers = [failing(Reason.TURN_REPLY_GONE)]
    await world.one_pass()
    assert await world.left() == ()

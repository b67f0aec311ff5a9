from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hypothesis import given
from hypothesis import strategies as st

from coordinator.cache import Cache
from coordinator.records import (
    AgentRecord,
    CoordinatorRecord,
    InstanceRecord,
    NodeRecord,
    NodeState,
    Phase,
    Stored,
    agent_key,
    coordinator_key,
    instance_key,
    node_key,
)
from coordinator.store.base import Delete, Put
from coordinator.store.memory import MemoryStore
from shared.identity import InstanceKey
from shared.lifecycle import Services
from shared.resources import Resources
from tests.unit.coordinator.support import KEY, info, instance

POLICY = '[agent]\nname = "chef"\n[run]\nentry = "a:b"\n[resources]\nmemory = "100M"\ncpu = 0.25\npids = 10\n'
NEED = Resources(100 << 20, 250, 10)
CHEF = AgentRecord("acme", "chef", "v1", POLICY, "ab" * 32)


async def put_instance(store: MemoryStore, record: InstanceRecord) -> Stored[InstanceRecord]:
    result = await store.txn([], [Put(instance_key(record.key), record.encode())])
    return Stored(record, result.revision)


async def settled(condition: Callable[[], object]) -> None:
    """Lets the cache's tasks run until `condition` holds; no time passes."""
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


@asynccontextmanager
async def running_cache(store: MemoryStore) -> AsyncIterator[Cache]:
    cache = Cache(store, list_every=3600)  # so whatever it hears, it hears by its watch
    async with Services() as services:
        cache.start(services)
        await cache.wait_listed()
        yield cache


async def test_it_has_what_was_there_and_hears_what_comes() -> None:
    store = MemoryStore()
    await put_instance(store, instance())
    async with running_cache(store) as cache:
        assert cache.instance(KEY) is not None
        later = await put_instance(store, instance(epoch=2, node="b"))
        await settled(lambda: cache.instance(KEY) == later)
        node = NodeRecord(info("a"), "me", NodeState.UP, False)
        await store.txn(
            [], [Put(node_key("a"), node.encode()), Put(agent_key("acme", "chef"), CHEF.encode())]
        )
        await settled(lambda: cache.node("a") and cache.agent("acme", "chef"))


async def test_what_is_reserved_is_what_is_placed_or_live() -> None:
    store = MemoryStore()
    await store.txn([], [Put(agent_key("acme", "chef"), CHEF.encode())])
    async with running_cache(store) as cache:
        assert cache.reserved("a") == Resources()
        await put_instance(store, instance())
        await put_instance(store, instance(key=InstanceKey("acme", "chef", "bob"), phase=Phase.LIVE))
        await put_instance(store, instance(key=InstanceKey("acme", "chef", "cyd"), phase=Phase.HIBERNATED))
        await settled(lambda: len(cache.instances_of("a")) == 3)
        assert cache.reserved("a") == NEED + NEED
        await put_instance(store, instance(epoch=2, node="b"))
        await settled(lambda: len(cache.instances_of("b")) == 1)
        assert (cache.reserved("a"), cache.reserved("b")) == (NEED, NEED)


async def test_a_move_is_told_once() -> None:
    store = MemoryStore()
    moves: list[tuple[str, str]] = []
    async with running_cache(store) as cache:
        cache.on_move = lambda old, new: moves.append((old.node, new.node))
        await put_instance(store, instance())
        moved = await put_instance(store, instance(epoch=2, node="b"))
        cache.learn_instance(moved)  # its own write, which the watch then tells again
        await settled(lambda: cache.instance(KEY) == moved)
        await put_instance(store, instance(epoch=2, node="b", phase=Phase.LIVE))
        await settled(lambda: cache.instance(KEY) != moved)
    assert moves in ([("a", "b")], []), "never twice; not at all if the first placing was never seen"


async def test_a_deletion_makes_it_look_and_only_the_look_counts() -> None:
    store = MemoryStore()
    record = CoordinatorRecord("c1", "host:1")
    lease = await store.grant_lease(5)
    await store.txn([], [Put(coordinator_key("c1"), record.encode(), lease)])
    async with running_cache(store) as cache:
        table = cache.coordinators
        passes = table.lister.status.passes
        store.advance(6)
        await settled(lambda: not table.records)
        assert table.lister.status.passes == passes + 1


async def test_a_deletion_that_was_undone_meanwhile_changes_nothing() -> None:
    store = MemoryStore()
    record = CoordinatorRecord("c1", "host:1")
    put = Put(coordinator_key("c1"), record.encode())
    await store.txn([], [put])
    async with running_cache(store) as cache:
        seen: list[int] = []
        await store.txn([], [Delete(coordinator_key("c1"))])
        await store.txn([], [put])
        for _ in range(50):
            seen.append(len(cache.coordinators.records))
            await asyncio.sleep(0)
    assert set(seen) == {1}


async def test_a_compaction_makes_it_list_again() -> None:
    store = MemoryStore()
    async with running_cache(store) as cache:
        for epoch in range(1, 6):
            await put_instance(store, instance(epoch=epoch))
        store.compact(store.revision)
        await settled(lambda: cache.instance(KEY) and cache.instance(KEY).value.epoch == 5)  # type: ignore[union-attr]
        await put_instance(store, instance(epoch=6))
        await settled(lambda: cache.instance(KEY).value.epoch == 6)  # type: ignore[union-attr]


async def test_a_record_that_cannot_be_read_leaves_the_others() -> None:
    store = MemoryStore()
    await store.txn([], [Put("instances/acme/chef/bad", b"{")])
    await put_instance(store, instance())
    async with running_cache(store) as cache:
        assert len(cache.instances.records) == 1


@given(st.permutations(range(6)))
def test_in_whatever_order_records_come_the_newest_stays(order: list[int]) -> None:
    cache = Cache(MemoryStore())
    versions = [Stored(instance(epoch=1 + i, node="ab"[i % 2]), 10 + i) for i in range(6)]
    for i in order:
        cache.learn_instance(versions[i])
    assert cache.instance(KEY) == versions[5]
    assert list(cache.instances_of("b")) == [KEY]
    assert not cache.instances_of("a")


moves = st.tuples(
    st.sampled_from("xyz"), st.sampled_from("ab"), st.sampled_from(Phase), st.integers(100, 300)
)


@given(st.lists(moves, max_size=20))
def test_a_sum_that_is_kept_equals_one_that_is_made_anew(history: list[tuple[str, str, Phase, int]]) -> None:
    """Instances move, sleep and wake, and the agent's needs change, in any order."""
    kept = Cache(MemoryStore())
    for revision, (user, node, phase, megabytes) in enumerate(history, start=10):
        agent = AgentRecord("acme", "chef", "v1", POLICY.replace("100M", f"{megabytes}M"), "ab" * 32)
        if megabytes % 2:
            kept.agents.learn(agent_key("acme", "chef"), Stored(agent, revision))
        key = InstanceKey("acme", "chef", user)
        kept.learn_instance(Stored(instance(key=key, node=node, phase=phase), revision))
        needed = kept.agent("acme", "chef")
        for name in "ab":
            awake = [r for r in kept.instances_of(name).values() if r.phase is not Phase.HIBERNATED]
            expected = sum((needed.need for _ in awake), Resources()) if needed else Resources()
            assert kept.reserved(name) == expected

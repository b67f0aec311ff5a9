from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cache import Cache
from coordinator.inline import InlineCommits
from coordinator.ownership import Ownership, Placed
from coordinator.quotas import Quota, Used, check, quota_key
from coordinator.records import Stored, instance_key
from coordinator.resolving import Resolving
from coordinator.services.link import LinkServicer
from coordinator.store.base import Delete, Put, Record
from coordinator.store.memory import MemoryStore
from coordinator.timers import Timers
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.fake_heap import MemoryHeap
from tests.unit.coordinator.support import KEY, instance

AMOUNTS = st.integers(0, 20)


@given(AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS, st.none() | AMOUNTS, AMOUNTS)
def test_only_growth_is_refused_and_only_beyond_the_limit(
    most_bytes: int, most: int, others: int, count: int, had: int | None, wants: int
) -> None:
    quota = Quota("acme", most_bytes, most)
    used = Used(others + (had or 0), count + (had is not None))
    beyond = most_bytes > 0 and others + wants > most_bytes and wants > (had or 0)
    too_many = had is None and most > 0 and used.instances + 1 > most
    try:
        check(quota, used, had, wants)
    except RoostError as error:
        assert error.reason is Reason.TENANT_QUOTA
        assert error.hint
        assert beyond or too_many
    else:
        assert not beyond
        assert not too_many


def test_a_quota_reads_back_as_it_was() -> None:
    quota = Quota("acme", 5, 7)
    assert Quota.decode(Record(quota_key("acme"), quota.encode(), 3)) == Stored(quota, 3)
    with pytest.raises(RoostError, match="quotas/acme"):
        Quota.decode(Record(quota_key("acme"), b"{}", 3))


async def test_what_a_tenant_uses_follows_the_records_however_they_come() -> None:
    cache = Cache(MemoryStore())
    other = InstanceKey("acme", "chef", "ben")
    for revision, key, size in ((1, KEY, 10), (2, other, 5), (4, KEY, 30), (3, KEY, 99)):
        cache.instances.learn(instance_key(key), Stored(instance(key=key, state_bytes=size), revision))
    assert cache.used("acme") == Used(35, 2)
    assert cache.used("nobody") == Used()
    cache.quotas.learn(quota_key("acme"), Stored(Quota("acme", 40, 2), 1))
    cache.check_quota(KEY, 35)
    for wants, key, is_new in ((36, KEY, False), (0, InstanceKey("acme", "chef", "cy"), True)):
        with pytest.raises(RoostError):
            cache.check_quota(key, wants, is_new)
    cache.check_quota(InstanceKey("free", "chef", "cy"), 1 << 40, is_new=True)


async def test_it_is_listed_again_after_a_deletion() -> None:
    store = MemoryStore()
    cache = Cache(store)
    await store.txn([], [Put(instance_key(KEY), instance(state_bytes=7).encode())])
    await cache.instances.refresh()
    assert cache.used("acme") == Used(7, 1)
    await store.txn([], [Delete(instance_key(KEY))])
    await cache.instances.refresh()
    assert cache.used("acme") == Used()


def coordinator_of(store: MemoryStore, cache: Cache) -> LinkServicer:
    """As far as it takes commits."""
    ownership = Ownership(store, cache, time.time, 1.0)
    resolving = Resolving(store, cache, ownership, None, hold=60.0)  # type: ignore[arg-type]
    timers = Timers(store, cache.timers_of, time.time, 1.0)
    inline = InlineCommits(store, MemoryHeap(), time.monotonic, 1.0)
    return LinkServicer(None, ownership, resolving, None, None, None, timers, inline)  # type: ignore[arg-type]


async def test_it_is_never_said_of_a_commit_that_was_applied_nor_to_who_is_not_the_owner() -> None:
    """The node sends it again to a coordinator that has not seen it, and where the tenant is at its limit."""
    store, behind = MemoryStore(), Cache(MemoryStore())
    placed = await Ownership(store, behind, time.time, 1.0).place(KEY, None, "a", "nearest", "v1")
    assert isinstance(placed, Placed)
    behind.quotas.learn(quota_key("acme"), Stored(Quota("acme", 5), 1))
    commit = link_pb2.CommitRequest(
        node="a", key=KEY.to_proto(), epoch=1, version=1, root="r1", turn_id="t1", state_bytes=10
    )
    with pytest.raises(RoostError) as refused:
        await coordinator_of(store, behind).Commit(commit, None)
    assert refused.value.reason is Reason.TENANT_QUOTA
    await coordinator_of(store, Cache(MemoryStore())).Commit(commit, None)
    behind.instances.records.clear()
    behind.learn_instance(placed.record)
    await coordinator_of(store, behind).Commit(commit, None)
    commit.node, commit.version = "b", 2
    with pytest.raises(RoostError) as stale:
        await coordinator_of(store, behind).Commit(commit, None)
    assert stale.value.reason is Reason.EPOCH_STALE

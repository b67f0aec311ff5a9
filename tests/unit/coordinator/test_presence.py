from __future__ import annotations

from dataclasses import dataclass

import pytest

from coordinator.presence import Presence
from coordinator.records import CoordinatorRecord, coordinator_key
from coordinator.store.base import Delete
from coordinator.store.memory import MemoryStore
from shared.errors import RoostError
from tests.unit.coordinator.support import Fault, FlakyStore

ME = CoordinatorRecord("me", "host:1")
TTL = 6.0


@dataclass
class World:
    """The store's clock and this process's, which move together unless a test says otherwise."""

    store: MemoryStore
    now: float = 100.0

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.store.advance(seconds)

    def presence(self, me: CoordinatorRecord = ME) -> Presence:
        return Presence(self.store, me, TTL, lambda: self.now)

    async def registered(self) -> bool:
        return await self.store.get(coordinator_key("me")) is not None


async def test_it_vouches_from_its_registration_on_and_as_long_as_it_is_kept() -> None:
    world = World(MemoryStore())
    presence = world.presence()
    assert not presence.vouches(world.now)
    for _ in range(10):
        await presence.keep()
        world.pass_time(TTL / 2)
        assert presence.vouches(world.now)
        assert await world.registered()
    assert presence.since == 100.0


async def test_it_stops_vouching_no_later_than_its_record_may_vanish() -> None:
    world = World(MemoryStore())
    presence = world.presence()
    await presence.keep()
    world.pass_time(TTL - 0.1)
    assert presence.vouches(world.now)
    assert await world.registered()
    world.pass_time(0.1)
    assert not presence.vouches(world.now)


async def test_after_its_lease_expired_it_registers_anew_and_starts_its_grace_then() -> None:
    world = World(MemoryStore())
    presence = world.presence()
    await presence.keep()
    world.pass_time(3 * TTL)
    assert not await world.registered()
    await presence.keep()
    assert await world.registered()
    assert presence.vouches(world.now)
    assert presence.since == world.now


async def test_fault_store_away_it_does_not_vouch_and_comes_back() -> None:
    store = FlakyStore()
    world = World(store)
    presence = world.presence()
    store.faults = [Fault.REQUEST_LOST]
    with pytest.raises(RoostError):
        await presence.keep()
    assert not presence.vouches(world.now)
    await presence.keep()
    assert presence.vouches(world.now)


async def test_a_record_that_somebody_deleted_is_put_again() -> None:
    world = World(MemoryStore())
    presence = world.presence()
    await presence.keep()
    await world.store.txn([], [Delete(coordinator_key("me"))])
    await presence.keep()
    await presence.keep()
    assert await world.registered()
    assert presence.vouches(world.now)


async def test_of_two_with_one_id_the_older_stops_vouching(caplog: pytest.LogCaptureFixture) -> None:
    world = World(MemoryStore())
    older = world.presence()
    newer = world.presence(CoordinatorRecord("me", "host:2"))
    await older.keep()
    await newer.keep()
    world.pass_time(TTL - 1)
    await older.keep()
    await newer.keep()
    world.pass_time(1)
    assert not older.vouches(world.now)
    assert newer.vouches(world.now)
    assert "give each an id of its own" in caplog.text


async def test_leaving_removes_the_record_at_once() -> None:
    world = World(MemoryStore())
    presence = world.presence()
    await presence.keep()
    await presence.leave()
    assert not await world.registered()
    assert not presence.vouches(world.now)
    await presence.keep()  # the loop's last pass, while the daemon stops
    assert not await world.registered()
    await presence.leave()

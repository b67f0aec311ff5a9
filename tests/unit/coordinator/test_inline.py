"""Small commits in one transaction, and what brings them to the blob store. The last tests go through every
order in which commits, flushes, moves and crashes can meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from coordinator.inline import INLINE, MOST_OF_ONE, InlineCommits, _decoded, _Waiting
from coordinator.ownership import Ownership, Placed, along_with
from coordinator.records import InstanceRecord, Stored
from coordinator.store.base import Delete, Expect, Listing, Put, Record, TxnResult
from coordinator.store.memory import MemoryStore
from shared.content import Blob, hash_of
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.support.schedules import Gates, explore, sample
from tests.unit.coordinator.support import KEY, Fault, FlakyStore, NoCache

OTHER = InstanceKey("acme", "chef", "bob")


class Kept:
    """A blob store: what was put, unless it is down."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.down = False

    async def put_all(self, blobs: Sequence[Blob]) -> None:
        for blob in blobs:
            await self.before(blob)
            if self.down:
                raise RoostError(Reason.BLOBS_UNAVAILABLE, "down")
            self.blobs[blob.hash] = blob.plain

    async def before(self, blob: Blob) -> None: ...


@dataclass
class World:
    """A store, a blob store, and coordinators. `blobs_of` are those that each published root needs."""

    store: MemoryStore = field(default_factory=MemoryStore)
    kept: Kept = field(default_factory=Kept)
    now: float = 0.0
    blobs_of: dict[str, list[Blob]] = field(default_factory=dict)
    inline_commits: type[InlineCommits] = InlineCommits

    def coordinator(self) -> Coordinator:
        return Coordinator(
            self,
            Ownership(self.store, NoCache(), lambda: 0.0, 1.0),
            self.inline_commits(self.store, self.kept, lambda: self.now, 1.0),
        )

    def readable(self, root: str) -> bool:
        return all(blob.hash in self.kept.blobs or blob.hash in self.inline() for blob in self.blobs_of[root])

    def inline(self) -> set[str]:
        records = [r for r in self.store._records.values() if r.key.startswith(INLINE)]
        return {blob.hash for record in records for blob in _blobs(record)}


@dataclass
class Coordinator:
    world: World
    ownership: Ownership
    inline: InlineCommits

    async def commit(self, node: str, epoch: int, version: int, text: str, key: InstanceKey = KEY) -> str:
        """As the servicer does it. The root is the last blob's name, and it needs the other one, too."""
        blobs = [Blob.of(f"{text} chunk".encode()), Blob.of(f"{text} manifest".encode())]
        root = blobs[-1].hash
        self.world.blobs_of[root] = blobs
        along = self.inline.writes(key, version, blobs)
        stored = await self.ownership.commit(
            node, key, epoch, version, root, f"t{version}", along_with(along)
        )
        self.inline.committed(key, version, blobs, stored.revision)
        return root

    async def fetch(self, node: str, epoch: int) -> tuple[InstanceRecord, set[str]]:
        record = (await self.ownership.wake(KEY, node, epoch, "v1")).value
        return record, {proto.hash for proto in await self.inline.of(KEY)}


def _blobs(record: Record) -> Sequence[Blob]:
    found = _decoded(record)
    assert found is not None
    return found.blobs


async def placed(world: World, node: str = "a") -> None:
    assert isinstance(await world.coordinator().ownership.place(KEY, None, node, "", "v1"), Placed)


async def test_a_commit_and_what_it_needs_are_one_transaction_and_reach_the_blob_store() -> None:
    world = World()
    await placed(world)
    c = world.coordinator()
    before = world.store.revision
    root = await c.commit("a", 1, 1, "one")
    assert world.store.revision == before + 1
    assert world.readable(root)
    assert not world.kept.blobs
    record, inline = await c.fetch("a", 1)
    assert (record.version, record.root) == (1, root)
    assert inline == {blob.hash for blob in world.blobs_of[root]}
    await c.inline.reconcile()
    assert (world.inline(), set(world.kept.blobs)) == (set(), inline)
    assert (await c.fetch("a", 1))[1] == set()


async def test_a_refused_commit_leaves_nothing() -> None:
    world = World()
    await placed(world)
    c = world.coordinator()
    with pytest.raises(RoostError) as caught:
        await c.commit("b", 1, 1, "one")
    assert caught.value.reason is Reason.EPOCH_STALE
    assert not world.inline()


async def test_a_commit_whose_answer_was_lost_is_brought_on_all_the_same() -> None:
    world = World(store=FlakyStore())
    await placed(world)
    c = world.coordinator()
    assert isinstance(world.store, FlakyStore)
    world.store.faults = [Fault.NONE, Fault.ANSWER_LOST, Fault.REQUEST_LOST]  # read, write, read back
    with pytest.raises(RoostError):
        await c.commit("a", 1, 1, "one")
    root = await c.commit("a", 1, 1, "one")  # sent again: it was applied
    assert world.readable(root)
    await c.inline.reconcile()
    assert not world.inline()
    assert world.readable(root)


async def test_what_a_dead_coordinator_took_is_taken_over_by_another() -> None:
    world = World()
    await placed(world)
    root = await world.coordinator().commit("a", 1, 1, "one")
    other = world.coordinator()
    await other.inline.reconcile()  # seen for the first time: it may be on its way
    assert world.inline()
    world.now += 5
    await other.inline.reconcile()
    assert world.inline(), "not listed again so soon"
    world.now += 6
    await other.inline.reconcile()
    assert not world.inline()
    assert world.readable(root)


async def test_a_blob_store_that_is_down_holds_up_little_and_loses_nothing() -> None:
    world = World()
    await placed(world)
    c = world.coordinator()
    world.kept.down = True
    roots = [await c.commit("a", 1, version, f"v{version}") for version in range(1, 101)]
    for _ in range(2):
        with pytest.raises(RoostError) as caught:
            await c.inline.reconcile()
        assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
    assert all(map(world.readable, roots))
    world.kept.down = False
    await c.inline.reconcile()
    assert not world.inline()
    assert all(map(world.readable, roots))


async def test_so_much_waits_of_one_instance_and_others_go_on() -> None:
    world = World()
    await placed(world)
    c = world.coordinator()
    world.kept.down = True
    big = Blob.of(b"x" * (1 << 20))
    for version in range(1, MOST_OF_ONE // len(big.plain) + 1):
        assert c.inline.writes(KEY, version, [big])
        c.inline.committed(KEY, version, [big], 1)
    with pytest.raises(RoostError) as caught:
        c.inline.writes(KEY, 9, [big])
    assert caught.value.reason is Reason.BLOBS_UNAVAILABLE
    assert c.inline.writes(KEY, 9, []) == []
    assert c.inline.writes(OTHER, 9, [big])
    for other in range(40):
        c.inline.committed(InstanceKey("acme", "chef", f"u{other}"), 1, [big], 1)
    with pytest.raises(RoostError):
        c.inline.writes(OTHER, 9, [big])


async def test_more_than_a_fetch_can_carry_goes_to_the_blob_store_first() -> None:
    world = World()
    await placed(world)
    for version in range(200):  # through many coordinators, each of which took some
        noise = b"".join(bytes.fromhex(hash_of(b"%d %d" % (version, i))) for i in range(1000))
        (write,) = world.coordinator().inline.writes(KEY, version, [Blob.of(noise)])
        await world.store.txn([], [write])
    assert await world.coordinator().inline.of(KEY) == []
    assert len(world.kept.blobs) == 200
    assert not world.inline()


async def test_what_no_coordinator_wrote_stays_and_holds_up_nobody() -> None:
    world = World()
    await placed(world)
    c = world.coordinator()
    await world.store.txn([], [Put(f"{INLINE}acme/chef/zoe/1", b"\xff\xff")])
    root = await world.coordinator().commit("a", 1, 1, "one")
    for _ in range(3):
        world.now += 11
        await c.inline.reconcile()
    assert root in world.kept.blobs
    assert [r.key for r in (await world.store.list(INLINE)).records] == [f"{INLINE}acme/chef/zoe/1"]


# --- every interleaving ----------------------------------------------------------------------------


class GatedStore(MemoryStore):
    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self._gates = gates

    async def get(self, key: str, timeout: float = 5.0) -> Record | None:
        await self._gates.arrive(f"get {key}")
        return await super().get(key, timeout)

    async def list(self, prefix: str, timeout: float = 5.0) -> Listing:
        await self._gates.arrive(f"list {prefix}")
        return await super().list(prefix, timeout)

    async def txn(
        self, guards: Sequence[Expect], writes: Sequence[Put | Delete], timeout: float = 5.0
    ) -> TxnResult:
        await self._gates.arrive(f"txn {[w.key for w in writes]}")
        return await super().txn(guards, writes, timeout)


class GatedKept(Kept):
    def __init__(self, gates: Gates) -> None:
        super().__init__()
        self._gates = gates

    async def before(self, blob: Blob) -> None:
        await self._gates.arrive(f"put {blob.plain!r}")


class Meeting:
    """An instance at version 1 whose blobs lie inline; coordinators one and two; nodes a and b."""

    def __init__(self, gates: Gates, inline_commits: type[InlineCommits] = InlineCommits) -> None:
        self.gates = gates
        self.world = World(GatedStore(gates), GatedKept(gates), inline_commits=inline_commits)
        self.one, self.two = self.world.coordinator(), self.world.coordinator()
        self.published: list[str] = []

    async def begin(self) -> None:
        await placed(self.world)
        self.published.append(await self.one.commit("a", 1, 1, "v1"))
        await self.two.inline.reconcile()  # it has seen what lies there
        self.world.now += 11
        self.one.inline._list_at += 100

    async def commit(self, c: Coordinator, node: str, epoch: int, version: int) -> None:
        """What was refused may be so; what was not is published."""
        try:
            self.published.append(await c.commit(node, epoch, version, f"v{version} by {node}"))
        except RoostError as error:
            assert error.reason is Reason.EPOCH_STALE

    async def read(self, c: Coordinator, node: str, epoch: int) -> InstanceRecord | None:
        """Fetch and load, as a node does. None if it does not own it."""
        try:
            record, inline = await c.fetch(node, epoch)
        except RoostError as error:
            assert error.reason is Reason.EPOCH_STALE
            return None
        for blob in self.world.blobs_of[record.root]:
            await self.gates.arrive("read the blob store")
            assert blob.hash in inline or blob.hash in self.world.kept.blobs, "RESTORE_INCOMPLETE"
        return record

    async def move_and_go_on(self) -> None:
        """To b, which reads what it has got, and commits the next version."""
        seen: Stored[InstanceRecord] | None = await self.two.ownership.read(KEY)
        while not isinstance(outcome := await self.two.ownership.place(KEY, seen, "b", "", "v1"), Placed):
            seen = outcome.record
        record = await self.read(self.two, "b", 2)
        assert record is not None
        await self.commit(self.two, "b", 2, record.version + 1)

    async def check(self) -> None:
        assert all(map(self.world.readable, self.published))

    async def end(self) -> None:
        """All have ended, however: whoever lives brings everything to the blob store."""
        await self.gates.finish(self.check)
        last = self.world.coordinator()
        for _ in range(2):
            await last.inline.reconcile()
            self.world.now += 11
        assert not self.world.inline()
        await self.check()


async def test_a_flush_a_commit_and_a_crash_of_the_coordinator_in_every_order() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        gates.run("commit", meeting.commit(meeting.one, "a", 1, 2), mortal=True)
        await meeting.end()

    assert await explore(scenario) > 50


async def test_a_flush_and_a_fetch_in_every_order() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        gates.run("fetch", meeting.read(meeting.one, "a", 1))
        await meeting.end()

    assert await explore(scenario) > 50


async def test_two_coordinators_that_flush_the_same_in_every_order() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        gates.run("take over", meeting.two.inline.reconcile(), mortal=True)
        await meeting.end()

    assert await explore(scenario) > 50


async def test_a_move_during_a_flush_in_every_order() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        gates.run("move", meeting.move_and_go_on())
        await meeting.end()

    assert await explore(scenario) > 500


async def test_a_commit_that_meets_a_move_in_every_order() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("commit", meeting.commit(meeting.one, "a", 1, 2), mortal=True)
        gates.run("move", meeting.move_and_go_on())
        await meeting.end()

    assert await explore(scenario) > 20


async def test_all_of_them_at_once() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates)
        await meeting.begin()
        gates.run("commit", meeting.commit(meeting.one, "a", 1, 2), mortal=True)
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        gates.run("take over", meeting.two.inline.reconcile(), mortal=True)
        gates.run("move", meeting.move_and_go_on())
        await meeting.end()

    await sample(scenario, 1000)


# --- these tests fail when they should -------------------------------------------------------------


class DeletesFirst(InlineCommits):
    async def _flush(self, some: Sequence[_Waiting]) -> None:
        await self._delete(some)
        await super()._flush(some)


class TakesNothingOver(InlineCommits):
    async def _take_over(self) -> None: ...


class ListsFirst(Meeting):
    async def read(self, c: Coordinator, node: str, epoch: int) -> InstanceRecord | None:
        inline = {proto.hash for proto in await c.inline.of(KEY)}
        record = (await c.ownership.wake(KEY, node, epoch, "v1")).value
        for blob in self.world.blobs_of[record.root]:
            assert blob.hash in inline or blob.hash in self.world.kept.blobs, "RESTORE_INCOMPLETE"
        return record


@pytest.mark.parametrize("broken", [DeletesFirst, TakesNothingOver])
async def test_a_planted_bug_in_the_flush_is_found(broken: type[InlineCommits]) -> None:
    async def scenario(gates: Gates) -> None:
        meeting = Meeting(gates, broken)
        await meeting.begin()
        gates.run("flush", meeting.one.inline.reconcile(), mortal=True)
        await meeting.end()

    with pytest.raises(AssertionError):
        await explore(scenario)


async def test_a_planted_bug_in_the_fetch_is_found() -> None:
    async def scenario(gates: Gates) -> None:
        meeting = ListsFirst(gates)
        await meeting.begin()
        gates.run("commit", meeting.commit(meeting.one, "a", 1, 2))
        gates.run("fetch", meeting.read(meeting.one, "a", 1))
        await meeting.end()

    with pytest.raises(AssertionError, match="RESTORE_INCOMPLETE"):
        await explore(scenario)

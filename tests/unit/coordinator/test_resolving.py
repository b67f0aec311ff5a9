from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.cache import Cache
from coordinator.ownership import Ownership
from coordinator.placement import Client
from coordinator.records import NodeRecord, NodeState, Phase, Stored
from coordinator.resolving import Answer, Challenge, Move, Resolving, Wake, decide
from coordinator.store.memory import MemoryStore
from protos.v1 import link_pb2
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.unit.coordinator.support import KEY, NoCache, info, instance, mesh_in

NOBODY: frozenset[str] = frozenset()


def record(phase: Phase = Phase.LIVE) -> Stored[object]:
    return Stored(instance(phase=phase), 5)


def owner(state: NodeState = NodeState.UP, draining: bool = False) -> NodeRecord:
    return NodeRecord(info("a"), "me", state, draining)


def test_a_new_instance_is_placed() -> None:
    assert decide(None, None, NOBODY) == Move(None)


def test_a_live_owner_is_the_answer() -> None:
    for phase in (Phase.LIVE, Phase.PLACED):
        assert decide(record(phase), owner(), NOBODY) == Answer(record(phase))  # type: ignore[arg-type]


def test_a_sleeper_is_woken_where_it_sleeps() -> None:
    asleep = record(Phase.HIBERNATED)
    assert decide(asleep, owner(), NOBODY) == Wake(asleep)  # type: ignore[arg-type]


def test_a_lost_or_forgotten_owner_is_left_for_good() -> None:
    for gone in (owner(NodeState.LOST), None):
        assert decide(record(), gone, NOBODY) == Move(record(), "is lost")  # type: ignore[arg-type]


def test_an_owner_that_failed_the_client_is_asked_about_before_anything_moves() -> None:
    assert decide(record(), owner(), frozenset({"a"})) == Challenge(record())  # type: ignore[arg-type]
    assert decide(record(), owner(NodeState.LOST), frozenset({"a"})) == Move(record(), "is lost")  # type: ignore[arg-type]
    assert decide(record(), owner(), frozenset({"b"})) == Answer(record())  # type: ignore[arg-type]


def test_a_draining_owner_gives_it_up_if_it_can() -> None:
    assert decide(record(), owner(draining=True), NOBODY) == Move(record(), "is draining", may_stay=True)  # type: ignore[arg-type]


@given(
    st.sampled_from(Phase), st.sampled_from(NodeState), st.booleans(), st.frozensets(st.sampled_from("ab"))
)
def test_only_a_live_owner_that_is_not_excluded_is_ever_the_answer(
    phase: Phase, state: NodeState, draining: bool, exclude: frozenset[str]
) -> None:
    step = decide(record(phase), owner(state, draining), exclude)  # type: ignore[arg-type]
    if isinstance(step, Answer | Wake):
        assert state is NodeState.UP
        assert "a" not in exclude


# --- moving while the owner goes on committing -----------------------------------------------------


class BusyOwner:
    """A reach to whose every reservation the instance's owner commits once more meanwhile."""

    def __init__(self, ownership: Ownership) -> None:
        self.reserved: list[tuple[str, int]] = []
        self._ownership = ownership

    async def reserve(self, node: NodeRecord, reserve: link_pb2.Reserve) -> None:
        self.reserved.append((node.info.id, reserve.epoch))
        version = len(self.reserved)
        await self._ownership.commit("a", KEY, 1, version, f"r{version}", "t")

    async def is_fresh(self, node: NodeRecord) -> bool:
        return True


async def test_a_commit_while_the_new_owner_reserves_neither_stops_the_move_nor_is_lost() -> None:
    store = MemoryStore()
    cache = await mesh_in(store, "ab")
    mine = Ownership(store, cache, lambda: 1e9, 1.0)
    elsewhere = Ownership(store, NoCache(), lambda: 1e9, 1.0)  # the owner's commits go to another coordinator
    await mine.place(KEY, None, "a", "nearest", "v1")
    reach = BusyOwner(elsewhere)
    resolving = Resolving(store, cache, mine, reach, hold=60.0)
    found = await resolving.resolve(KEY, Client(exclude=frozenset({"a"})))
    assert (found.record.node, found.record.epoch, found.record.version) == ("b", 2, 1)
    assert reach.reserved == [("b", 2)]


# --- sizes -----------------------------------------------------------------------------------------


class Willing:
    """Keeps what it was asked; refuses with `refusal`."""

    def __init__(self) -> None:
        self.asked: list[link_pb2.Reserve] = []
        self.refusal: RoostError | None = None

    async def reserve(self, node: NodeRecord, reserve: link_pb2.Reserve) -> None:
        self.asked.append(reserve)
        if self.refusal is not None:
            raise self.refusal

    async def is_fresh(self, node: NodeRecord) -> bool:
        return True


async def two_nodes(reach: Willing) -> tuple[Resolving, Ownership, Cache]:
    store = MemoryStore()
    cache = await mesh_in(store, "ab")
    ownership = Ownership(store, cache, lambda: 1e9, 1.0)
    return Resolving(store, cache, ownership, reach, hold=60.0), ownership, cache


BIG = Resources(512 << 20, 1000, 50)


async def test_what_runs_is_resized_by_its_node_before_it_is_written_down() -> None:
    reach = Willing()
    resolving, ownership, cache = await two_nodes(reach)
    await ownership.place(KEY, None, "a", "nearest", "v1")
    record, need = await resolving.resize(KEY, lambda present: BIG)
    (asked,) = reach.asked
    assert (asked.epoch, asked.resize, Resources.from_proto(asked.size)) == (1, True, BIG)
    assert (record.size, need, record.epoch, record.version) == (BIG, BIG, 1, 0)
    assert cache.reserved("a") == BIG, "placement counts what it has"
    reach.refusal = RoostError(Reason.NODE_FULL, "node a has no room")
    with pytest.raises(RoostError) as caught:
        await resolving.resize(KEY, lambda present: present + present)
    assert (caught.value.reason, bool(caught.value.hint)) == (Reason.NO_ROOM, True)
    stored = await ownership.read(KEY)
    assert stored is not None
    assert stored.value.size == BIG, "as it was"
    assert cache.reserved("a") == BIG


async def test_a_size_stays_with_the_instance_wherever_it_goes() -> None:
    reach = Willing()
    resolving, ownership, _ = await two_nodes(reach)
    await ownership.place(KEY, None, "a", "nearest", "v1")
    await ownership.hibernate("a", KEY, 1)
    record, _ = await resolving.resize(KEY, lambda present: BIG)
    assert (record.size, reach.asked) == (BIG, []), "nobody has to agree while it sleeps"
    await resolving.resolve(KEY, Client())
    assert Resources.from_proto(reach.asked[-1].size) == BIG, "woken"
    found = await resolving.resolve(KEY, Client(exclude=frozenset({"a"})))
    assert (found.record.node, found.record.size) == ("b", BIG)
    assert Resources.from_proto(reach.asked[-1].size) == BIG, "moved"
    record, need = await resolving.resize(KEY, lambda present: None)
    assert (record.size, need.memory_bytes) == (None, 128 << 20)


async def test_nobody_is_resized_before_it_is_there() -> None:
    resolving, _, _ = await two_nodes(Willing())
    with pytest.raises(RoostError, match="no instance"):
        await resolving.resize(KEY, lambda present: BIG)

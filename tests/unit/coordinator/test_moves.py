"""A move is given up at any point before its transaction, and done after it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.moves import Moved, Moves, Wish
from coordinator.ownership import Ownership
from coordinator.records import NodeRecord, Phase
from coordinator.resolving import Resolving
from protos.v1 import blobs_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from tests.unit.coordinator.support import KEY, Fault, FlakyStore, mesh_in
from tests.unit.coordinator.test_resolving import Willing


@dataclass
class Nodes:
    """Does what it is asked, or fails at `fails`; `commits`: what the source commits while they prepare."""

    ownership: Ownership
    fails: dict[str, Reason] = field(default_factory=dict)
    commits: int = 0
    released_live: bool = True
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    async def move(self, node: NodeRecord, step: link_pb2.MoveStep, timeout: float) -> link_pb2.MoveStepReply:
        kind = step.WhichOneof("step") or ""
        self.asked.append((node.info.id, kind, step.epoch))
        if reason := self.fails.get(kind):
            raise RoostError(reason, "told to")
        if kind == "prepare" and self.commits:
            self.commits -= 1
            version = step.prepare.version + 1
            await self.ownership.commit("a", KEY, 1, version, f"r{version}", f"t{version}")
        return link_pb2.MoveStepReply(bytes=10, live=self.released_live, micros=2000)

    @property
    def kinds(self) -> list[str]:
        return [kind for _, kind, _ in self.asked]


class NothingInline:
    async def of(self, key: InstanceKey) -> list[blobs_pb2.Blob]:
        return []


@dataclass
class Bench:
    store: FlakyStore
    ownership: Ownership
    nodes: Nodes
    moves: Moves

    async def move(self, target: str | None = "b", now: bool = False) -> Moved:
        return await self.moves.move(Wish(KEY, target, "a test", now=now), lambda text: None)


async def bench(**nodes: object) -> Bench:
    store = FlakyStore()
    cache = await mesh_in(store, "abc")
    ownership = Ownership(store, cache, lambda: 1e9, 1.0)
    resolving = Resolving(store, cache, ownership, Willing(), hold=60.0)
    await ownership.place(KEY, None, "a", "nearest", "v1")
    await ownership.wake(KEY, "a", 1, "v1")
    asked = Nodes(ownership, **nodes)  # type: ignore[arg-type]
    return Bench(
        store, ownership, asked, Moves(ownership, resolving, asked, NothingInline(), 60.0, lambda: 5.0)
    )


async def owner(b: Bench) -> tuple[str, int]:
    stored = await b.ownership.read(KEY)
    assert stored is not None
    return stored.value.node, stored.value.epoch


async def test_the_target_prepares_the_source_lets_go_and_then_it_moves() -> None:
    b = await bench()
    moved = await b.move()
    assert b.nodes.asked == [("b", "prepare", 2), ("a", "release", 1), ("b", "ready", 2)]
    assert (moved.record.node, moved.record.epoch, moved.prefetched, moved.live) == ("b", 2, 10, True)
    assert moved.pause == pytest.approx(0.002), "what the source counted, and here the clock stands"
    assert await owner(b) == ("b", 2)


async def test_what_is_committed_while_the_target_prepares_is_prepared_again() -> None:
    b = await bench(commits=2)
    moved = await b.move()
    assert b.nodes.kinds == ["prepare", "prepare", "prepare", "release", "ready"]
    assert moved.record.version == 2
    b = await bench(commits=9)
    await b.move()
    assert b.nodes.kinds.count("prepare") == 3, "one that never rests moves all the same"


@pytest.mark.parametrize(
    ("fails", "reason", "asked"),
    [
        ("prepare", Reason.NODE_FULL, ["prepare"]),
        ("release", Reason.MOVE_GIVEN_UP, ["prepare", "release"]),
        ("release", Reason.NODE_UNREACHABLE, ["prepare", "release", "keep_on"]),
    ],
)
async def test_a_refusal_before_the_transaction_changes_nothing(
    fails: str, reason: Reason, asked: list[str]
) -> None:
    b = await bench(fails={fails: reason})
    with pytest.raises(RoostError) as caught:
        await b.move()
    assert caught.value.reason is (reason if fails == "prepare" else Reason.MOVE_GIVEN_UP)
    assert b.nodes.kinds == asked
    assert await owner(b) == ("a", 1)
    b.nodes.fails.clear()
    await b.move()
    assert await owner(b) == ("b", 2)


async def test_a_store_that_does_not_answer_lets_the_source_go_on() -> None:
    b = await bench()

    async def lose(node: NodeRecord, step: link_pb2.MoveStep, timeout: float) -> link_pb2.MoveStepReply:
        if step.HasField("release"):
            b.store.faults = [Fault.REQUEST_LOST] * 2
        return await b.nodes.move(node, step, timeout)

    b.moves._reach = type("Losing", (), {"move": staticmethod(lose)})()
    with pytest.raises(RoostError) as caught:
        await b.move()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert b.nodes.kinds[-1] == "keep_on"
    assert await owner(b) == ("a", 1)


async def test_with_now_it_goes_ahead_without_the_source() -> None:
    for reason in (Reason.MOVE_GIVEN_UP, Reason.NODE_UNREACHABLE):
        b = await bench(fails={"release": reason})
        await b.move(now=True)
        assert await owner(b) == ("b", 2)


async def test_a_target_that_can_not_start_it_owns_it_all_the_same() -> None:
    b = await bench(fails={"ready": Reason.AGENT_CRASHED})
    moved = await b.move()
    assert moved.trouble
    assert await owner(b) == ("b", 2)


async def test_what_sleeps_sleeps_on_elsewhere() -> None:
    b = await bench(released_live=False)
    await b.ownership.hibernate("a", KEY, 1)
    moved = await b.move()
    assert (moved.live, moved.pause, moved.record.phase) == (False, 0.0, Phase.HIBERNATED)
    assert "ready" not in b.nodes.kinds


async def test_any_node_will_do_if_none_is_named_and_one_that_refuses_is_passed_over() -> None:
    b = await bench()
    calls = 0

    async def refuse_once(
        node: NodeRecord, step: link_pb2.MoveStep, timeout: float
    ) -> link_pb2.MoveStepReply:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RoostError(Reason.NODE_FULL, "full")
        return await b.nodes.move(node, step, timeout)

    b.moves._reach = type("Refusing", (), {"move": staticmethod(refuse_once)})()
    moved = await b.move(target=None)
    assert moved.record.node in ("b", "c")
    b = await bench(fails={"prepare": Reason.NODE_FULL})
    with pytest.raises(RoostError) as caught:
        await b.move(target=None)
    assert caught.value.reason is Reason.NO_ROOM


async def test_somebody_elses_move_counts() -> None:
    b = await bench()

    async def meanwhile(node: NodeRecord, step: link_pb2.MoveStep, timeout: float) -> link_pb2.MoveStepReply:
        if step.HasField("release"):
            with pytest.raises(RoostError, match="already"):
                await b.move("c")
            await b.ownership.place(KEY, await b.ownership.read(KEY), "c", "somebody else", "v1")
        return await b.nodes.move(node, step, timeout)

    b.moves._reach = type("Meanwhile", (), {"move": staticmethod(meanwhile)})()
    with pytest.raises(RoostError, match="c has become its owner"):
        await b.move("b")
    assert await owner(b) == ("c", 2)
    assert (await b.move("c")).pause == 0, "it is there"


@given(
    st.sets(st.sampled_from(["prepare", "release", "ready"])),
    st.lists(st.sampled_from(Fault), max_size=6),
    st.booleans(),
)
def test_whatever_fails_it_is_on_one_of_the_two_with_all_that_was_committed(
    fails: set[str], faults: list[Fault], now: bool
) -> None:
    async def run() -> None:
        b = await bench(fails=dict.fromkeys(fails, Reason.NODE_UNREACHABLE))
        await b.ownership.commit("a", KEY, 1, 1, "r1", "t1")
        b.store.faults = faults
        moved = None
        with suppress(RoostError):
            moved = await b.move(now=now)
        b.store.faults = []
        where = await owner(b)
        stored = await b.ownership.read(KEY)
        assert stored is not None
        assert (stored.value.version, stored.value.root) == (1, "r1")
        assert where == ("b", 2) if moved else where in (("a", 1), ("b", 2))

    asyncio.run(run())

"""A coordinator with a real etcd and real gRPC; nodes are fakes that hold real links."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protos.v1 import admin_pb2, common_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import verify_ticket
from shared.resources import Resources
from tests.support.coordinators import POLICY, TTL, Caller, config, in_process, key
from tests.support.etcd import Etcd, running_etcd
from tests.support.eventually import eventually
from tests.support.fake_node import FakeNode, running_node

OSLO, PARIS = (59.9, 10.8), (48.9, 2.4)


@pytest_asyncio.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Etcd]:
    (tmp_path / "etcd").mkdir()
    async with running_etcd(tmp_path / "etcd") as running:
        yield running


@pytest_asyncio.fixture
async def caller(etcd: Etcd, tmp_path: Path) -> AsyncIterator[Caller]:
    async with in_process(config("c1", etcd.endpoint, tmp_path)) as running:
        await running.deploy()
        yield running


@pytest_asyncio.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as entered:
        yield entered


async def up(stack: AsyncExitStack, caller: Caller, *nodes: FakeNode) -> None:
    for node in nodes:
        await stack.enter_async_context(running_node(node))
    await caller.wait_nodes(*nodes)


def reason(caught: pytest.ExceptionInfo[RoostError]) -> Reason:
    assert caught.value.hint or caught.value.reason is Reason.DEADLINE, caught.value
    return caught.value.reason


# --- placing and resolving -------------------------------------------------------------------------


async def test_a_new_user_is_placed_on_the_nearest_node_which_has_reserved(
    caller: Caller, stack: AsyncExitStack
) -> None:
    oslo = FakeNode("oslo", [caller.address], position=OSLO)
    paris = FakeNode("paris", [caller.address], position=PARIS)
    cloud = FakeNode("cloud", [caller.address], role=common_pb2.CLOUD, position=PARIS)
    await up(stack, caller, oslo, paris, cloud)
    near_paris = common_pb2.Position(latitude=48.8, longitude=2.3)
    reply = await caller.resolve("ana", position=near_paris)
    assert (reply.node, reply.epoch, reply.address) == ("paris", 1, paris.address)
    assert "nearest of 2 edges with room" in reply.why
    assert [(r.key.user, r.epoch, r.agent.policy_toml) for r in paris.reserves] == [("ana", 1, POLICY)]
    assert paris.welcome is not None
    ticket_key = Ed25519PublicKey.from_public_bytes(paris.welcome.ticket_keys[0])
    ticket = verify_ticket(reply.ticket, [ticket_key], "paris", time.time())
    assert (ticket.epoch, str(ticket.key)) == (1, "acme/chef/ana")
    again = await caller.resolve("ana", position=common_pb2.Position(latitude=60, longitude=11))
    assert (again.node, again.epoch, again.why) == ("paris", 1, reply.why)
    assert len(paris.reserves) == 1


async def test_what_the_client_measured_counts_more_than_distance(
    caller: Caller, stack: AsyncExitStack
) -> None:
    nodes = [
        FakeNode("oslo", [caller.address], position=OSLO),
        FakeNode("paris", [caller.address], position=PARIS),
    ]
    await up(stack, caller, *nodes)
    reply = await caller.resolve(
        "ana", position=common_pb2.Position(latitude=48.8, longitude=2.3), rtt_ms={"oslo": 0.4, "paris": 9}
    )
    assert reply.node == "oslo"


async def test_a_node_that_refuses_is_passed_over_and_the_cloud_is_last(
    caller: Caller, stack: AsyncExitStack
) -> None:
    edge = FakeNode("edge", [caller.address], refusal=RoostError(Reason.NODE_FULL, "no room", "elsewhere"))
    cloud = FakeNode("cloud", [caller.address], role=common_pb2.CLOUD)
    await up(stack, caller, edge, cloud)
    reply = await caller.resolve("ana")
    assert (reply.node, reply.epoch) == ("cloud", 1)
    assert reply.why == "no edge with room: edge is full; the cloud takes over"


async def test_no_room_anywhere_says_why(caller: Caller, stack: AsyncExitStack) -> None:
    with pytest.raises(RoostError) as caught:
        await caller.resolve("ana")
    assert reason(caught) is Reason.NO_ROOM
    small = FakeNode("small", [caller.address], capacity=Resources(200 << 20, 10_000, 100))
    await up(stack, caller, small)
    assert (await caller.resolve("u1")).node == "small"
    assert (await caller.resolve("u2")).node == "small"
    with pytest.raises(RoostError) as caught:
        await caller.resolve("u3")
    assert reason(caught) is Reason.NO_ROOM
    assert "small is full" in caught.value.message
    await small.hibernated(key("u1"), 1)
    assert (await caller.resolve("u3")).node == "small", "one that hibernates makes room"


async def test_a_node_that_never_answers_a_reservation_is_passed_over_in_time(
    caller: Caller, stack: AsyncExitStack
) -> None:
    far = FakeNode("far", [caller.address], position=OSLO)
    mute = FakeNode("mute", [caller.address], position=PARIS, mute=True)
    await up(stack, caller, far, mute)
    reply = await caller.resolve("ana", position=common_pb2.Position(latitude=48.8, longitude=2.3))
    assert reply.node == "far"
    assert len(mute.reserves) == 1


# --- commits ---------------------------------------------------------------------------------------


async def test_commits_are_fenced_by_epoch_owner_and_version_and_can_be_repeated(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a, b = FakeNode("a", [caller.address], position=PARIS), FakeNode("b", [caller.address], position=OSLO)
    await up(stack, caller, a, b)
    first = await caller.resolve("ana", position=common_pb2.Position(latitude=48.9, longitude=2.4))
    assert first.node == "a"
    fetched = await a.fetch(key("ana"), 1)
    assert (fetched.version, fetched.root, fetched.agent.name) == (0, "", "chef")
    assert (await caller.instance("ana")).phase == "live"
    await a.commit(key("ana"), 1, 1, "turn-1")
    await a.commit(key("ana"), 1, 1, "turn-1")  # the answer was lost: sent again
    for node, epoch, version in ((a, 1, 3), (a, 2, 2), (b, 1, 2), (a, 0, 2)):
        with pytest.raises(RoostError) as caught:
            await node.commit(key("ana"), epoch, version)
        assert reason(caught) is Reason.EPOCH_STALE
    moved = await caller.resolve("ana", exclude=["a"])
    assert (moved.node, moved.epoch) == ("b", 2)
    assert moved.why.startswith("moved from a, which just failed the client: ")
    await eventually(lambda: [(e.key.user, e.epoch) for e in a.evicted] == [("ana", 1)], 5, "a is told")
    for call in (
        a.commit(key("ana"), 1, 2),
        a.commit(key("ana"), 1, 1, "turn-1"),
        a.hibernated(key("ana"), 1),
    ):
        with pytest.raises(RoostError) as caught:
            await call
        assert reason(caught) is Reason.EPOCH_STALE
    with pytest.raises(RoostError) as caught:
        await a.fetch(key("ana"), 1)
    assert reason(caught) is Reason.EPOCH_STALE
    fetched = await b.fetch(key("ana"), 2)
    assert (fetched.version, fetched.root) == (1, "root-1")
    await b.commit(key("ana"), 2, 2)
    found = await caller.instance("ana")
    assert (found.node, found.epoch, found.version, found.last_turn) == ("b", 2, 2, "t2")


@pytest.mark.parametrize(
    "change", [{"root": ""}, {"turn_id": ""}, {"turn_id": "x" * 300}, {"version": 0}, {"node": "No!"}]
)
async def test_malformed_commits_are_refused(
    caller: Caller, stack: AsyncExitStack, change: dict[str, object]
) -> None:
    node = FakeNode("a", [caller.address])
    await up(stack, caller, node)
    good = {"node": "a", "key": key("ana"), "epoch": 1, "version": 1, "root": "r", "turn_id": "t"}
    assert node.stub is not None
    with pytest.raises(RoostError) as caught:
        await node._ask("Commit", link_pb2.CommitRequest(**{**good, **change}))  # type: ignore[arg-type]
    assert reason(caught) is Reason.BAD_REQUEST


# --- hibernated, drained, failed -------------------------------------------------------------------


async def test_a_hibernated_instance_wakes_where_it_slept_in_the_same_epoch(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a, b = FakeNode("a", [caller.address]), FakeNode("b", [caller.address])
    await up(stack, caller, a, b)
    owner = a if (await caller.resolve("ana")).node == "a" else b
    await owner.fetch(key("ana"), 1)
    await owner.commit(key("ana"), 1, 1)
    await owner.hibernated(key("ana"), 1)
    assert (await caller.node(owner.id)).reserved.memory_bytes == 0
    reply = await caller.resolve("ana")
    assert (reply.node, reply.epoch) == (owner.id, 1)
    assert [r.epoch for r in owner.reserves] == [1, 1]


async def test_a_hibernated_instance_whose_node_is_full_moves(caller: Caller, stack: AsyncExitStack) -> None:
    a, b = FakeNode("a", [caller.address]), FakeNode("b", [caller.address])
    await up(stack, caller, a, b)
    owner, other = (a, b) if (await caller.resolve("ana")).node == "a" else (b, a)
    await owner.fetch(key("ana"), 1)
    await owner.hibernated(key("ana"), 1)
    owner.refusal = RoostError(Reason.NODE_FULL, "full", "elsewhere")
    reply = await caller.resolve("ana")
    assert (reply.node, reply.epoch) == (other.id, 2)
    assert reply.why.startswith(f"moved from {owner.id}, which is full: ")


async def test_a_draining_node_gives_up_its_instances_when_there_is_room_elsewhere(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a = FakeNode("a", [caller.address])
    await up(stack, caller, a)
    await caller.resolve("ana")
    reply = await caller.admin("Drain", admin_pb2.DrainRequest(node="a"))
    assert reply.instances == 1
    assert (await caller.node("a")).state == "draining"
    assert (await caller.resolve("ana")).epoch == 1, "there is nowhere else, so it stays"
    with pytest.raises(RoostError) as caught:
        await caller.resolve("bob")
    assert "a is draining" in caught.value.message
    b = FakeNode("b", [caller.address])
    await up(stack, caller, b)
    moved = await caller.resolve("ana")
    assert (moved.node, moved.epoch) == ("b", 2)
    await caller.admin("Drain", admin_pb2.DrainRequest(node="a", undo=True))
    assert (await caller.node("a")).state == "up"


async def test_an_excluded_owner_whose_link_is_gone_keeps_the_instance_until_it_is_lost(
    caller: Caller, stack: AsyncExitStack
) -> None:
    b = FakeNode("b", [caller.address], position=OSLO)
    await up(stack, caller, b)
    async with running_node(FakeNode("a", [caller.address], position=PARIS)) as a:
        await caller.wait_nodes(a)
        near = common_pb2.Position(latitude=48.8, longitude=2.3)
        assert (await caller.resolve("ana", position=near)).node == "a"
    await eventually(lambda: _suspect(caller, "a"), 2, "the link's end is noticed")
    with pytest.raises(RoostError) as caught:
        await caller.resolve("ana", exclude=["a"])
    assert reason(caught) is Reason.NODE_UNREACHABLE
    reply = await caller.resolve("ana")
    assert (reply.node, reply.epoch) == ("a", 1), "a daemon that restarts keeps its instances"

    async def moved() -> bool:
        try:
            return (await caller.resolve("ana", exclude=["a"])).epoch == 2
        except RoostError as error:
            assert error.reason is Reason.NODE_UNREACHABLE, error
            return False

    await eventually(moved, TTL + 3, "it moves once a is lost")
    assert (await caller.resolve("ana")).node == "b"
    assert (await caller.resolve("ana")).why.startswith("moved from a, which is lost: ")


async def _suspect(caller: Caller, node: str) -> bool:
    return (await caller.node(node)).state == "suspect"


async def test_a_placement_that_nobody_comes_for_frees_its_room(
    etcd: Etcd, tmp_path: Path, stack: AsyncExitStack
) -> None:
    settings = config("c1", etcd.endpoint, tmp_path, ticket_lifetime=1.0)
    caller = await stack.enter_async_context(in_process(settings))
    await caller.deploy()
    small = FakeNode("small", [caller.address], capacity=Resources(100 << 20, 10_000, 100))
    await up(stack, caller, small)
    await caller.resolve("ana")
    with pytest.raises(RoostError) as caught:
        await caller.resolve("bob")
    assert reason(caught) is Reason.NO_ROOM

    async def freed() -> bool:
        return (await caller.instance("ana")).phase == "hibernated"

    await eventually(freed, 5)
    assert (await caller.resolve("bob")).node == "small"
    await small.fetch(key("bob"), 1)
    await asyncio.sleep(2.0)
    assert (await caller.instance("bob")).phase == "live", "one that is used stays as it is"

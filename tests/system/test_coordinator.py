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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

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


# --- links -----------------------------------------------------------------------------------------


async def test_a_silent_node_is_lost_though_its_link_is_open_and_then_registers_again(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a, b = FakeNode("a", [caller.address], position=PARIS), FakeNode("b", [caller.address], position=OSLO)
    await up(stack, caller, a, b)
    await caller.resolve("ana", position=common_pb2.Position(latitude=48.8, longitude=2.3))
    a.held = [link_pb2.Held(key=key("ana"), epoch=1, version=0, live=True)]
    begun = time.monotonic()
    a.silent = True

    async def lost() -> bool:
        return a.welcomes > 1 or (await caller.node("a")).state == "lost"

    await eventually(lost, TTL + 3, "a is lost")
    assert time.monotonic() - begun > TTL * 0.8, "not before its time"
    moved = await caller.resolve("ana", exclude=["a"])
    assert (moved.node, moved.epoch) == ("b", 2)
    a.silent = False
    await eventually(lambda: a.welcomes >= 2 and a.welcome, 5, "its link was ended, so it registers again")
    await caller.wait_nodes(a)
    await eventually(lambda: ("ana", 1) in [(e.key.user, e.epoch) for e in a.evicted], 5)


async def test_welcome_names_what_is_no_longer_the_nodes_own(caller: Caller, stack: AsyncExitStack) -> None:
    first = FakeNode("a", [caller.address])
    async with running_node(first):
        await caller.wait_nodes(first)
        for user in ("ana", "bob", "cyd"):
            await caller.resolve(user)
            await first.fetch(key(user), 1)
    held = [
        link_pb2.Held(key=key("ana"), epoch=1, live=True),
        link_pb2.Held(key=key("bob"), epoch=1, live=False),
        link_pb2.Held(key=key("cyd"), epoch=7, live=True),
        link_pb2.Held(key=key("dan"), epoch=1, live=True),
    ]
    again = FakeNode("a", [caller.address], held=held)
    await up(stack, caller, again)
    assert again.welcome is not None
    assert sorted((e.key.user, e.epoch) for e in again.welcome.evict) == [("cyd", 7), ("dan", 1)]

    async def phases() -> bool:
        return [(await caller.instance(u)).phase for u in ("ana", "bob")] == ["live", "hibernated"]

    await eventually(phases, 3, "what does not run any more is noted, and its room is free")


async def test_of_two_daemons_with_one_id_the_newer_wins(caller: Caller, stack: AsyncExitStack) -> None:
    older, newer = FakeNode("a", [caller.address]), FakeNode("a", [caller.address])
    task = asyncio.create_task(older.run())
    await caller.wait_nodes(older)
    await eventually(lambda: older.welcome, 5)
    try:
        await stack.enter_async_context(running_node(newer))
        await eventually(lambda: older.ends, 5, "the older one's stream is ended")
    finally:
        task.cancel()
    assert older.ends[0].reason is Reason.NODE_UNKNOWN
    assert older.ends[0].hint


async def test_a_daemon_that_connects_again_replaces_its_own_dead_link(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a = FakeNode("a", [caller.address])
    await up(stack, caller, a)
    await caller.resolve("ana")
    again = FakeNode("a", [caller.address], started_id=a.started_id)
    await stack.enter_async_context(running_node(again))
    await eventually(lambda: a.ends, 5)
    assert a.ends[0].reason is Reason.COORDINATOR_UNREACHABLE


async def test_heartbeats_are_acknowledged_and_shown(caller: Caller, stack: AsyncExitStack) -> None:
    a = FakeNode("a", [caller.address])
    await up(stack, caller, a)
    await eventually(lambda: a.acknowledged >= 3, 5)
    shown = await caller.node("a")
    assert (shown.load, list(shown.peers), shown.coordinator) == (0.5, ["other"], "c1")
    assert shown.rtt_ms == -1
    await caller.resolve("ana")
    shown = await caller.node("a")
    assert shown.rtt_ms > 0
    assert (shown.instances, shown.reserved.memory_bytes) == (1, 100 << 20)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "No Name"},
        {"role": common_pb2.ROLE_UNSPECIFIED},
        {"address": "nowhere"},
        {"address": "host:99999999"},
        {"api_version": "v9"},
        {"started_id": ""},
        {"position": common_pb2.Position(latitude=200)},
    ],
)
async def test_a_registration_that_makes_no_sense_is_refused(
    caller: Caller, change: dict[str, object]
) -> None:
    class Odd(FakeNode):
        def info(self) -> common_pb2.NodeInfo:
            info = super().info()
            info.MergeFrom(common_pb2.NodeInfo(**{k: v for k, v in change.items() if v}))  # type: ignore[arg-type]
            for name, value in change.items():
                if not value:
                    info.ClearField(name)  # type: ignore[arg-type]
            return info

    async with running_node(Odd("a", [caller.address])) as odd:
        await eventually(lambda: odd.ends, 5)
    assert odd.ends[0].reason is Reason.BAD_REQUEST
    assert odd.ends[0].hint


# --- deploying and asking --------------------------------------------------------------------------


async def test_deploying_the_same_again_changes_nothing(caller: Caller) -> None:
    same = await caller.deploy()
    assert not same.changed
    other = await caller.deploy(root="cd" * 32)
    assert other.changed
    assert other.version != same.version
    listed = await caller.admin("ListAgents", admin_pb2.ListAgentsRequest(tenant="acme"))
    assert [(a.name, a.version) for a in listed.agents] == [("chef", other.version)]


async def test_a_running_instance_keeps_its_version_until_it_starts_anew(
    caller: Caller, stack: AsyncExitStack
) -> None:
    a = FakeNode("a", [caller.address])
    await up(stack, caller, a)
    await caller.resolve("ana")
    old = (await a.fetch(key("ana"), 1)).agent.version
    new = (await caller.deploy(root="cd" * 32)).version
    assert a.welcome is not None
    ticket_key = Ed25519PublicKey.from_public_bytes(a.welcome.ticket_keys[0])
    reply = await caller.resolve("ana")
    assert verify_ticket(reply.ticket, [ticket_key], "a", time.time()).agent_version == old
    await a.hibernated(key("ana"), 1)
    reply = await caller.resolve("ana")
    assert verify_ticket(reply.ticket, [ticket_key], "a", time.time()).agent_version == new
    assert a.reserves[-1].agent.version == new
    assert (await a.fetch(key("ana"), 1)).agent.version == new


@pytest.mark.parametrize(
    ("policy", "name", "root", "says"),
    [
        (POLICY + "frob = 1\n", "chef", "ab" * 32, "frob"),
        (POLICY.replace('"100M"', '"100 apples"'), "chef", "ab" * 32, "100 apples"),
        (POLICY.replace('entry = "chef:agent"', ""), "chef", "ab" * 32, "entry"),
        (POLICY, "cook", "ab" * 32, "chef"),
        (POLICY, "chef", "nohash", "nohash"),
        ("not toml [", "chef", "ab" * 32, "TOML"),
    ],
)
async def test_a_bad_agent_is_refused_by_name(
    caller: Caller, policy: str, name: str, root: str, says: str
) -> None:
    with pytest.raises(RoostError) as caught:
        await caller.deploy(policy, name, root)
    assert reason(caught) is Reason.AGENT_INVALID
    assert says in caught.value.message


async def test_bad_requests_say_what_is_wrong(caller: Caller) -> None:
    with pytest.raises(RoostError) as caught:
        await caller.resolve("ana", agent="nobody")
    assert reason(caught) is Reason.AGENT_UNKNOWN
    with pytest.raises(RoostError) as caught:
        await caller.resolve("../etc")
    assert reason(caught) is Reason.BAD_REQUEST
    with pytest.raises(RoostError) as caught:
        await caller.resolve("ana", rtt_ms={"a": float("nan")})
    assert reason(caught) is Reason.BAD_REQUEST
    with pytest.raises(RoostError) as caught:
        await caller.admin("Drain", admin_pb2.DrainRequest(node="nowhere"))
    assert reason(caught) is Reason.NODE_UNKNOWN


async def test_health_and_reflection(caller: Caller) -> None:
    health = health_pb2_grpc.HealthStub(caller.channel)

    async def healthy() -> bool:
        reply = await health.Check(health_pb2.HealthCheckRequest(service="roost.v1.Resolver"), timeout=5)
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    await eventually(healthy, 5)
    call = reflection_pb2_grpc.ServerReflectionStub(caller.channel).ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5
    )
    async for answer in call:
        names = {s.name for s in answer.list_services_response.service}
        break
    assert {"roost.v1.Resolver", "roost.v1.Link", "roost.v1.Admin", "roost.v1.Blobs"} <= names

"""Nodes' links to a coordinator, and what else it is told and asked, with a real etcd and real gRPC."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos.v1 import admin_pb2, common_pb2, link_pb2
from shared.errors import Reason, RoostError
from shared.identity import verify_ticket
from tests.support.coordinators import POLICY, TTL, Caller, key
from tests.support.eventually import eventually
from tests.support.fake_node import FakeNode, running_node
from tests.system.test_coordinator import OSLO, PARIS, caller, etcd, reason, stack, up

__all__ = ["caller", "etcd", "stack"]


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

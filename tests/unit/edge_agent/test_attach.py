"""Turns as clients see them: cancelled, out of time, cut off and sent again, several clients at once."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.jail.api import JailSpec
from edge_agent.phases import Live
from protos.v1 import attach_pb2
from shared.errors import Reason, RoostError
from tests.support.fake_jails import FakeJail
from tests.unit.edge_agent.attaching import ANA, Node, node
from tests.unit.edge_agent.test_instance import Bench, bench

__all__ = ["bench", "node"]

WAITS = "(another turn is under way"


async def test_a_turn_that_is_cancelled_leaves_no_trace(bench: Bench, node: Node) -> None:
    ana = node.client()
    assert await ana.ask("one") == "=one"
    ana.send("wait")
    assert (await ana.read()).delta.text == "so far"
    ana.cancel("wait")
    assert await ana.said() == ["!TURN_CANCELLED"]
    assert not bench.jails.running
    assert await ana.ask("two") == "=one,two"
    assert bench.control.commits == ["one", "two"]


async def test_a_turn_that_is_cancelled_in_the_queue_never_begins(bench: Bench, node: Node) -> None:
    ana, ben = node.client(), node.client()
    ana.send("wait")
    await node.begun(1)
    ben.send("two")
    assert (await ben.read()).waiting.text == WAITS[1:]
    ben.cancel("two")
    assert await ben.said() == ["!TURN_CANCELLED"], "at once: the other goes on"
    node.agents.let.set()
    assert (await ana.said())[-1] == "=wait"
    assert node.agents.begun == ["wait"]


async def test_a_cancellation_comes_too_late_when_the_commit_has_begun(bench: Bench, node: Node) -> None:
    ana = node.client()
    commit = node.hold_commits()
    ana.send("one")
    await commit.begun.wait()
    ana.cancel("one")
    for _ in range(20):
        await asyncio.sleep(0)
    commit.let.set()
    assert (await ana.said())[-1] == "=one"
    ana.cancel("one")
    ana.cancel("never sent")
    assert await ana.ask("two") == "=one,two"


async def test_a_committed_turn_sent_again_and_cancelled_stays_committed(bench: Bench, node: Node) -> None:
    ana = node.client()
    await ana.ask("one")
    for asleep in (False, True):
        if asleep:
            await node.supervisor.hibernate([ANA], 0.0)
        ana.send("one")
        ana.cancel("one")
        assert await ana.said() == ["=one"]
        assert ana.receipt.replayed
        ana.send("new")
        ana.cancel("new")
        assert await ana.said() == ["!TURN_CANCELLED"]
    assert node.agents.begun == ["one"]


async def test_a_turn_that_is_cancelled_while_its_instance_wakes_never_begins(
    bench: Bench, node: Node
) -> None:
    ana = node.client()
    make, starting, go_on = bench.jails.make, asyncio.Event(), asyncio.Event()

    async def slow(spec: JailSpec) -> FakeJail:
        starting.set()
        await go_on.wait()
        return await make(spec)

    bench.jails.make = slow  # type: ignore[method-assign]
    ana.send("one")
    await starting.wait()
    ana.cancel("one")
    assert await ana.said() == ["!TURN_CANCELLED"], "at once"
    ana.send("two")
    go_on.set()
    assert (await ana.said())[-1] == "=two"
    assert node.agents.begun == ["two"]


async def test_a_turn_out_of_time_leaves_no_trace(bench: Bench, node: Node) -> None:
    ana = node.client()
    await ana.ask("one")
    assert await ana.ask("wait", deadline_ms=50) == "!TURN_DEADLINE"
    assert "0.05 s" in ana.error.message
    assert not bench.jails.running
    assert await ana.ask("two", deadline_ms=30_000) == "=one,two"


async def test_a_turn_whose_time_is_over_in_the_queue_never_begins(bench: Bench, node: Node) -> None:
    ana, ben = node.client(), node.client()
    ana.send("wait")
    await node.begun(1)
    assert await ben.ask("two", deadline_ms=50) == "!TURN_DEADLINE"
    node.agents.let.set()
    assert (await ana.said())[-1] == "=wait"
    assert node.agents.begun == ["wait"]


async def test_the_policys_limit_counts_when_it_is_the_smaller_one(bench: Bench, node: Node) -> None:
    node.become("committed", turn_timeout="50ms")
    assert await node.client().ask("wait", deadline_ms=30_000) == "!TURN_TIMEOUT"


async def test_time_counts_from_a_turns_arrival_behind_others_of_its_stream(bench: Bench, node: Node) -> None:
    ana = node.client()
    ana.send("wait")
    ana.send("two", deadline_ms=50)
    ana.send("three")
    await node.begun(1)
    await asyncio.sleep(0.1)
    node.agents.let.set()
    assert (await ana.said())[-1] == "=wait"
    assert (await ana.said())[-1] == "!TURN_DEADLINE"
    assert (await ana.said())[-1] == "=wait,three"


async def test_a_client_that_leaves_cancels_nothing_and_joins_again(bench: Bench, node: Node) -> None:
    ana = node.client()
    ana.send("wait")
    assert (await ana.read()).delta.text == "so far"
    await ana.leave()
    back = node.client()
    back.send("wait")
    assert (await back.read()).delta.text == "so far", "from the beginning"
    node.agents.let.set()
    assert (await back.said())[-1] == "=wait"
    assert not back.receipt.replayed
    assert node.agents.begun == ["wait"]


async def test_whoever_joins_with_more_time_gives_it_to_the_turn(bench: Bench, node: Node) -> None:
    ana, back = node.client(), node.client()
    await ana.ask("one")
    ana.send("wait", deadline_ms=700)
    back.send("wait", deadline_ms=30_000)
    await back.read()
    await asyncio.sleep(0.8)
    node.agents.let.set()
    assert (await ana.said())[-1] == (await back.said())[-1] == "=one,wait"


async def test_a_turn_sent_by_two_clients_is_applied_once(bench: Bench, node: Node) -> None:
    ana, ben, late = node.client(), node.client(), node.client()
    ana.send("wait")
    ben.send("wait")
    await node.begun(1)
    node.agents.let.set()
    assert await ana.said() == await ben.said()
    assert ana.receipt == ben.receipt
    assert await late.ask("wait") == "=wait", "from the record"
    assert (late.receipt.replayed, late.receipt.version) == (True, 1)
    assert node.agents.begun == ["wait"]


async def test_a_failure_is_told_to_all_who_wait_and_to_nobody_later(bench: Bench, node: Node) -> None:
    ana, ben = node.client(), node.client()
    ana.send("t1", "wait-and-fail")
    ben.send("t1", "wait-and-fail")
    await node.begun(1)
    node.agents.let.set()
    assert [(await client.said())[-1] for client in (ana, ben)] == ["!TURN_FAILED"] * 2
    assert await ben.ask("t1", "again") == "=again"


async def test_a_cancelled_turn_may_be_sent_again(bench: Bench, node: Node) -> None:
    ana = node.client()
    ana.send("t1", "wait")
    await node.begun(1)
    ana.cancel("t1")
    ana.send("t1", "two")
    assert (await ana.said())[-1] == "!TURN_CANCELLED"
    assert (await ana.said())[-1] == "=two"


async def test_each_client_gets_its_own_turns_and_nothing_else(bench: Bench, node: Node) -> None:
    clients = [node.client() for _ in range(5)]
    for i, client in enumerate(clients):
        client.send(f"m{i}")
    said = [await client.said() for client in clients]
    ends = [f"{','.join(f'm{j}' for j in range(i + 1))}" for i in range(5)]
    assert [s[-1] for s in said] == ["=" + end for end in ends]
    assert [[p for p in s if p[0] == "~"] for s in said] == [["~" + end] for end in ends]
    assert [s[0] for s in said[1:]] == [WAITS] * 4


async def test_a_client_that_does_not_read_or_leaves_holds_up_nobody(bench: Bench, node: Node) -> None:
    slow, gone, ana = node.client(), node.client(), node.client()
    slow.send("one")
    await slow.read()  # and no more
    gone.send("two")
    await gone.read()
    await gone.leave()
    assert await ana.ask("three") == "=one,two,three"
    assert (await slow.said())[-1] == "=one"


async def test_what_is_no_turn_ends_the_stream(bench: Bench, node: Node) -> None:
    ana = node.client()
    await ana.ask("one")
    ana.write(attach_pb2.AttachRequest(hello=attach_pb2.Hello()))
    with pytest.raises(RoostError) as caught:
        await ana.read()
    assert caught.value.reason is Reason.BAD_REQUEST


@pytest.mark.parametrize("cut", range(4))
async def test_a_stream_cut_at_any_message_loses_and_doubles_nothing(
    bench: Bench, node: Node, cut: int
) -> None:
    """When it has been opened, when the turn was sent, at the first delta, and when the reply is there."""
    await node.client().ask("one")
    ana = node.client()
    if cut > 0:
        ana.send("t", "wait")
    if cut > 1:
        await ana.read()
        if cut > 2:
            node.agents.let.set()
            await node.committed(2)
    await ana.leave()
    node.agents.let.set()
    back = node.client()
    assert await back.ask("t", "wait") == "=one,wait"
    assert (back.receipt.version, bench.control.commits) == (2, ["one", "t"])
    assert isinstance(node.supervisor._instances[ANA].state, Live)

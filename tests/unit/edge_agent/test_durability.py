"""What a reply is worth when it is given out, in each of the three ways, and what is said of what is lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from edge_agent.phases import Live
from protos.v1 import attach_pb2
from shared.errors import Reason
from tests.support.eventually import eventually
from tests.support.fake_control import Owned
from tests.unit.edge_agent.attaching import ANA, Client, Node, node
from tests.unit.edge_agent.test_instance import Bench, bench

__all__ = ["bench", "node"]

LOST = "version {}, which edge-1 acknowledged before it was committed"


def given(client: Client, turn_id: str) -> dict[str, Any]:
    """What a client sends along that was given the receipt of this turn."""
    receipt = client.receipt
    return {
        "given": attach_pb2.Given(
            turn_id=turn_id, node=receipt.node, version=receipt.version, durable=receipt.durable
        )
    }


async def nothing_more_from(client: Client) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.read()


async def test_strict_gives_nothing_out_before_the_commit(node: Node) -> None:
    node.become("strict")
    ana, joined = node.client(), node.client()
    commit = node.hold_commits()
    for client in (ana, joined):
        client.send("wait")
    await node.begun(1)
    node.agents.let.set()
    await commit.begun.wait()
    await nothing_more_from(ana)
    commit.let.set()
    assert await ana.said() == ["=wait"]
    assert await joined.said() == ["=wait"]
    assert (ana.receipt.durable, ana.receipt.version) == (True, 1)
    assert await node.client().ask("fail") == "!TURN_FAILED"


async def test_committed_streams_what_is_provisional_and_then_waits_for_the_commit(node: Node) -> None:
    ana = node.client()
    commit = node.hold_commits()
    ana.send("one")
    assert (await ana.read()).delta.text == "one"
    await commit.begun.wait()
    await nothing_more_from(ana)
    commit.let.set()
    assert await ana.said() == ["=one"]
    assert ana.receipt.durable


async def test_async_gives_the_reply_out_and_commits_behind_it(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    commit = node.hold_commits()
    assert await ana.ask("one") == "=one"
    assert (ana.receipt.durable, ana.receipt.version) == (False, 1)
    assert bench.control.owned[ANA].version == 0
    instance = node.supervisor._instances[ANA]
    assert (instance.busy, instance.version) == (True, 0)
    ana.send("two", **given(ana, "one"))
    assert (await ana.read()).delta.text == "one,two", "it begins at once, on the state in memory"
    await nothing_more_from(ana)
    commit.let.set()
    assert await ana.said() == ["=one,two"]
    assert (ana.receipt.resumed_version, list(ana.receipt.lost)) == (1, [])
    assert bench.control.owned[ANA].version >= 1, "one turn may be behind, not two"
    await node.committed(2)
    await instance.settled()
    assert (instance.busy, instance.version, bench.control.commits) == (False, 2, ["one", "two"])
    assert await ana.ask("two") == "=one,two"
    assert (ana.receipt.replayed, ana.receipt.durable) == (True, True)


async def test_async_says_what_is_lost_with_its_node(bench: Bench, node: Node) -> None:
    node.become("async")
    ana, ben = node.client(), node.client()
    await ana.ask("one")
    await node.committed(1)
    node.hold_commits()
    await ana.ask("two")
    held, bens = given(ana, "two"), given(ben, "")
    await node.kill()
    back, other = node.client(), node.client()
    assert await other.ask("three", **bens) == "=one,three"
    assert list(other.receipt.lost) == [], "nobody had been told of it there"
    assert await back.ask("four", **held) == "=one,three,four"
    assert list(back.receipt.lost) == [LOST.format(2)], "though version 2 is another turn's by now"
    assert await back.ask("five", **given(back, "four")) == "=one,three,four,five"
    assert list(back.receipt.lost) == []
    assert bench.control.commits[:1] == ["one"]


async def test_async_applies_a_lost_turn_that_is_sent_again_once(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    commit = node.hold_commits()
    await ana.ask("one")
    again = node.client()
    again.send("one")
    await nothing_more_from(again)
    commit.let.set()
    assert await again.said() == ["=one"], "from the record, once it is one"
    assert (again.receipt.replayed, again.receipt.durable) == (True, True)
    node.hold_commits()
    await ana.ask("two")
    held = given(ana, "two")
    await node.kill()
    back = node.client()
    assert await back.ask("two", **held) == "=one,two"
    assert list(back.receipt.lost) == [LOST.format(2)]
    await node.committed(2)
    assert bench.control.commits == ["one", "two"]


async def test_async_ends_what_builds_on_a_turn_that_can_not_be_committed(bench: Bench, node: Node) -> None:
    node.become("async")
    node.wait_for_commits(0.2)
    node.restart()
    ana = node.client()
    await ana.ask("one")
    await node.committed(1)
    bench.blobs.down = True
    await ana.ask("two")
    held = given(ana, "two")
    ana.send("wait", **held)
    assert (await ana.read()).delta.text == "so far"
    assert await ana.said() == ["!TURN_NOT_COMMITTED"]
    assert "the turn before" in ana.error.message
    assert not bench.jails.running
    bench.blobs.down = False
    node.agents.let.set()
    assert await ana.ask("wait", **held) == "=one,wait"
    assert list(ana.receipt.lost) == [LOST.format(2)]
    await node.committed(2)
    assert bench.control.commits == ["one", "wait"]


async def test_async_leaves_no_process_that_builds_on_a_lost_turn(bench: Bench, node: Node) -> None:
    node.become("async")
    node.wait_for_commits(0.2)
    node.restart()
    bench.blobs.down = True
    ana = node.client()
    await ana.ask("one")
    await eventually(lambda: not bench.jails.running, 30.0)
    await node.supervisor.tidy()
    instance = node.supervisor._instances[ANA]
    assert not isinstance(instance.state, Live)
    bench.blobs.down = False
    assert await ana.ask("one", **given(ana, "one")) == "=one"
    assert list(ana.receipt.lost) == [LOST.format(1)]


async def test_async_keeps_what_was_given_out_when_the_next_turn_fails(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    commit = node.hold_commits()
    await ana.ask("one")
    assert await ana.ask("fail") == "!TURN_FAILED"
    ana.send("two")
    await nothing_more_from(ana)
    commit.let.set()
    assert await ana.said() == ["~one,two", "=one,two"]
    await node.committed(2)


async def test_async_goes_to_sleep_and_stops_only_after_its_commit(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    commit = node.hold_commits()
    await ana.ask("one")
    bench.now[0] += 100.0
    await node.supervisor.tidy()
    assert await node.supervisor.hibernate([ANA], 0.0) == []
    assert node.supervisor.idle() == []
    stopping = asyncio.create_task(node.supervisor.finish_turns(30.0))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not stopping.done()
    commit.let.set()
    await stopping
    assert bench.control.owned[ANA].version == 1


async def test_async_of_a_node_in_doubt_waits_for_the_commit(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    ana.send("wait")
    await node.begun(1)
    bench.now[0] = 1e9  # long past its tenure
    node.agents.let.set()
    assert (await ana.said())[-1] == "=wait"
    assert ana.receipt.durable


async def test_async_that_has_lost_the_instance_ends_it(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    await ana.ask("one")
    await node.committed(1)
    bench.control.owned[ANA] = Owned(2, 1, bench.control.owned[ANA].root)
    await ana.ask("two")
    instance = node.supervisor._instances[ANA]
    await eventually(lambda: instance.evicted, 30.0)
    assert await ana.ask("three") == "!" + Reason.EPOCH_STALE
    await node.supervisor.tidy()
    assert not node.supervisor._instances
    assert not bench.jails.running


async def test_async_is_evicted_with_a_commit_under_way(bench: Bench, node: Node) -> None:
    node.become("async")
    ana = node.client()
    node.hold_commits()
    await ana.ask("one")
    async with asyncio.timeout(30.0):
        await node.supervisor.evict(ANA, 1, "moved")
    assert not bench.jails.running
    assert bench.control.owned[ANA].version == 0


async def test_a_commit_behind_a_turn_does_not_make_that_turn_fit_to_be_adopted(
    bench: Bench, node: Node
) -> None:
    node.become("async")
    ana = node.client()
    commit = node.hold_commits()
    await ana.ask("one")
    ana.send("wait")
    await node.begun(2)
    commit.let.set()
    await node.committed(1)
    await node.supervisor._instances[ANA].settled()
    record = bench.parts.records.of_key(ANA)
    assert record is not None
    assert (record.version, record.busy) == (1, True)
    node.agents.let.set()
    await ana.said()
    await node.committed(2)
    await node.supervisor._instances[ANA].settled()
    record = bench.parts.records.of_key(ANA)
    assert record is not None
    assert (record.version, record.busy) == (2, False)

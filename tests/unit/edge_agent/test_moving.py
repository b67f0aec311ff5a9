"""A node lets an instance go, or gets ready for one: when a turn may run, and when not."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.phases import Asleep, Live
from edge_agent.supervisor import Supervisor
from protos.v1 import common_pb2, link_pb2
from shared import inline
from shared.errors import Reason, RoostError
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.fake_control import AGENT, Owned
from tests.unit.edge_agent.test_instance import Bench, bench
from tests.unit.edge_agent.test_supervisor import ANA, say, supervisor_of

__all__ = ["bench"]


async def ask(supervisor: Supervisor, epoch: int = 1, **step: object) -> link_pb2.MoveStepReply:
    return await supervisor.move(link_pb2.MoveStep(key=ANA.to_proto(), epoch=epoch, **step))  # type: ignore[arg-type]


def release(turn: int = 1000, hold: int = 60_000) -> link_pb2.Release:
    return link_pb2.Release(turn_ms=turn, hold_ms=hold)


async def test_no_turn_runs_between_a_release_and_the_word_to_keep_on(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    reply = await ask(supervisor, release=release())
    assert reply.live
    (jail,) = bench.jails.running.values()
    assert jail.frozen
    turn = asyncio.create_task(say(supervisor, ANA, "two"))
    await asyncio.sleep(0.01)
    assert not turn.done()
    with pytest.raises(RoostError, match="already"):
        await ask(supervisor, release=release())
    await ask(supervisor, keep_on=link_pb2.KeepOn())
    assert await turn == "one,two"
    assert list(bench.jails.running.values()) == [jail], "the same process"
    assert not jail.frozen


async def test_a_turn_that_waits_for_the_outcome_is_refused_when_it_has_moved(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    await ask(supervisor, release=release())
    turn = asyncio.create_task(say(supervisor, ANA, "two"))
    await asyncio.sleep(0.01)
    bench.control.owned[ANA] = Owned(2, 1, bench.control.owned[ANA].root)
    await supervisor.evict(ANA, 1, "edge-2 owns it now")
    with pytest.raises(RoostError) as caught:
        await turn
    assert caught.value.reason is Reason.EPOCH_STALE
    assert bench.control.commits == ["one"]
    assert not bench.jails.running


async def test_when_nobody_says_anything_turns_are_taken_again(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    await ask(supervisor, release=release(hold=20))
    assert await say(supervisor, ANA, "two") == "one,two"


async def test_a_turn_that_does_not_end_is_not_harmed(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    instance = supervisor._instances[ANA]
    async with instance._lock:  # a turn runs
        with pytest.raises(RoostError) as caught:
            await ask(supervisor, release=release(turn=10))
    assert caught.value.reason is Reason.MOVE_GIVEN_UP
    assert await say(supervisor, ANA, "two") == "one,two"


async def test_a_link_that_breaks_while_a_release_waits_takes_it_back(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    instance = supervisor._instances[ANA]
    async with instance._lock:
        asked = asyncio.create_task(ask(supervisor, release=release()))
        await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    assert await say(supervisor, ANA, "two") == "one,two"


async def test_a_release_for_an_epoch_that_is_over_is_refused(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    bench.control.owned[ANA] = Owned(3)
    await say(supervisor, ANA, "one", epoch=3)
    with pytest.raises(RoostError) as caught:
        await ask(supervisor, release=release())
    assert caught.value.reason is Reason.EPOCH_STALE


async def test_a_target_keeps_room_has_the_state_and_starts_it_before_anybody_calls(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    owned = bench.control.owned[ANA]
    other = Supervisor(common_pb2.NodeInfo(id="edge-1"), bench.parts, list)
    await supervisor.evict(ANA, 1, "moved")
    bench.chunks.settle()
    for path in bench.chunks._directory.rglob("*"):
        if path.is_file():
            path.unlink()  # as on another node
    agent = common_pb2.AgentSpec(
        version=AGENT.version, policy_toml=AGENT.policy_toml, bundle_root=AGENT.bundle_root
    )
    prepare = link_pb2.Prepare(
        agent=agent,
        hold_ms=60_000,
        version=1,
        root=owned.root,
        inline=inline.to_protos(bench.control.inline.pop(ANA)),
    )
    asking = asyncio.create_task(ask(other, 2, prepare=prepare))
    await eventually(lambda: bench.parts.starts._versions)  # which waits for a zygote
    await bench.parts.starts.reconcile()
    assert (await asking).bytes > 0
    assert bench.parts.reservations.total(0.0) == AGENT.policy.need
    assert (await ask(other, 2, prepare=prepare)).bytes == 0, "it is there"

    bench.control.owned[ANA] = Owned(2, 1, owned.root)
    bench.blobs.down = True  # it has all that it needs
    await ask(other, 2, ready=link_pb2.Ready())
    assert isinstance(other._instances[ANA].state, Live)
    bench.blobs.down = False
    assert await say(other, ANA, "two", epoch=2) == "one,two"
    await ask(other, 2, ready=link_pb2.Ready())  # again: nothing happens


async def test_what_can_not_be_started_leaves_nothing_behind(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    bench.control.down = True
    with pytest.raises(RoostError) as caught:
        await ask(supervisor, ready=link_pb2.Ready())
    assert caught.value.reason is Reason.COORDINATOR_UNREACHABLE
    assert isinstance(supervisor._instances[ANA].state, Asleep)
    assert bench.parts.reservations.total(0.0) == Resources()

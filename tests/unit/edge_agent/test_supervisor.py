"""Many instances at once: what befalls one is not the others' business."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.phases import Live
from edge_agent.supervisor import Supervisor, jail_id_of
from edge_agent.turns import Turn
from protos.v1 import common_pb2
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey, Ticket
from shared.resources import Resources
from tests.support.eventually import eventually
from tests.support.fake_control import Owned
from tests.unit.edge_agent.test_instance import Bench, bench

__all__ = ["bench"]

ANA, BEN = (InstanceKey("default", "probe", user) for user in ("ana", "ben"))


def supervisor_of(bench: Bench) -> Supervisor:
    bench.control.owned.update({ANA: Owned(1), BEN: Owned(1)})
    return Supervisor(common_pb2.NodeInfo(id="edge-1"), bench.parts, list)


async def say(supervisor: Supervisor, key: InstanceKey, message: str, epoch: int = 1) -> str:
    ticket = Ticket(key, "edge-1", epoch, "v1", 1e12)
    async with supervisor.attached(ticket) as instance:
        done = await supervisor.begin(instance, Turn(message, key.user, message)).outcome()
        await eventually(lambda: not instance.busy, 10.0)  # and written down
        return done.reply


async def test_a_dead_jail_keeps_no_other_from_being_frozen_and_thawed(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    await say(supervisor, BEN, "one")
    bench.jails.running[jail_id_of(ANA)].crash(0)
    bench.now[0] = 1e9  # out of touch
    await supervisor.suspend_or_resume()
    assert bench.jails.running[jail_id_of(BEN)].frozen
    with pytest.raises(RoostError) as caught:
        await say(supervisor, BEN, "two")
    assert caught.value.reason is Reason.NODE_SUSPENDED
    bench.parts.tenure.welcomed(1e9, 1e9)
    await supervisor.suspend_or_resume()
    assert not bench.jails.running[jail_id_of(BEN)].frozen
    assert await say(supervisor, BEN, "two") == "one,two"
    assert await say(supervisor, ANA, "two") == "one,two"


async def test_a_coordinator_that_does_not_listen_keeps_nobody_awake(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    await say(supervisor, BEN, "one")
    bench.now[0] = 100.0
    bench.control.down = True
    await supervisor.tidy()
    assert not bench.jails.running
    bench.control.down = False
    await supervisor.tidy()
    assert bench.control.asleep == {ANA, BEN}


async def test_a_newer_epoch_ends_the_older_and_its_files(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    bench.control.owned[ANA] = Owned(epoch=3)  # elsewhere in between, and nothing was committed there
    assert await say(supervisor, ANA, "two", epoch=3) == "two"
    with pytest.raises(RoostError) as caught:
        await say(supervisor, ANA, "three", epoch=1)
    assert caught.value.reason is Reason.EPOCH_STALE


async def test_an_eviction_of_what_sleeps_removes_its_files(bench: Bench, tmp_path: Path) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    bench.now[0] = 100.0
    await supervisor.tidy()
    await supervisor.tidy()
    assert [h.epoch for h in supervisor.held()] == [1]
    await supervisor.evict(ANA, 1, "moved")
    while supervisor._discards:
        await next(iter(supervisor._discards))
    assert supervisor.held() == []
    assert await bench.jails.directories() == []


async def test_room_kept_for_the_next_epoch_outlives_the_end_of_this_one(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    await say(supervisor, ANA, "one")
    instance = supervisor._instances[ANA]
    assert isinstance(instance.state, Live)
    agent = instance.state.agent
    supervisor.reserve(ANA, 2, agent.policy.need, hold=10)
    await supervisor.evict(ANA, 1, "moved, and back")
    assert bench.parts.reservations.total(bench.now[0]) == agent.policy.need


async def test_a_size_for_what_does_not_run_is_kept_as_a_reservation(bench: Bench) -> None:
    supervisor = supervisor_of(bench)
    big = Resources(512 << 20, 2000, 100)
    await supervisor.resize(ANA, 1, big, hold=10)
    assert bench.parts.reservations.total(0.0) == big
    await say(supervisor, BEN, "one")
    await supervisor.resize(BEN, 1, big, hold=10)
    assert bench.jails.running[jail_id_of(BEN)].limits == big
    await supervisor.resize(BEN, 2, Resources(1 << 20, 10, 4), hold=10)
    assert bench.jails.running[jail_id_of(BEN)].limits == big, "of another epoch"
    with pytest.raises(RoostError) as caught:
        await supervisor.resize(BEN, 1, Resources(2 << 30, 10, 4), hold=10)
    assert caught.value.reason is Reason.NODE_FULL

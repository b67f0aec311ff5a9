"""Which way an instance starts, with fake jails. The instance's own part is in test_instance.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.control import Agent
from edge_agent.jail.api import JailSpec
from edge_agent.pool import FEW, PAUSE, QUIET, SOON
from edge_agent.reservations import Reservations
from edge_agent.starts import ZYGOTE_QUIET, Exec, FromZygote, Parked, Starts
from shared.errors import Reason, RoostError
from shared.identity import InstanceKey
from shared.resources import Resources
from tests.support.egress import no_egress
from tests.support.eventually import eventually
from tests.support.fake_jails import WARM, FakeAgent, FakeJail, FakeJails

CAPACITY = Resources(1 << 30, 8000, 1000)


def agent(start: str = "auto", version: str = "v1") -> Agent:
    toml = f'[agent]\nname = "probe"\n[run]\nentry = "probe:agent"\nstart = "{start}"\n'
    return Agent.of(version, toml, "0" * 64)


async def ready(agent: FakeAgent) -> None:
    await agent.send(b'{"kind": "ready"}')
    while True:
        await agent.receive()


async def _turns_of_the_loop() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


@dataclass
class Bench:
    starts: Starts
    jails: FakeJails
    reservations: Reservations
    now: list[float]
    wakes: list[None]  # one for each time that a pass was asked for

    def ways(self, agent: Agent, is_new_here: bool = True) -> list[str]:
        return [type(way).__name__ for way in self.starts.ways(agent, "", is_new_here)]

    async def settle(self, passes: int = 3) -> None:
        self.now[0] += 2 * PAUSE
        for _ in range(passes):
            await self.starts.reconcile()
            await _turns_of_the_loop()  # by which alone what was begun comes to its end
            if tasks := [
                t for t in asyncio.all_tasks() if t.get_name().startswith(("park", "warm", "zygote", "end"))
            ]:
                await asyncio.wait(tasks, timeout=5.0)

    def parked(self) -> list[str]:
        return [jail_id for jail_id in self.jails.running if "-parked-" in jail_id]

    def warm(self) -> int:
        return sum(self.jails.running[jail_id].warm for jail_id in self.parked())


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    now = [1000.0]
    jails = FakeJails(tmp_path, ready)
    reservations = Reservations("edge-1", CAPACITY)
    wakes: list[None] = []
    starts = Starts(jails, reservations, no_egress(), lambda: now[0], lambda: wakes.append(None))
    yield Bench(starts, jails, reservations, now, wakes)
    await starts.close()
    await jails.close()


async def test_the_first_user_is_executed_and_the_next_find_more(bench: Bench) -> None:
    assert bench.ways(agent()) == ["Exec"]
    await bench.settle()
    assert bench.ways(agent()) == ["Parked", "FromZygote", "Exec"]
    assert bench.ways(agent(), is_new_here=False) == ["FromZygote", "Exec"]


@pytest.mark.parametrize(
    ("start", "ways"),
    [
        ("exec", ["Exec"]),
        ("zygote", ["FromZygote", "Exec"]),
        ("parked", ["Parked", "FromZygote", "Exec"]),
    ],
)
async def test_the_policy_may_want_less(bench: Bench, start: str, ways: list[str]) -> None:
    bench.ways(agent(start))
    await bench.settle()
    assert bench.ways(agent(start)) == ways


async def test_a_parked_jail_is_given_away_once(bench: Bench) -> None:
    for _ in range(4):
        bench.ways(agent())
    await bench.settle(6)
    given = []
    while isinstance(way := next(iter(bench.starts.ways(agent(), "", True))), Parked):
        given.append(way.jail.jail_id)
    assert len(given) == len(set(given)) == 4


async def test_the_warm_go_first_and_the_cold_when_there_are_no_others(bench: Bench) -> None:
    for _ in range(FEW + 3):
        bench.ways(agent())
    bench.now[0] += SOON
    await bench.settle(10)
    assert (len(bench.parked()), bench.warm()) == (FEW + 3, FEW)
    given = [next(iter(bench.starts.ways(agent(), "", True))) for _ in range(FEW + 3)]
    jails = [way.jail for way in given if isinstance(way, Parked)]
    assert [isinstance(jail, FakeJail) and jail.warm for jail in jails] == [True] * FEW + [False] * 3


async def test_as_many_get_warm_as_came_of_late(bench: Bench) -> None:
    for _ in range(FEW + 3):
        bench.ways(agent())
    await bench.settle(10)
    assert bench.warm() == FEW + 3


async def test_a_jail_that_is_being_warmed_is_given_to_nobody(bench: Bench) -> None:
    async def slow(agent: FakeAgent) -> None:
        await agent.send(b'{"kind": "ready"}')
        assert await agent.to_agent.get() == WARM
        await agent.hang()

    bench.jails.program = slow
    bench.ways(agent())
    for _ in range(3):
        bench.now[0] += 2 * PAUSE
        await bench.starts.reconcile()
        await _turns_of_the_loop()
    assert bench.starts.parked == len(bench.parked()) == 1, "it counts as one that waits"
    assert bench.ways(agent()) == ["FromZygote", "Exec"]


@pytest.mark.parametrize("fault", ["ends", "says something else", "writes to its state"])
async def test_a_jail_that_fails_to_get_warm_ends_and_after_two_they_wait_cold(
    bench: Bench, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    warmed = []

    async def faulty(agent: FakeAgent) -> None:
        await agent.send(b'{"kind": "ready"}')
        assert await agent.to_agent.get() == WARM
        warmed.append(agent.spec.jail_id)
        if fault == "ends":
            return
        if fault == "writes to its state":
            (agent.state / "left").touch()
        await agent.send(b'{"kind": "delta"}' if fault == "says something else" else b'{"kind": "ready"}')
        await agent.hang()

    bench.jails.program = faulty
    bench.ways(agent())
    await bench.settle(10)
    assert len(warmed) == 2
    assert not set(warmed) & set(bench.parked()), "they have ended"
    assert not set(warmed) & set(await bench.jails.directories())
    assert len(bench.parked()) == 1
    assert bench.ways(agent())[0] == "Parked", "a cold one"
    assert caplog.text.count("wait cold from now on") == 1


async def test_who_has_just_come_is_left_alone(bench: Bench) -> None:
    bench.ways(agent())
    bench.starts.discard("left-by-somebody")
    await _turns_of_the_loop()
    assert not bench.wakes
    await eventually(lambda: bench.wakes, 5.0)


async def test_a_zygote_that_somebody_waits_for_begins_at_once(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.starts.expect(agent(), "", 60.0))
    await asyncio.sleep(0)
    assert bench.wakes
    await bench.starts.reconcile()
    await waiting


async def test_versions_are_not_mixed(bench: Bench) -> None:
    bench.ways(agent(version="v1"))
    await bench.settle()
    assert bench.ways(agent(version="v2")) == ["Exec"]
    (way, *_) = bench.starts.ways(agent(version="v1"), "", False)
    assert isinstance(way, FromZygote)
    assert way.jail_id == bench.jails.zygotes[0].jail_id


async def test_a_parked_jail_that_ended_is_not_given_away(bench: Bench) -> None:
    bench.ways(agent())
    await bench.settle()
    (jail_id,) = bench.parked()
    bench.jails.running[jail_id].crash()
    await bench.starts.reconcile()
    assert bench.ways(agent())[0] == "FromZygote"
    await bench.settle()
    assert jail_id not in await bench.jails.directories()


async def test_a_zygote_that_ended_comes_again_once(bench: Bench) -> None:
    bench.ways(agent("zygote"))
    await bench.settle()
    bench.jails.zygotes[0].ended = True
    assert bench.ways(agent("zygote")) == ["Exec"]
    await bench.settle()
    assert len(bench.jails.zygotes) == 1, "not at once"
    bench.now[0] += 6.0
    await bench.settle()
    assert bench.ways(agent("zygote")) == ["FromZygote", "Exec"]
    bench.jails.zygotes[1].ended = True
    bench.now[0] += 60.0
    bench.ways(agent("zygote"))
    await bench.settle()
    assert len(bench.jails.zygotes) == 2, "it failed twice"
    assert bench.ways(agent("zygote")) == ["Exec"]


async def test_an_agent_that_can_have_no_zygote_is_executed(bench: Bench) -> None:
    bench.jails.zygote_refusals += [RoostError(Reason.JAIL_FAILED, "threads")] * 2
    for _ in range(3):
        assert bench.ways(agent()) == ["Exec"]
        await bench.settle()
        bench.now[0] += 6.0
    assert not bench.jails.zygote_refusals
    assert not bench.jails.zygotes


async def test_nothing_is_parked_where_instances_need_the_room(bench: Bench) -> None:
    bench.ways(agent())
    await bench.settle()
    assert len(bench.parked()) == 1
    bench.reservations.claim(InstanceKey("t", "probe", "ana"), 1, CAPACITY, bench.now[0])
    await bench.settle()
    assert not bench.parked()


async def test_a_zygote_has_memory_for_what_its_forks_leave_it(bench: Bench) -> None:
    """Pages that it wrote to since are the forks', and count as its own."""
    bench.ways(agent())
    await bench.settle()
    need = agent().policy.need.memory_bytes
    (zygote,) = bench.jails.zygotes
    assert zygote.spec.limits.memory_bytes == need + CAPACITY.memory_bytes // need * (2 << 20)


async def test_all_ends_when_nobody_comes(bench: Bench) -> None:
    bench.ways(agent())
    await bench.settle()
    bench.now[0] += QUIET
    await bench.settle()
    assert not bench.parked()
    assert not bench.jails.zygotes[0].ended
    bench.now[0] += ZYGOTE_QUIET
    await bench.settle()
    assert bench.jails.zygotes[0].ended
    assert bench.ways(agent()) == ["Exec"]


async def test_a_zygote_may_have_as_large_files_as_its_forks(bench: Bench) -> None:
    toml = agent().policy_toml + '[resources]\ndisk = "3G"\n'
    bench.ways(Agent.of("v1", toml, "0" * 64))
    await bench.settle()
    assert bench.jails.zygotes[0].spec.disk.state_bytes == 3 << 30


async def test_a_zygotes_directory_that_could_not_go_goes_later(bench: Bench) -> None:
    zygote, instance = f"zygote-v1-{'0' * 16}", f"zygote-v1-{'0' * 24}"
    for jail_id in (zygote, instance):
        await (await bench.jails.make(JailSpec(jail_id, "v1", ("/x",), limits=agent().policy.need))).kill()
        bench.starts.left_behind(jail_id)
    await bench.starts.reconcile()
    assert await bench.jails.directories() == [instance], "an agent may be called zygote, too"


async def test_exec_is_always_the_last_way(bench: Bench) -> None:
    for start in ("auto", "exec", "zygote", "parked"):
        *_, last = bench.starts.ways(agent(start), "", True)
        assert isinstance(last, Exec)


async def test_no_device_is_kept_by_a_jail_that_waits_for_users(bench: Bench) -> None:
    needy = agent()
    toml = needy.policy_toml + '[resources]\ndevices = ["gpu"]\n'
    needy = Agent.of("v1", toml, "0" * 64)
    roomy = Resources(CAPACITY.memory_bytes, CAPACITY.cpu_millis, CAPACITY.pids, (("gpu", 4),))
    bench.starts._reservations = Reservations("edge-1", roomy)
    bench.ways(needy)
    await bench.settle()
    assert bench.ways(needy) == ["FromZygote", "Exec"]
    assert bench.parked() == []


async def test_nothing_waits_while_held_back(bench: Bench) -> None:
    bench.ways(agent())
    await bench.settle()
    assert bench.parked()
    bench.starts.hold_back(True)
    await bench.settle()
    assert (bench.parked(), bench.starts.parked) == ([], 0)
    assert bench.ways(agent()) == ["FromZygote", "Exec"], "those who come are started all the same"
    bench.starts.hold_back(False)
    await bench.settle()
    assert bench.parked()

"""What is asked for on behalf of an agent is the same wherever it is asked."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent import specs
from edge_agent.control import Agent
from edge_agent.jail.api import JailSpec, Zygote
from edge_agent.jail.python import PARKS_VARIABLE
from edge_agent.reservations import Reservations
from edge_agent.starts import Starts
from shared.resources import Resources
from tests.support.egress import no_egress
from tests.support.fake_jails import FakeAgent, FakeJails


class Noting(FakeJails):
    asked: asyncio.Future[JailSpec]

    async def zygote(self, spec: JailSpec) -> Zygote:
        self.asked.set_result(spec)
        return await super().zygote(spec)


@pytest.mark.parametrize("memory", ["64M", "2G"])
async def test_starts_asks_for_the_zygote_that_plans_show(tmp_path: Path, memory: str) -> None:
    toml = f'[agent]\nname = "a"\n[run]\nentry = "a:agent"\n[resources]\nmemory = "{memory}"\ncpu = 2.0\n'
    agent = Agent.of("v1", toml, "0" * 64)

    async def hang(agent: FakeAgent) -> None:
        await agent.hang()

    jails = Noting(tmp_path, hang)
    jails.asked = asyncio.get_running_loop().create_future()
    capacity = Resources(8 << 30, 8000, 1000)
    starts = Starts(jails, Reservations("edge-1", capacity), no_egress(), lambda: 1000.0)
    list(starts.ways(agent, "packages", is_new_here=True))
    await starts.reconcile()
    async with asyncio.timeout(5.0):
        asked = await jails.asked
    await starts.close()
    assert replace(asked, jail_id="zygote") == specs.of_zygote(
        "zygote", agent, capacity.memory_bytes, "packages"
    )
    await jails.close()


@pytest.mark.parametrize(
    ("run", "resources", "waits"),
    [
        ('entry = "a:agent"', "", True),
        ('entry = "a:agent"\nstart = "parked"', "", True),
        ('entry = "a:agent"\nstart = "zygote"', "", False),
        ('entry = "a:agent"\nstart = "exec"', "", False),
        ('command = ["./a"]', "", False),
        ('entry = "a:agent"', 'devices = ["gpu"]', False),
    ],
)
def test_a_zygote_knows_whether_its_forks_wait_for_users(run: str, resources: str, waits: bool) -> None:
    toml = f'[agent]\nname = "a"\n[run]\n{run}\n[resources]\n{resources}\n'
    agent = Agent.of("v1", toml, "0" * 64)
    assert specs.parks(agent.policy) is waits
    assert (PARKS_VARIABLE in specs.of_zygote("zygote", agent, 8 << 30, "").env) is waits

"""A machine that runs short of memory sends its idlest users' instances to sleep, and loses nothing."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NodeSpec, node, running_mesh
from tests.support.process import Process

PROBE = AGENTS / "probe"
SHORT = NodeSpec("edge-short")


def pretend(meminfo: Path, available: int) -> None:
    """In percent."""
    with meminfo.open("r+") as file:  # the same file, for it is mounted
        file.write(f"MemTotal:       1000 kB\nMemAvailable:   {available * 10:4} kB\n")


async def test_the_idlest_sleep_when_memory_is_short_and_none_in_a_turn(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.touch()
    pretend(meminfo, 50)
    async with running_mesh(tmp_path, []) as mesh:
        node(mesh, SHORT)  # writes its configuration
        mesh.nodes[SHORT.name] = Process(
            "tests.support.pretended_memory",
            [str(meminfo), "--config", str(tmp_path / f"{SHORT.name}.toml")],
            tmp_path / f"{SHORT.name}.log",
        )
        await mesh.nodes[SHORT.name].start()
        await mesh.wait_up(SHORT.name)
        await mesh.deploy(PROBE, turn_timeout='"60s"')

        async def phase(user: str) -> str:
            instance = await mesh.instance("probe", user)
            return instance.phase if instance else "none"

        async def asleep(*users: str) -> bool:
            return all([await phase(user) == "hibernated" for user in users])

        async with mesh.client() as client:
            async with client.attach("probe", "ana") as ana, client.attach("probe", "ben") as ben:
                await ana.send("append a1")
                await ben.send("append b1")
                turn = asyncio.create_task(ben.send("slow-append 20 b2"))
                await asyncio.sleep(1.0)  # by then it would have slept, were it short
                assert await phase("ana") == "live"
                pretend(meminfo, 3)
                await eventually(lambda: asleep("ana"), 20.0, "the idle one sleeps")
                assert await phase("ben") == "live", "in the middle of a turn"
                log = mesh.nodes[SHORT.name].log()
                assert "memory is short: 3% of the memory is left" in log
                assert "1 of 1 idle instances hibernate" in log
                assert json.loads((await ana.send("append a2")).text) == ["a1", "a2"], "and wakes"
                assert json.loads((await turn).text) == ["b1", "b2"]
                pretend(meminfo, 50)
                await eventually(
                    lambda: "memory is enough again" in mesh.nodes[SHORT.name].log(), 10.0, "it is over"
                )
                assert json.loads((await ben.send("lines")).text) == ["b1", "b2"]

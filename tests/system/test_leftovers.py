"""Nothing is left behind: no process, mount, cgroup, network namespace or temporary directory.

Every system test is watched for that (conftest.py). Here is what a node leaves while it is down after a
crash, and that its successor takes it up or takes it away.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from tests.support import leftovers
from tests.support.eventually import eventually
from tests.support.mesh import AGENTS, NORTH, running_mesh


async def test_a_clean_stop_leaves_the_data_and_nothing_else(tmp_path: Path) -> None:
    before = leftovers.count(tmp_path)
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(AGENTS / "probe")
        async with mesh.client() as client:
            for user in ("ana", "ben", "cy"):
                async with client.attach("probe", user) as chat:
                    await chat.send("append one")
        assert leftovers.count(tmp_path).since(before)["cgroups"]
        assert await mesh.nodes["edge-north"].stop() == 0
        left = leftovers.count(tmp_path).since(before)
        assert not left.get("cgroups")
        assert not left.get("mounts")
        assert not any("edge" in p or "probe" in p for p in left.get("processes", []))


async def test_after_kill_9_of_everything_of_a_node_its_successor_cleans_up(tmp_path: Path) -> None:
    before = leftovers.count(tmp_path)
    async with running_mesh(tmp_path, [NORTH]) as mesh:
        await mesh.deploy(AGENTS / "probe")
        node = mesh.nodes["edge-north"]
        async with mesh.client() as client, client.attach("probe", "ana") as ana:
            await ana.send("append one")
            for round in range(3):
                turn = asyncio.create_task(ana.send(f"slow-append 1 r{round}"))
                await asyncio.sleep(0.4)
                for process in node.tree():
                    with suppress(ProcessLookupError):  # it died with one that was killed before
                        os.kill(process.pid, signal.SIGKILL)
                await node.wait(5.0)

                def processes_left() -> bool:
                    left = leftovers.count(tmp_path).since(before).get("processes", [])
                    return not any("edge_agent" in p or "probe" in p for p in left)

                await eventually(processes_left, 5.0, "all processes of the node gone")
                assert not leftovers.count(tmp_path).since(before).get("mounts")
                await node.start()
                expected = ["one", *(f"r{i}" for i in range(round + 1))]
                assert json.loads((await turn).text) == expected
            # One user's jail runs, in one control group of each controller: none is left of its predecessors.
            groups = leftovers.jail_groups(mesh.data_dir("edge-north"))
            used = {g.name for g in groups} & set(mesh.used_directories("edge-north"))
            assert len(used) == 1, groups


async def test_a_node_takes_away_the_files_of_instances_that_moved_on(tmp_path: Path) -> None:
    async with running_mesh(tmp_path) as mesh:
        await mesh.deploy(AGENTS / "probe")
        async with mesh.client((59.9, 10.7)) as client:
            async with client.attach("probe", "ana") as ana:
                await ana.send("append one")
            assert mesh.used_directories("edge-north")
            await mesh.drain("edge-north")
            async with client.attach("probe", "ana") as ana:
                assert (await ana.send("append two")).receipt.node == "edge-south"
        await eventually(
            lambda: not mesh.used_directories("edge-north"), 10.0, "the files on the old node gone"
        )

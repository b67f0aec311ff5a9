"""Parked jails: what waits for a user holds nothing of another, whenever it was parked."""

from __future__ import annotations

import json
import os
from typing import Any

import psutil
import pytest

from edge_agent.control import Agent
from edge_agent.jail.api import Jail
from edge_agent.starts import Parked, Starts
from edge_agent.turns import Deltas, Turn, run_turn
from tests.support.calls import no_calls
from tests.support.eventually import eventually
from tests.support.jailer import RunningJailer
from tests.support.starting import start_by, starts_of
from tests.support.tasks import no_tasks

# Keeps what it is told in every place that it has, and looks for it in all of them.
KEEPER = '''
import json, os
from pathlib import Path
from roost import Agent
agent = Agent()
kept = []
PLACES = [Path(p) for p in ("/state", "/tmp", "/dev/shm")]

def in_memory(backwards):
    """How often the word is there: it is never itself put together for the search."""
    found = 0
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            where, rights = line.split()[:2]
            if rights.startswith("r") and "[v" not in line:
                start, end = (int(x, 16) for x in where.split("-"))
                memory.seek(start)
                found += memory.read(end - start)[::-1].count(backwards)
    return found

@agent.turn
def keep(turn):
    asked = json.loads(turn.message)
    if "keep" in asked:
        kept.append(asked["keep"])
        os.environ["KEPT"] = asked["keep"]
        os.environ["LD_KEPT"] = asked["keep"]
        for place in PLACES:
            (place / "kept").write_text(asked["keep"])
        return "kept"
    return json.dumps({
        "kept": kept, "environment": "KEPT" in os.environ, "memory": in_memory(asked["backwards"].encode()),
        "files": [str(f) for place in PLACES for f in place.iterdir()],
        "processes": [n for n in os.listdir("/proc") if n.isdecimal()] == [str(os.getpid())],
        "user": turn.user,
    })
'''
WARMED = """
import asyncio, os
from roost import Agent
agent = Agent()
made = []

@agent.warm_up
async def warm_up():
    FAULT
    made.append(asyncio.get_running_loop())

@agent.turn
async def look(turn):
    return f"{len(made)} {asyncio.get_running_loop() in made} {os.listdir('/state')} {turn.user}"
"""
POLICY = """
[agent]
name = "keeper"
[run]
entry = "keeper:agent"
start = "parked"
"""
SECRET = "the-secret-of-ana-9c41"


async def tell(jail: Jail, user: str, **asked: str) -> Any:
    reply = await run_turn(jail, Turn("1", user, json.dumps(asked)), Deltas(), no_tasks(), no_calls(), 20.0)
    return json.loads(reply) if "backwards" in asked else reply


async def test_a_claimed_jail_has_nothing_of_whoever_was_here_before(jailer: RunningJailer) -> None:
    jailer.bundle("keeper", {"keeper.py": KEEPER})
    agent = Agent.of("keeper", POLICY, "")
    async with starts_of(jailer) as starts:
        ana = await start_by(jailer, starts, agent, "parked")
        beside = await start_by(jailer, starts, agent, "parked")  # parked before she spoke
        assert await tell(ana, "ana", keep=SECRET) == "kept"
        seen = await tell(ana, "ana", backwards=SECRET[::-1])
        assert seen["kept"] == [SECRET]
        assert seen["memory"] > 0, "the search finds what is there"
        assert seen["files"] == [f"{place}/kept" for place in ("/state", "/tmp", "/dev/shm")]
        clean = {"kept": [], "environment": False, "memory": 0, "files": [], "processes": True}
        assert await tell(beside, "bob", backwards=SECRET[::-1]) == {**clean, "user": "bob"}
        await ana.kill()
        after = await start_by(jailer, starts, agent, "parked")
        assert await tell(after, "cat", backwards=SECRET[::-1]) == {**clean, "user": "cat"}
        assert len({ana.jail_id, beside.jail_id, after.jail_id}) == 3
        inodes = {(jailer.data_dir / "jails" / j.jail_id).stat().st_ino for j in (ana, beside, after)}
        assert len(inodes) == 3, "nor has it her directory"


async def test_what_a_module_left_before_the_claim_reaches_no_state(jailer: RunningJailer) -> None:
    """Code of a module's that runs as it is forked (`Agent.run`) writes to the state: then it is not parked,
    and the instance is forked when it is wanted."""
    early = "\nclass Early(Agent):\n    def run(self):\n        Path('/state/early').touch()\n"
    early += "        super().run()\nagent = Early()\nagent.turn(keep)\n"
    jailer.bundle("keeper", {"keeper.py": KEEPER + early})
    agent = Agent.of("keeper", POLICY, "")
    async with starts_of(jailer) as starts:
        jail = await start_by(jailer, starts, agent, "zygote")
        ways = [type(way).__name__ for _ in range(3) for way in starts.ways(agent, "", is_new_here=True)]
        assert "Parked" not in ways
        assert (await tell(jail, "ana", backwards="x"))["files"] == ["/state/early"]


async def parked(jailer: RunningJailer, starts: Starts, agent: Agent, *, warm: bool) -> Jail:
    """One that waits, and is warm, or cold."""
    list(starts.ways(agent, "", is_new_here=False))
    version = starts._versions[agent.version]

    async def is_there() -> bool:
        if not (waiting := version.warm if warm else version.cold):
            await starts.reconcile()
        return bool(waiting)

    await eventually(is_there, 30.0)
    (way, *_) = starts.ways(agent, "", is_new_here=True)
    assert isinstance(way, Parked)
    return way.jail


def open_files(jailer: RunningJailer, jail: Jail) -> set[str]:
    """Of its agent's process, by number."""
    uid = (jailer.data_dir / "jails" / jail.jail_id / "state").stat().st_uid
    (pid,) = [p for p in jailer.jailed() if psutil.Process(p).uids().real == uid]
    return set(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("warm", [False, True])
async def test_a_cold_one_and_a_warm_one_serve_alike(jailer: RunningJailer, warm: bool) -> None:
    jailer.bundle("keeper", {"keeper.py": WARMED.replace("FAULT", "pass")})
    agent = Agent.of("keeper", POLICY, "")
    async with starts_of(jailer) as starts:
        jail = await parked(jailer, starts, agent, warm=warm)
        loop = open_files(jailer, jail) - {"0", "1", "2", "3"}
        assert bool(loop) is warm, "a cold one has made nothing"
        made = "1 True" if warm else "0 False"
        assert await tell(jail, "ana") == f"{made} [] ana", "nothing of a rehearsal is left in the state"


async def test_where_warming_up_fails_they_wait_cold(jailer: RunningJailer) -> None:
    jailer.bundle("keeper", {"keeper.py": WARMED.replace("FAULT", "os._exit(7)")})
    agent = Agent.of("keeper", POLICY, "")
    async with starts_of(jailer) as starts:
        list(starts.ways(agent, "", is_new_here=False))
        version = starts._versions[agent.version]

        async def settled() -> bool:
            await starts.reconcile()
            return version.not_warmed == 2 and not version.parking and bool(version.cold)

        await eventually(settled, 30.0)
        assert not version.warm
        jail = await parked(jailer, starts, agent, warm=False)
        assert await tell(jail, "ana") == "0 False [] ana"

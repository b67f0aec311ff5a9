"""What it costs to make a call of the world outside, beside one etcd transaction, on a whole mesh.

A never-call is durable before it begins and after it ends: two fenced transactions, each by way of the node's
daemon and a coordinator. The calls do nothing, so what is measured is what the journal adds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

from coordinator.store.base import Expect, Put
from coordinator.store.etcd import open_etcd
from tests.support.mesh import NORTH, Mesh, running_mesh

_CALLS, _ROUNDS = 50, 6  # of each kind in a turn; turns
_VALUE = b"x" * 200  # about what a call's record holds

_MODULE = f"""
import json, time
from roost import Agent

agent = Agent()

def nothing(key=""):
    return None

@agent.turn
def measure(turn):
    seconds = []
    for n in range({_CALLS}):
        began = time.perf_counter()
        turn.call("nothing", nothing, repeat=turn.message)
        seconds.append(time.perf_counter() - began)
    return json.dumps(seconds)
"""
_POLICY = '[agent]\nname = "caller"\n[run]\nentry = "caller:agent"\nturn_timeout = "60s"\n'


def main(data: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as directory:
        seconds = asyncio.run(_measure(Path(directory)))
    figures = {}
    print(f"{'':16}{'p50 ms':>9}{'p99 ms':>9}")
    for name, taken in seconds.items():
        ordered = sorted(taken)
        figures[f"{name}.p50_ms"] = statistics.median(ordered) * 1000
        figures[f"{name}.p99_ms"] = ordered[int(len(ordered) * 0.99)] * 1000
        print(f"{name:16}{figures[f'{name}.p50_ms']:9.2f}{figures[f'{name}.p99_ms']:9.2f}")
    return figures


async def _measure(directory: Path) -> dict[str, list[float]]:
    root = directory / "caller"
    root.mkdir()
    (root / "caller.py").write_text(_MODULE)
    (root / "agent.toml").write_text(_POLICY)
    taken: dict[str, list[float]] = {"etcd_txn": [], "safe_call": [], "keyed_call": [], "never_call": []}
    async with running_mesh(directory / "mesh", [NORTH]) as mesh:
        await mesh.deploy(root)
        async with mesh.client() as client, client.attach("caller", "ana") as chat:
            await chat.send("safe")
            for _ in range(_ROUNDS):  # by turns, so that all meet the same machine
                taken["etcd_txn"] += await _transactions(mesh)
                for repeat in ("safe", "keyed", "never"):
                    taken[f"{repeat}_call"] += json.loads((await chat.send(repeat)).text)
    return taken


async def _transactions(mesh: Mesh) -> list[float]:
    """Guarded writes of one key, from this process."""
    seconds = []
    async with open_etcd([mesh.etcd.endpoint]) as store:
        found = await store.get("bench")
        revision = found.revision if found else 0
        for _ in range(_CALLS):
            began = time.perf_counter()
            revision = (await store.txn([Expect("bench", revision)], [Put("bench", _VALUE)])).revision
            seconds.append(time.perf_counter() - began)
    return seconds

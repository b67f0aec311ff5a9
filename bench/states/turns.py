"""What a user of a mesh waits for: commits, and the first words after the instance has slept."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.jails.figures import Figures, percentile
from coordinator.inline import INLINE
from coordinator.records import instance_key
from coordinator.store.base import Expect, Put
from coordinator.store.etcd import EtcdStore
from roost._async import AsyncChat
from roost._types import Delta, Reply
from roost.client import AsyncClient
from shared.identity import InstanceKey
from tests.support.eventually import eventually
from tests.support.mesh import Mesh, NodeSpec

AGENT = "keeper"
DIRECTORY = Path(__file__).parents[1] / "agents" / AGENT
HERE = NodeSpec("edge", memory="64G", cpu=64.0, pids=100_000, position=(50.0, 8.0))
THERE = NodeSpec("edge-there", memory="64G", cpu=64.0, pids=100_000, position=(60.0, 10.0))
_TURN_SECONDS = 120.0
_ASLEEP_SECONDS = 60.0
_A_TURN = 50  # MB that one turn writes


@dataclass(frozen=True, slots=True)
class Waited:
    """Seconds to the first text, and from there to the committed reply. `from_`: where it was resumed."""

    first: float
    commit: float
    resumed_from: str


async def turn(chat: AsyncChat, message: str) -> Waited:
    began = time.perf_counter()
    first = 0.0
    async for event in chat.stream(message, timeout=_TURN_SECONDS):
        if isinstance(event, Delta) and not first:
            first = time.perf_counter()
        elif isinstance(event, Reply):
            return Waited(first - began, time.perf_counter() - first, str(event.receipt.resumed_from))
    raise AssertionError("a stream ends with a reply or an error")


def spread(name: str, seconds: Sequence[float]) -> Figures:
    taken = [each * 1000 for each in seconds]
    return {
        f"{name}.p50_ms": percentile(taken, 0.5),
        f"{name}.p10_ms": percentile(taken, 0.1),
        f"{name}.p90_ms": percentile(taken, 0.9),
    }


async def warm(mesh: Mesh, client: AsyncClient, node: str) -> None:
    """Until the node has the agent, and its zygote."""
    for i in itertools.count():
        async with client.attach(AGENT, f"early-{node}-{i}") as chat:
            await turn(chat, "nothing 0 0 0")
        if f"{AGENT}/early-{node}-{i}: exec," not in mesh.nodes[node].log():
            return
        await asyncio.sleep(1.0)


async def asleep(mesh: Mesh, users: Sequence[str]) -> None:
    async def all_asleep() -> bool:
        phases = {i.key.user: i.phase for i in (await mesh.status()).instances}
        return all(phases.get(user) == "hibernated" for user in users)

    await eventually(all_asleep, _ASLEEP_SECONDS, f"{len(users)} instances hibernated")


async def small_commits(client: AsyncClient, store: EtcdStore, count: int) -> Figures:
    """1 KB in a file of its own is changed in each turn; after each, a bare transaction of the same sizes."""
    key = InstanceKey("default", AGENT, "small")
    commits: list[float] = []
    bare: list[float] = []
    revision = 0
    async with client.attach(AGENT, key.user) as chat:
        await turn(chat, "write 0 1 1024")
        record, inline = await _sizes(store, key)
        for number in range(count):
            commits.append((await turn(chat, "write 0 1 1024")).commit)
            began = time.perf_counter()
            writes = [Put("bench/record", os.urandom(record)), Put(f"bench/{number}", os.urandom(inline))]
            result = await store.txn([Expect("bench/record", revision)], writes)
            bare.append(time.perf_counter() - began)
            assert result.succeeded
            revision = result.revision
    found = spread("commit", commits) | spread("etcd_txn", bare)
    return found | {"commit.record_bytes": float(record), "commit.inline_bytes": float(inline)}


async def _sizes(store: EtcdStore, key: InstanceKey) -> tuple[int, int]:
    """Bytes of the instance's record, and of what its commits bring along."""
    record = await store.get(instance_key(key))
    assert record is not None
    found = (await store.list(f"{INLINE}{key}/")).records
    return len(record.value), max((len(r.value) for r in found), default=0)


async def resume_here(mesh: Mesh, client: AsyncClient, count: int) -> Figures:
    """Where it slept: by who has stayed attached, and by who comes anew."""
    stayed: list[float] = []
    anew: list[float] = []
    async with client.attach(AGENT, "sleeper") as chat, client.attach(AGENT, "comes") as other:
        await turn(chat, "write 0 1 1024")
        await turn(other, "write 0 1 1024")
        await other.close()
        for _ in range(count):
            await asleep(mesh, ["sleeper", "comes"])
            waited = await turn(chat, "touch 0 1 16")
            stayed.append(waited.first)
            async with client.attach(AGENT, "comes") as fresh:
                anew.append((await turn(fresh, "touch 0 1 16")).first)
    return spread("resume_same_node", stayed) | spread("resume_same_node_anew", anew)


async def resume_elsewhere(mesh: Mesh, client: AsyncClient, count: int, mb: int) -> Figures:
    """Users with `mb` files of 1 MB, whose node is drained when they sleep, and who then come back."""
    users = [f"traveller-{mb}-{number}" for number in range(count)]
    for user in users:
        async with client.attach(AGENT, user) as chat:
            await fill(chat, mb, 1 << 20)
    await asleep(mesh, users)
    await mesh.drain(HERE.name)
    try:
        await warm(mesh, client, THERE.name)
        seconds = []
        for user in users:
            async with client.attach(AGENT, user) as chat:
                waited = await turn(chat, "touch 0 1 16")
            assert waited.resumed_from.upper().endswith("BLOBS"), waited
            seconds.append(waited.first)
    finally:
        await mesh.drain(HERE.name, undo=True)
    return spread(f"resume_other_node_{mb}mb", seconds)


async def fill(chat: AsyncChat, count: int, size: int) -> None:
    """`count` files of `size` bytes, in turns that are not too large."""
    at_once = max(1, _A_TURN * 1_000_000 // size)
    for first in range(0, count, at_once):
        await turn(chat, f"write {first} {min(at_once, count - first)} {size}")


async def changes(chat: AsyncChat, count: int, size: int, changed: int, repeat: int) -> list[float]:
    """Seconds of commits after which `changed` of the `count` files are new."""
    seconds = []
    for number in range(repeat):
        first = number * changed % (count - changed + 1)
        seconds.append((await turn(chat, f"write {first} {changed} {size}")).commit)
    return seconds

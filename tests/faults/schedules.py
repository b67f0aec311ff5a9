"""Faults aimed at one mistake each, with as little chance in them as real processes allow.

Each must pass with the real daemons, and be noticed with those that have the mistake that `AIMED_AT` says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults import checker
from tests.faults.checker import Violation
from tests.faults.cluster import GC_RATE, REAL, SMALL, Cluster, Programs, running_cluster_of
from tests.faults.nemesis import Nemesis
from tests.faults.observer import Observer, observing
from tests.faults.workload import AGENT, Workload

_TURN_SECONDS = 20.0  # for a turn that meets the fault, with the move that follows
_FINAL_SECONDS = 8.0


@dataclass
class Scene:
    cluster: Cluster
    workload: Workload
    nemesis: Nemesis
    observer: Observer

    async def verdict(self) -> list[Violation]:
        """Of all that happened here."""
        await self.workload.read_all(_FINAL_SECONDS)
        await self.observer.caught_up(10.0)
        return checker.check(self.workload.history)

    async def append_during(self, user: str, fault: Callable[[str], Awaitable[bool]]) -> None:
        """`user` has an instance; a turn of theirs meets what `fault` does to its owner."""
        async with self.cluster.client() as client, client.attach(AGENT, user) as chat:
            for i in range(2):
                await self.workload.append(chat, user, f"{user}-before-{i}")
            owner = await self.nemesis.owner(user)
            assert owner is not None
            harm = asyncio.create_task(fault(owner))
            await asyncio.sleep(0.1)  # it is armed
            await self.workload.append(chat, user, f"{user}-meets-it", _TURN_SECONDS)
            assert await harm, f"the failpoint was not reached: {self.cluster.process(owner).log()[-2000:]}"
        async with self.cluster.client() as client, client.attach(AGENT, user) as chat:
            await self.workload.append(chat, user, f"{user}-after", _TURN_SECONDS)


Schedule = Callable[[Scene, str], Awaitable[None]]
TRIES = 4  # of a schedule, each with a user of its own, within which a planted bug must be caught


async def overtaken(scene: Scene, user: str) -> None:
    """The owner commits when another has been made the owner, and has not committed yet."""
    take_over = scene.nemesis.take_over
    await scene.append_during(user, lambda owner: take_over(user, owner, used=False, lost=False))


async def asleep_past_its_lease(scene: Scene, user: str) -> None:
    """The owner looked at the clock, stood still for longer than its TTL, and commits when another has."""
    take_over = scene.nemesis.take_over
    await scene.append_during(user, lambda owner: take_over(user, owner, used=True, lost=True))


async def killed_after_the_reply(scene: Scene, user: str) -> None:
    """The owner dies as soon as the client has its reply."""
    async with scene.cluster.client() as client, client.attach(AGENT, user) as chat:
        for i in range(2):
            op = await scene.workload.append(chat, user, f"{user}-{i}", _TURN_SECONDS)
        owner = op.receipt.node if op.receipt else ""
        daemon = scene.cluster.daemon(owner) if owner else None
        assert daemon is not None, op
        daemon.kill()
        await scene.workload.append(chat, user, f"{user}-after", _TURN_SECONDS)


async def killed_after_the_commit(scene: Scene, user: str) -> None:
    """The client never hears, and sends the turn again."""
    await scene.append_during(user, lambda owner: scene.nemesis.at(owner, "node.commit.answered", "kill"))


async def collected_meanwhile(scene: Scene, user: str) -> None:
    """A turn is committed, and what it brought along is put, after a collector has looked what is needed and
    before it looks what there is. Then the only node that has copies is gone for a while."""
    await _append(scene, user, "before")
    garbage = scene.cluster.blobs / "chunks" / "00"
    garbage.mkdir(exist_ok=True)
    for i in range(3 * GC_RATE):
        (garbage / f"00{i:062x}").write_bytes(b"")
    collecting = asyncio.create_task(scene.nemesis.collect("c0"))
    await asyncio.sleep(0.5)
    await _append(scene, user, "meanwhile")
    assert await collecting
    owner = await scene.nemesis.owner(user)
    assert owner is not None
    process = scene.cluster.process(owner)
    await process.kill()
    await _append(scene, user, "after")
    await process.start()
    await scene.cluster.mesh().wait_up(owner)


async def _append(scene: Scene, user: str, turn: str) -> None:
    async with scene.cluster.client() as client, client.attach(AGENT, user) as chat:
        await scene.workload.append(chat, user, f"{user}-{turn}", _TURN_SECONDS)


@dataclass(frozen=True, slots=True)
class Aim:
    """`rules`: at least one of them is broken when the planted bug is met. `slow`: a TTL must pass."""

    schedule: Schedule
    rules: frozenset[str]
    slow: bool = False


AIMED_AT = {
    "epoch-unchecked": Aim(overtaken, frozenset({"store"})),
    "lease-only": Aim(asleep_past_its_lease, frozenset({"lost", "forked", "store"}), slow=True),
    "reply-before-commit": Aim(killed_after_the_reply, frozenset({"lost", "store"})),
    "collected-at-once": Aim(collected_meanwhile, frozenset({"unreadable"})),
    "turn-not-recorded": Aim(killed_after_the_commit, frozenset({"doubled"})),
}


def broken(variant: str) -> Programs:
    more = ("--variant", variant)
    return Programs(("tests.faults.broken_coordinator", *more), ("tests.faults.broken_node", *more))


async def caught(directory: Path, variant: str) -> tuple[bool, list[Violation]]:
    """Was the planted bug caught, and by what?"""
    aim = AIMED_AT[variant]
    async with scene(directory, broken(variant)) as wrong:
        for i in range(TRIES):
            await aim.schedule(wrong, f"user{i}")
            found = await wrong.verdict()
            if aim.rules & {violation.rule for violation in found}:
                return True, found
    return False, found


@asynccontextmanager
async def scene(directory: Path, programs: Programs = REAL) -> AsyncIterator[Scene]:
    async with running_cluster_of(directory, programs, SMALL) as cluster:
        workload = Workload(cluster, seed=0)
        endpoints = [etcd.endpoint for etcd in cluster.etcds.values()]
        async with observing(endpoints, workload.history) as observer:
            yield Scene(cluster, workload, Nemesis(cluster, workload), observer)

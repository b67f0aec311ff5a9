"""The three ways to start an agent on a node: what the node's daemon does, in this process, with a real
jailer and real jails. Only the coordinator is in memory, so a commit costs no network; it is not measured
here anyway, as the first reply comes before it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.jails.starts import MESSAGE, Failed
from edge_agent import pool
from edge_agent.commits import Commits
from edge_agent.control import Agent, Commit, CommittedState
from edge_agent.instance import Instance
from edge_agent.packages import Packages
from edge_agent.phases import Done, Parts
from edge_agent.records import Records
from edge_agent.reservations import Reservations
from edge_agent.starts import PERIOD, Starts, Way, _Version, name_of
from edge_agent.state.blobs import MemoryBlobs
from edge_agent.state.bundles import BundleStore
from edge_agent.state.chunks import ChunkStore
from edge_agent.state.store import StateStore
from edge_agent.supervisor import jail_id_of
from edge_agent.tasks import Tasks
from edge_agent.tenure import Tenure
from edge_agent.turns import Turn
from edge_agent.under_way import UnderWay
from shared.bundle import Bundle
from shared.content import Blob
from shared.effects import Call
from shared.errors import RoostError
from shared.identity import InstanceKey
from shared.reconcile import ReconcileLoop
from shared.resources import Resources
from tests.support.egress import no_egress
from tests.support.jailer import RunningJailer

WAYS = ("parked", "zygote", "exec")
_ROOM = Resources(1 << 50, 1 << 40, 1 << 30)
_READY_SECONDS = 90.0
_EPOCH = 1


class _Control:
    """Everything is this node's, new, and committed as soon as it is asked for."""

    gc_round = 0

    def __init__(self, agents: dict[str, Agent]) -> None:
        self._agents = agents

    async def fetch(self, key: InstanceKey, epoch: int, timeout: float) -> CommittedState:
        return CommittedState(0, "", self._agents[key.agent])

    async def commit(self, key: InstanceKey, epoch: int, commit: Commit, timeout: float) -> None:
        return None

    async def journal(
        self, key: InstanceKey, epoch: int, turn_id: str, write: Sequence[Call], timeout: float
    ) -> Sequence[Call]:
        return [replace(call, revision=1) for call in write]

    async def hibernated(self, key: InstanceKey, epoch: int, timeout: float) -> None:
        return None


class _WatchedStarts(Starts):
    """Tells what is ready, and what was used."""

    used: str = ""

    def ways(self, agent: Agent, packages: str, is_new_here: bool) -> Iterator[Way]:
        for way in super().ways(agent, packages, is_new_here):
            self.used = name_of(way)
            yield way

    def ready(self, version: str, way: str, count: int) -> bool:
        known = self._versions.get(version)
        if way == "exec":
            return True
        if known is None or known.live_zygote is None:
            return False
        return way == "zygote" or self._waits(known, count)

    def _waits(self, version: _Version, count: int) -> bool:
        """Are so many parked, and as many of them warm as are to be?"""
        warm, cold = len(version.warm), len(version.cold)
        to_come = pool.to_warm(version.demand, warm, cold, self._clock())
        return warm + cold >= count and not (version.warming or to_come)

    async def park(self, version: str, count: int) -> tuple[list[str], list[str]]:
        """Until so many wait cold: more than demand would ever make. Those, and the warm ones. `reconcile`
        must not run."""
        known = self._versions[version]
        while len(known.cold) < count:
            known.parking += 2
            await asyncio.gather(self._park(known), self._park(known))
        return [jail.jail_id for jail in known.cold], [jail.jail_id for jail in known.warm]


@dataclass(slots=True)
class StartedHere:
    """`way`: how it was really started."""

    node: Node
    instance: Instance
    turn: asyncio.Task[Done]
    seconds: float
    way: str

    async def end(self) -> None:
        with suppress(RoostError):
            await self.turn
        await self.node.end(self.instance)


@dataclass
class Here:
    """One of the ways to start it on `node`. `by`: how many starts went which way."""

    node: Node
    name: str
    by: Counter[str] = field(default_factory=Counter)

    async def ready(self, starts: int) -> None:
        """The zygote is there, and so are enough parked jails: demand makes them, which this adds to."""
        async with asyncio.timeout(_READY_SECONDS):
            while not self.node.starts.ready(self.name, self.name, starts):
                if not self.node.demands(self.name, starts):
                    started = await self.node.start(self.name, MESSAGE)
                    await started.end()
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)

    async def start(self, message: str = MESSAGE) -> StartedHere:
        started = await self.node.start(self.name, message)
        self.by[started.way] += 1
        return started

    def remark(self) -> str:
        """How many went which way: the pool may have been empty."""
        by, self.by = self.by, Counter()
        return ", ".join(f"{count} by {way}" for way, count in by.items() if way != self.name)


class Node:
    """`agents` by name: one for each way to start, of the same bundle."""

    def __init__(self, jailer: RunningJailer, agents: dict[str, Agent], bundle: Bundle) -> None:
        data = jailer.data_dir
        chunks, blobs = ChunkStore(data / "daemon" / "chunks"), MemoryBlobs()
        blobs.kept = {hash: Blob.of(plain).zstd for hash, plain in bundle.blobs.items()}
        state = StateStore(chunks, blobs, BundleStore(data / "bundles", chunks, blobs))
        control, reservations = _Control(agents), Reservations("bench", _ROOM)
        tenure = Tenure()
        tenure.welcomed(time.monotonic(), ttl=1e9)
        egress = no_egress()
        self.jailer = jailer
        self.agents = agents
        self.starts = _WatchedStarts(
            jailer.jails, reservations, egress, time.monotonic, lambda: self._starting.wake("a start")
        )
        self._starting = ReconcileLoop("starts", self.starts.reconcile, PERIOD)
        self._parts = Parts(
            node="bench",
            jails=jailer.jails,
            state=state,
            commits=Commits(state, control),
            records=Records(data / "daemon" / "records.db"),
            control=control,
            reservations=reservations,
            tenure=tenure,
            clock=time.monotonic,
            starts=self.starts,
            tasks=Tasks(jailer.jails, reservations, tenure, time.monotonic),
            egress=egress,
            packages=Packages(jailer.jails, data / "bundles", data / "daemon" / "packages"),
        )
        self._users = itertools.count()
        self._running = asyncio.create_task(self._starting.run(), name="starts")

    async def prepare(self) -> None:
        """Has the agents' files, and their packages compiled, as it does before a version's first start."""
        for agent in self.agents.values():
            await self._parts.state.bundles.ensure(agent.version, agent.bundle_root)
            await self._parts.packages.ensure(agent, lambda text: None)

    async def stop(self) -> None:
        """It parks no more jails, and ends none."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        await self.starts.close()

    async def close(self) -> None:
        await self.stop()
        self._parts.records.close()

    async def park(self, count: int) -> tuple[list[str], list[str]]:
        return await self.starts.park("parked", count)

    def demands(self, name: str, starts: int) -> bool:
        """Have there been enough starts of late that the node gets ready for so many?"""
        version = self.starts._versions.get(name)
        recent = time.monotonic() - 15.0
        return version is not None and sum(at > recent for at in version.demand.starts) >= starts

    async def start(self, name: str, message: str) -> StartedHere:
        """A new user's first turn, up to the first piece of the reply."""
        key = InstanceKey("default", name, f"user-{next(self._users)}")
        asked = UnderWay(Turn("t1", key.user, message))
        began = time.perf_counter()
        instance = Instance(key, _EPOCH, jail_id_of(key), self._parts)
        turn = asyncio.create_task(self._turn(instance, asked))
        text = await anext(asked.deltas.listen(), None)
        seconds = time.perf_counter() - began
        if text is None:
            try:
                await turn
                why = "no text came"
            except RoostError as error:
                why = error.message
            await self.end(instance)
            raise Failed(why)
        return StartedHere(self, instance, turn, seconds, self.starts.used)

    async def _turn(self, instance: Instance, asked: UnderWay) -> Done:
        try:
            return await instance.turn(asked)
        finally:
            asked.deltas.close()

    async def end(self, instance: Instance) -> None:
        await instance.evict("it was measured")
        with suppress(RoostError):
            await self._parts.jails.discard(instance.jail_id)

    def contender(self, name: str) -> Here:
        return Here(self, name)


@asynccontextmanager
async def running_node(policy_toml: str, bundle: Bundle, directory: Path) -> AsyncIterator[Node]:
    """In `directory`, which is made. All of it ends with the block."""
    agents = {
        way: Agent.of(way, policy_toml.replace('start = "auto"', f'start = "{way}"'), bundle.root)
        for way in WAYS
    }
    await asyncio.to_thread(directory.mkdir)
    jailer = RunningJailer(directory)
    try:
        await jailer.start()
        node = Node(jailer, agents, bundle)
        try:
            await node.prepare()
            yield node
        finally:
            await node.close()
    finally:
        await jailer.close()

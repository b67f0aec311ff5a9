"""Carries out faults on a cluster, one at a time on each of its parts. Each ends what it began, also when it
is cancelled; what it left down or cut all the same, `Cluster.heal` mends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

import grpc.aio
import psutil

from protos.v1 import common_pb2, resolver_pb2, resolver_pb2_grpc, state_pb2, state_pb2_grpc
from shared import rpc
from tests.faults.cluster import CLIENT, COORDINATORS, TTL, Cluster
from tests.faults.plan import USERS, Fault
from tests.faults.workload import AGENT, Workload
from tests.support.eventually import eventually
from tests.support.process import Process
from tests.support.proxy import Proxy

_COLLECTING = 30.0  # seconds, for a round
_REACHED = 4.0  # seconds within which an armed failpoint must be reached, to count as a fault


class Nemesis:
    """`do` returns whether the fault came about: a failpoint may not be reached."""

    def __init__(self, cluster: Cluster, workload: Workload) -> None:
        self._cluster = cluster
        self._workload = workload
        self._busy: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def do(self, fault: Fault) -> bool:
        if fault.target in USERS:
            owner = await self.owner(fault.target)
            if owner is None:
                return False
        else:
            owner = fault.target
        async with self._busy[owner]:
            return await self._kind(fault.kind)(fault, owner)

    def _kind(self, kind: str) -> Callable[[Fault, str], Awaitable[bool]]:
        return {
            "failpoint": self._failpoint,
            "kill": self._kill,
            "freeze": self._freeze,
            "kill-daemon": self._kill_daemon,
            "cut": lambda f, on: self._wires(f, self._cluster.wires_of(on), Proxy.cut),
            "stall": lambda f, on: self._wires(f, self._cluster.wires_of(on), Proxy.stall),
            "cut-wire": self._cut_wire,
            "etcd-kill": self._etcd_kill,
            "etcd-freeze": self._etcd_freeze,
            "take-over": self._take_over,
            "blobs-vanish": self._blobs_vanish,
            "blobs-corrupt": self._blobs_corrupt,
            "collect": lambda f, on: self.collect(on),
            "clock": self._clock,
        }[kind]

    # --- processes ---------------------------------------------------------------------------

    async def _kill(self, fault: Fault, on: str) -> bool:
        process = self._cluster.process(on)
        await process.kill()
        await asyncio.sleep(fault.seconds / 2)
        await process.start()
        return True

    async def _freeze(self, fault: Fault, on: str) -> bool:
        with _frozen(self._cluster.process(on)):
            await asyncio.sleep(fault.seconds)
        return True

    async def _kill_daemon(self, fault: Fault, on: str) -> bool:
        daemon = self._cluster.daemon(on)
        if daemon is None:
            return False
        with suppress(psutil.NoSuchProcess):
            daemon.kill()
        return True

    async def _etcd_kill(self, fault: Fault, on: str) -> bool:
        etcd = self._cluster.etcds[on]
        await etcd.stop(signal.SIGKILL)
        await asyncio.sleep(fault.seconds)
        await etcd.launch()
        return True

    async def _etcd_freeze(self, fault: Fault, on: str) -> bool:
        etcd = self._cluster.etcds[on]
        etcd.suspend()
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            etcd.resume()
        return True

    # --- wires -------------------------------------------------------------------------------

    async def _cut_wire(self, fault: Fault, on: str) -> bool:
        return await self._wires(fault, [self._cluster.wires[on, fault.detail]], Proxy.cut)

    async def _wires(self, fault: Fault, wires: list[Proxy], harm: Callable[[Proxy], None]) -> bool:
        for wire in wires:
            harm(wire)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            for wire in wires:
                wire.heal()
        return True

    # --- failpoints --------------------------------------------------------------------------

    async def _failpoint(self, fault: Fault, on: str) -> bool:
        name, _, action = fault.detail.partition(" ")
        if not name.startswith("coordinator.place"):
            return await self.at(on, name, action, fault.seconds)
        # Seldom reached by those who have an instance already: somebody comes who has none.
        guest = asyncio.create_task(self._workload.one_more(f"guest{fault.number}", on), name="guest")
        try:
            return await self.at(on, name, action, fault.seconds)
        finally:
            await guest

    async def at(
        self,
        target: str,
        name: str,
        action: str,
        seconds: float = 0.0,
        within: float = _REACHED,
        meanwhile: Callable[[], Awaitable[None]] | None = None,
    ) -> bool:
        """Arms a failpoint, and waits for it to be reached. What it did is mended after `seconds`, and after
        `meanwhile` if it was a stop. False: it was not reached `within` seconds, and is armed no more."""
        daemon = self._cluster.daemon(target)
        points = self._cluster.failpoints(target)
        if daemon is None or not points.ready:
            return False
        points.arm(name, action)
        try:
            await eventually(lambda: not points.armed(name), within)
        except AssertionError:
            return not points.disarm(name)
        if action == "stop":
            try:
                await asyncio.sleep(seconds)
                if meanwhile is not None:
                    await meanwhile()
            finally:
                with suppress(psutil.NoSuchProcess):
                    daemon.send_signal(signal.SIGCONT)
        elif action == "kill" and target in COORDINATORS:
            process = self._cluster.process(target)
            await process.wait(10.0)
            await asyncio.sleep(seconds / 4)
            await process.start()
        return True

    async def _take_over(self, fault: Fault, on: str) -> bool:
        number = fault.number
        return await self.take_over(fault.target, on, used=number % 2 == 0, lost=number % 4 < 2)

    async def take_over(self, user: str, owner: str, used: bool, lost: bool) -> bool:
        """The owner stops just before its commit call, until the instance is another node's; then it wakes,
        and goes on with its commit. `used`: a turn was committed meanwhile. `lost`: it stood still for longer
        than its TTL; else a client just said that it does not answer, and its link lives."""

        async def meanwhile() -> None:
            deadline = asyncio.get_running_loop().time() + TTL * 3
            while not await self.give_away(user, owner):
                if asyncio.get_running_loop().time() > deadline:
                    return
                await asyncio.sleep(0.1)
            if used:
                await self._workload.one_more(user)

        point, seconds = "node.commit.before_call", TTL if lost else 0.0
        return await self.at(owner, point, "stop", seconds, within=2.0, meanwhile=meanwhile)

    async def owner(self, user: str) -> str | None:
        try:
            instance = await self._cluster.mesh().instance(AGENT, user)
        except Exception:  # whatever is wrong with the mesh just now
            return None
        return instance.node if instance else None

    async def give_away(self, user: str, owner: str) -> bool:
        """Resolves as a client does whose node failed it. Is it another's now?"""
        key = common_pb2.InstanceKey(tenant="default", agent=AGENT, user=user)
        request = resolver_pb2.ResolveRequest(key=key, exclude=[owner])
        for name in self._cluster.coordinators:
            async with rpc.channel(self._cluster.wires[CLIENT, name].address) as channel:
                try:
                    reply = await resolver_pb2_grpc.ResolverStub(channel).Resolve(request, timeout=2.0)
                    return bool(reply.node != owner)
                except Exception:  # the other one may know
                    continue
        return False

    async def collect(self, coordinator: str) -> bool:
        """A whole round of collecting, by this one."""
        async with rpc.channel(self._cluster.wires[CLIENT, coordinator].address) as channel:
            call = state_pb2_grpc.StateStub(channel).Collect(state_pb2.CollectRequest(), timeout=_COLLECTING)
            try:
                return [report async for report in call][-1].round > 0
            except grpc.aio.AioRpcError:  # another is at it, or has just been killed
                return False

    # --- the blob store, and clocks ----------------------------------------------------------

    async def _blobs_vanish(self, fault: Fault, on: str) -> bool:
        """As a disk that is not mounted."""
        away = self._cluster.blobs.with_suffix(".away")
        if not self._cluster.blobs.exists():
            return False
        self._cluster.blobs.rename(away)
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            _put_back(away, self._cluster.blobs)
        return True

    async def _blobs_corrupt(self, fault: Fault, on: str) -> bool:
        """A bit flips in the newest blobs, and flips back, wherever a round of collecting moves them."""
        with ExitStack() as stack:
            newest = []
            for path in _newest(self._cluster.blobs.glob("chunks/*/*"), 10):
                with suppress(FileNotFoundError):  # moved just now
                    newest.append(stack.enter_context(path.open("r+b", buffering=0)))
            for file in newest:
                _flip(file)
            try:
                await asyncio.sleep(fault.seconds)
            finally:
                for file in newest:
                    _flip(file)
            return bool(newest)

    async def _clock(self, fault: Fault, on: str) -> bool:
        file = self._cluster.clock_file(on)
        file.write_text(fault.detail + "\n")
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            file.unlink(missing_ok=True)
        return True


@contextmanager
def _frozen(process: Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def _put_back(away: Path, blobs: Path) -> None:
    """A coordinator that was started meanwhile, or was just about to write, has made another: what it stored
    there is kept."""
    while True:
        with suppress(OSError):  # it is not empty
            away.rename(blobs)
            return
        for path in sorted(blobs.rglob("*")):
            to = away / path.relative_to(blobs)
            with suppress(FileNotFoundError):  # it has just got its own name
                if path.is_dir():
                    to.mkdir(exist_ok=True)
                else:
                    path.rename(to)
        for path in sorted(blobs.rglob("*"), reverse=True):
            with suppress(OSError):
                path.rmdir()


def _newest(paths: Iterable[Path], count: int) -> list[Path]:
    """Files, some of which may be moved away meanwhile."""
    times = {}
    for path in paths:
        with suppress(FileNotFoundError):
            if path.is_file():
                times[path] = path.stat().st_mtime
    return sorted(times, key=lambda path: times[path])[-count:]


def _flip(file: FileIO) -> None:
    """The last bit."""
    file.seek(-1, os.SEEK_END)
    last = file.read(1)
    file.seek(-1, os.SEEK_END)
    file.write(bytes([last[0] ^ 1]))

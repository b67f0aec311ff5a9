"""Jails that are made, talk and go, again and again: nothing grows.

Counted exactly, at the end against the end of a warm-up: processes, control groups, mounts, and descriptors
of the jailer, the wright, the zygote and this client. Memory is compared with a tolerance, for an interpreter
goes on for a while to take more (2,000 tuples of each size that it keeps for later, the gaps between what it
uses): the jailer has taken 1 to 1.5 MiB more after 2,000 cycles, and 0.1 more after the 2,000 that follow.
It may have 2. Over the 1,800 cycles of the long test that is 1,165 bytes a cycle; the queues of the one wire
that it has to each jail are 1,500. The wright and the zygote only fork, and may have pages that they shared
before: a quarter of a MiB.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from edge_agent.jail.api import JailSpec, Zygote
from edge_agent.jail.python import base_interpreter
from tests.support.eventually import eventually
from tests.support.jailer import LIMITS, RunningJailer, python, spec

_SAYS = 'while True:\n    said = recv(); open("/state/said", "ab").write(said * 1000); send(said)'
_TASK = (base_interpreter(), "-I", "-S", "-c", "open('said', 'wb').write(b'hello' * 1000); print('hello')")
_MOST_KIB = {"jailer": 2048, "wright": 256, "zygote": 256}


@dataclass(frozen=True)
class Counts:
    processes: int
    groups: int
    mounts: int
    descriptors: tuple[int, ...]


@dataclass
class Cycles:
    jailer: RunningJailer
    zygote: Zygote

    async def one(self, number: int) -> None:
        ways: tuple[Callable[[str], Awaitable[None]], ...] = (self._executed, self._forked, self._task)
        await ways[number % 3](f"jail-{number}")

    async def _executed(self, jail_id: str) -> None:
        await self._talk(spec(jail_id, python(_SAYS)))

    async def _forked(self, jail_id: str) -> None:
        await self._talk(JailSpec(jail_id, "v2", ("/none",), {}, LIMITS, self.zygote.jail_id))

    async def _talk(self, wanted: JailSpec) -> None:
        jail = await self.jailer.jails.make(wanted)
        await jail.start()
        await jail.send(b"hello")
        assert await jail.receive() == b"hello"
        assert [entry.path for entry in await jail.files.scan()] == ["said"]
        await jail.kill()
        await self.jailer.jails.discard(wanted.jail_id)

    async def _task(self, jail_id: str) -> None:
        task = await self.jailer.jails.task(spec(jail_id, _TASK))
        output, errors = await task.begin()
        assert await task.wait(20.0) == 0
        assert [entry.path for entry in await task.files.scan()] == ["said"]
        await task.kill()
        assert [_all_of(fd) for fd in (output, errors)] == [b"hello\n", b""]

    def pids(self) -> dict[str, int]:
        wright = self.jailer.child_named("roost-wright")
        assert wright is not None
        zygote = min(self.jailer.members(self.zygote.jail_id))  # its spare child came later
        return {"jailer": self.jailer.process.pid, "wright": wright.pid, "zygote": zygote}

    async def counts(self) -> Counts:
        """When the shell that the last fork leaves is built, and waits."""
        await eventually(lambda: len(self.jailer.shells()) == 1, 10.0, "a shell waits")
        gc.collect()
        pids = self.pids()
        return Counts(
            len({*self.jailer.jailed(), *self.jailer.forked_only()}),
            len(self.jailer.cgroups()),
            sum(map(_mounts, pids.values())),
            tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in (*pids.values(), os.getpid())),
        )

    def memory_kib(self) -> dict[str, int]:
        return {who: psutil.Process(pid).memory_info().rss >> 10 for who, pid in self.pids().items()}


def _all_of(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def _mounts(pid: int) -> int:
    return len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())


async def _cycle(jailer: RunningJailer, warm_up: int, count: int) -> None:
    cycles = Cycles(jailer, await jailer.zygote("v2", _SAYS))
    for number in range(warm_up):
        await cycles.one(number)
    before, memory = await cycles.counts(), cycles.memory_kib()
    began = time.monotonic()
    for number in range(warm_up, count):
        await cycles.one(number)
    took = time.monotonic() - began
    after, later = await cycles.counts(), cycles.memory_kib()
    print(f"{count} cycles; {1000 * took / (count - warm_up):.1f} ms each; KiB: {memory} then {later}")
    assert after == before
    grown = {who: later[who] - memory[who] for who in later}
    assert all(grown[who] <= _MOST_KIB[who] for who in grown), grown
    assert os.listdir(jailer.data_dir / "jails") == [cycles.zygote.jail_id]


async def test_150_cycles_leave_nothing(jailer: RunningJailer) -> None:
    await _cycle(jailer, 30, 150)


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
async def test_2000_cycles_leave_nothing(jailer: RunningJailer) -> None:
    await _cycle(jailer, 200, 2000)

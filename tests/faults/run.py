"""Faults, many, and then a verdict: `python -m tests.faults.run [--faults N] [--seed S]`.

Clients work while faults are injected, a few at a time. Now and then all faults end, and every user must get
an answer soon. At the end everything is read, and the history is judged; if something is wrong, history and
logs are kept. Exit code 0: nothing is wrong; 1: something is, and the seed with which to look again.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import checker
from tests.faults.checker import Violation
from tests.faults.cluster import FULL, REAL, TTL, Cluster, Programs, Size, running_cluster_of
from tests.faults.history import History
from tests.faults.nemesis import Nemesis
from tests.faults.observer import observing
from tests.faults.plan import Fault, draw
from tests.faults.schedules import broken
from tests.faults.variants import VARIANTS
from tests.faults.workload import Workload
from tests.support import failpoints

AT_ONCE = 3  # faults under way
_CALM_EVERY = 15  # faults
RECOVERY_SECONDS = 30.0  # within which each user must get an answer once all faults have ended


@dataclass
class Result:
    history: History
    violations: list[Violation] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)  # failpoints that were reached
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_recovery: float = 0.0

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.injected.items()))
        points = ", ".join(f"{name} {n}" for name, n in sorted(self.points.items()))
        answers = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.outcomes.items()))
        lines = [
            f"{self.injected.total()} faults: {kinds}",
            f"{len(self.points)} of {len(failpoints.ALL)} failpoints were reached: {points}",
            f"{self.outcomes.total()} operations: {answers}; {len(self.history.held)} records in etcd",
            f"slowest recovery: {self.slowest_recovery:.1f} s",
            *(f"VIOLATION {violation}" for violation in self.violations[:20]),
            f"{len(self.violations)} violations",
        ]
        return "\n".join(lines)


class Run:
    def __init__(self, cluster: Cluster, seed: int, say: Callable[[str], None]) -> None:
        self.workload = Workload(cluster, seed)
        self.nemesis = Nemesis(cluster, self.workload)
        self.result = Result(self.workload.history, outcomes=self.workload.outcomes)
        self._cluster = cluster
        self._seed = seed
        self._say = say
        self._began = time.monotonic()
        self._under_way: set[asyncio.Task[None]] = set()
        self._mistake: BaseException | None = None  # of this harness

    async def inject(self, count: int, stop: asyncio.Event) -> None:
        """Until `count` faults have come about, or `stop`."""
        room = asyncio.Semaphore(AT_ONCE)
        for fault in draw(self._seed, TTL):
            if self.result.injected.total() + len(self._under_way) >= count:
                await self._settle()
            if self._mistake is not None:
                raise self._mistake
            if self.result.injected.total() >= count or stop.is_set():
                break
            await room.acquire()
            task = asyncio.create_task(self._one(fault, room), name=str(fault))
            self._under_way.add(task)
            task.add_done_callback(self._ended)
            await asyncio.sleep(fault.pause)
            if fault.number % _CALM_EVERY == 0:
                await self.calm()
        await self.calm()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._mistake = self._mistake or (None if task.cancelled() else task.exception())

    async def _one(self, fault: Fault, room: asyncio.Semaphore) -> None:
        try:
            came_about = await self.nemesis.do(fault)
        finally:
            room.release()
        if came_about:
            self.result.injected[fault.kind] += 1
            if fault.kind == "failpoint":
                self.result.points[fault.detail.partition(" ")[0]] += 1
        note = "" if came_about else " (not reached)"
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.workload.outcomes.items()))
        seconds = time.monotonic() - self._began
        self._say(f"[{self.result.injected.total():3} {seconds:5.0f} s; {counts}] {fault}{note}")

    async def _settle(self) -> None:
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def calm(self) -> None:
        """All faults end, and each user gets an answer to something."""
        await self._settle()
        await self._cluster.heal()
        began = time.monotonic()
        for user in await self.workload.until_all_answer(RECOVERY_SECONDS):
            what = f"no answer for {RECOVERY_SECONDS:g} s after all faults had ended"
            self.result.violations.append(Violation("stuck", user, what))
        took = time.monotonic() - began
        self.result.slowest_recovery = max(self.result.slowest_recovery, took)
        self._say(f"calm; each user had an answer within {took:.1f} s")


async def run(
    directory: Path,
    faults: int,
    seed: int,
    say: Callable[[str], None] = print,
    programs: Programs = REAL,
    size: Size = FULL,
) -> Result:
    """A whole run. SIGINT ends the faults early, and what came before is judged; a second one ends it all."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        async with running_cluster_of(directory, programs, size) as cluster:
            run = Run(cluster, seed, say)
            endpoints = [etcd.endpoint for etcd in cluster.etcds.values()]
            async with observing(endpoints, run.workload.history) as observer:
                async with run.workload.running():
                    await run.inject(faults, stop)
                await run.workload.read_all(RECOVERY_SECONDS)
                await observer.caught_up(10.0)
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    run.result.violations += checker.check(run.workload.history)
    return run.result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    parser.add_argument("--plan", action="store_true", help="print the plan, and do nothing")
    parser.add_argument("--variant", choices=VARIANTS, help="with this planted bug, which should be noticed")
    parser.add_argument("--keep", type=Path, help="a directory for history, plan and logs")
    arguments = parser.parse_args()
    plan = itertools.islice(draw(arguments.seed, TTL), arguments.faults)
    if arguments.plan:
        print(*(f"{fault.number:4} {fault}" for fault in plan), sep="\n")
        return 0
    directory = Path(tempfile.mkdtemp(prefix="roost-faults-", dir=arguments.keep))
    directory.chmod(0o755)
    print(f"seed {arguments.seed}; Ctrl-C ends it early, and judges what there was", flush=True)
    began = time.monotonic()
    programs = broken(arguments.variant) if arguments.variant else REAL
    result = asyncio.run(
        run(directory, arguments.faults, arguments.seed, lambda text: print(text, flush=True), programs)
    )
    print(result)
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    if result.violations:
        again = f"--seed {arguments.seed} --faults {arguments.faults}"
        result.history.save(directory / "history.jsonl")
        print(f"history and logs: {directory}\nagain: make test-faults ARGS='{again}'")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())

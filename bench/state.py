"""State: what a commit costs beside a bare etcd transaction, how its cost grows with the state beside borg,
and how soon an instance that slept speaks again. Through a whole mesh: etcd, a coordinator, two nodes, real
jails, and a user's program; blobs in a directory.

Figures, each with .p10_ms, .p50_ms and .p90_ms: commit (from the first text of a reply to its committed mark,
1 KB changed) and etcd_txn (the bare transaction of the same sizes, made after each of those);
commit_SIZE_1pct with 1 % of 1,000 files changed, SIZE 1mb, 10mb, 100mb, 1gb, and borg_SIZE_1pct of the same;
commit_SIZE_1mb with 1 MB changed in files of 1 MB; resume_same_node (from the message to the first text, by a
client that stayed attached; resume_same_node_anew: by one that resolves and attaches) and
resume_other_node_10mb and _300mb, of which one file is opened. Ratios: commit_by_etcd_txn,
growth_same_change, growth_1pct, borg_by_commit_1gb_1pct.

COMMITS, RESUMES, REPEATS and MOST_MB in the environment (default 100, 20, 5 and 1000) make it shorter.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench.jails.figures import Figures
from bench.jails.place import place
from bench.states import peers, turns
from bench.states.figures import ratios, verdicts
from coordinator.store.etcd import open_etcd
from roost.client import AsyncClient
from tests.support.mesh import running_mesh

_TTL = 30.0  # seconds: a machine that does nothing but write is slow in all else
_FILES = 1000
_SIZES = {"1mb": 1, "10mb": 10, "100mb": 100, "1gb": 1000}  # MB
_LARGE_MB = 300  # of a state that wakes elsewhere: most of it comes after the first text
_MB = 1 << 20


@dataclass
class _Bench:
    directory: Path
    commits: int
    resumes: int
    repeats: int
    most_mb: int
    figures: Figures = field(default_factory=dict)

    async def run(self) -> None:
        async with (
            running_mesh(self.directory / "mesh", [turns.HERE, turns.THERE], ttl=_TTL) as mesh,
            mesh.client(turns.HERE.position) as client,
        ):
            await mesh.deploy(turns.DIRECTORY)
            await turns.warm(mesh, client, turns.HERE.name)
            async with open_etcd([mesh.etcd.endpoint]) as store:
                await self._part("small commits", partial(turns.small_commits, client, store, self.commits))
            await self._part("sleep and wake", partial(turns.resume_here, mesh, client, self.resumes))
            for mb, count in ((10, self.resumes), (_LARGE_MB, self.repeats)):
                if mb <= self.most_mb:
                    elsewhere = partial(turns.resume_elsewhere, mesh, client, count, mb)
                    await self._part(f"wake elsewhere, {mb} MB", elsewhere)
            for name, size in _SIZES.items():
                if size <= self.most_mb:
                    await self._part(f"1 % of {name}", partial(self._one_percent, client, name, size))
                if 10 <= size <= min(100, self.most_mb):
                    await self._part(f"1 MB of {name}", partial(self._one_mb, client, name, size))
        self.figures |= ratios(self.figures)

    async def _part(self, what: str, measure: Callable[[], Awaitable[Figures]]) -> None:
        began = time.monotonic()
        found = await measure()
        self.figures |= found
        medians = ", ".join(f"{n.removesuffix('.p50_ms')} {v:.2f}" for n, v in found.items() if ".p50" in n)
        print(
            f"{time.strftime('%H:%M:%S')} {what}: {medians} ms  ({time.monotonic() - began:.0f} s)",
            flush=True,
        )

    async def _one_percent(self, client: AsyncClient, name: str, mb: int) -> Figures:
        """The same files for both, and commits and snapshots in turn."""
        size, changed = mb * _MB // 1000, _FILES // 100
        borg = peers.Borg(self.directory / f"borg-{name}") if peers.Borg.there() else None
        files = self.directory / f"files-{name}"
        commits: list[float] = []
        snapshots: list[float] = []
        if borg is not None:
            await borg.init()
            await asyncio.to_thread(peers.write, files, 0, _FILES, size)
            await borg.snapshot(files)
        async with client.attach(turns.AGENT, f"one-percent-{name}") as chat:
            await turns.fill(chat, _FILES, size)
            for number in range(self.repeats):
                waited = await turns.turn(chat, f"write {number * changed} {changed} {size}")
                commits.append(waited.commit)
                if borg is not None:
                    await asyncio.to_thread(peers.write, files, number * changed, changed, size)
                    snapshots.append(await borg.snapshot(files))
            found = turns.spread(f"commit_{name}_1pct", commits)
            if size == _MB:  # they are of the right size
                seconds = await turns.changes(chat, _FILES, size, 1, self.repeats)
                found |= turns.spread(f"commit_{name}_1mb", seconds)
        return found | (turns.spread(f"borg_{name}_1pct", snapshots) if borg is not None else {})

    async def _one_mb(self, client: AsyncClient, name: str, mb: int) -> Figures:
        async with client.attach(turns.AGENT, f"one-mb-{name}") as chat:
            await turns.fill(chat, mb, _MB)
            seconds = await turns.changes(chat, mb, _MB, 1, self.repeats)
        return turns.spread(f"commit_{name}_1mb", seconds)


def _report(figures: Figures) -> None:
    print(f"\n{'ms':<28}{'p10':>10}{'p50':>10}{'p90':>10}")
    for name in [n.removesuffix(".p50_ms") for n in figures if n.endswith(".p50_ms")]:
        print(
            f"  {name:<26}"
            + "".join(f"{figures[f'{name}.{key}_ms']:>10.2f}" for key in ("p10", "p50", "p90"))
        )
    print("\nothers")
    for name, value in figures.items():
        if not name.endswith("_ms"):
            print(f"  {name:<34}{value:>10.2f}")
    print("\ntargets")
    for name, value, target, met in verdicts(figures):
        print(f"  {name:<34}{value:>10.2f}  {target:<8}{'' if met else '  NOT MET'}")


async def _until_told(bench: _Bench) -> None:
    """SIGTERM ends it as Ctrl-C does: with nothing left behind."""
    running = asyncio.create_task(bench.run(), name="bench")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


def _number(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def main(data: Path) -> Figures:
    with place() as directory:
        bench = _Bench(
            directory,
            commits=_number("COMMITS", 100),
            resumes=_number("RESUMES", 20),
            repeats=_number("REPEATS", 5),
            most_mb=_number("MOST_MB", 1000),
        )
        if not peers.Borg.there():
            print("borg is left out: it is not installed (Debian's package borgbackup)")
        try:
            asyncio.run(_until_told(bench))
        except asyncio.CancelledError:
            raise SystemExit("told to end") from None
    _report(bench.figures)
    return bench.figures

"""Nodes of real parts, with etcd and a coordinator: what a user waits for, and what many instances take."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from bench.jails.figures import Figures, percentile
from bench.jails.memory import MB, available, live_jails, pids_of_jails, pss
from bench.jails.node import WAYS, Node
from bench.jails.starts import MESSAGE
from roost.client import AsyncClient
from shared.errors import RoostError
from tests.support.mesh import Mesh, NodeSpec, running_mesh

NODE = NodeSpec("edge", memory="1000000G", cpu=1e6, pids=1_000_000_000)
AGENT = "assistant"
_TTL = 30.0  # seconds; a machine that does nothing but start agents is slow in all else
_AT_ONCE = 4  # users that come at the same time
_TURN_SECONDS = 120.0
_SETTLE_SECONDS = 3.0


async def end_to_end(directory: Path, agent: Path, count: int) -> Figures:
    """What a user's program sees of a first turn, all included: to the first text, and to the commit."""
    figures: Figures = {}
    async with running_mesh(directory, [NODE], ttl=_TTL) as mesh, mesh.client() as client:
        for way in WAYS:
            name = f"{way}-only"
            await mesh.deploy(agent, name=f'"{name}"', start=f'"{way}"')
            await _warm(mesh, client, name)
            first: list[float] = []
            committed: list[float] = []
            for i in range(count):
                text, end = await _turn(client, name, f"user-{i}")
                first.append(text * 1000)
                committed.append(end * 1000)
                await asyncio.sleep(0.2)  # for the pool to follow
            figures[f"{way}.e2e_p50_ms"] = percentile(first, 0.5)
            figures[f"{way}.e2e_p99_ms"] = percentile(first, 0.99)
            figures[f"{way}.e2e_committed_p50_ms"] = percentile(committed, 0.5)
            print(f"  {way}: {first_line(figures, way)}", flush=True)
    return figures


def first_line(figures: Figures, way: str) -> str:
    return (
        f"first text {figures[f'{way}.e2e_p50_ms']:.1f} ms, "
        f"committed {figures[f'{way}.e2e_committed_p50_ms']:.1f} ms (p50)"
    )


async def _turn(client: AsyncClient, agent: str, user: str) -> tuple[float, float]:
    """Seconds to the first text, and to the committed reply."""
    began = time.perf_counter()
    first = 0.0
    async with client.attach(agent, user) as chat:
        async for _ in chat.stream(MESSAGE, timeout=_TURN_SECONDS):
            first = first or time.perf_counter() - began
    return first, time.perf_counter() - began


async def _warm(mesh: Mesh, client: AsyncClient, agent: str) -> None:
    """Until there is a zygote, if there is to be one; these users are executed meanwhile."""
    for i in itertools.count():
        await _turn(client, agent, f"early-{i}")
        log = mesh.nodes[NODE.name].log()
        if agent.startswith("exec") or f"{agent}/early-{i}: exec," not in log:
            return
        await asyncio.sleep(1.0)


async def live(directory: Path, agent: Path, counts: Sequence[int]) -> Figures:
    """Instances that have served a turn and are idle, so many of them; and what the node's own take."""
    figures: Figures = {}
    before = available()
    async with running_mesh(directory, [NODE], ttl=_TTL) as mesh, mesh.client() as client:
        await mesh.deploy(agent, name=f'"{AGENT}"')
        await _warm(mesh, client, AGENT)
        executed = {tuple(jail) for jail in live_jails(mesh, NODE.name, AGENT)}
        done = 0
        for count in counts:
            failed = await _users(client, range(done, count))
            done = count
            await asyncio.sleep(_SETTLE_SECONDS)
            jails = [j for j in live_jails(mesh, NODE.name, AGENT) if tuple(j) not in executed]
            found = _measured(mesh, jails, count, before)
            figures |= found | {f"live_failed.{count}": float(failed)}
            ways = Counter(_ways(mesh.nodes[NODE.name].log()))
            print(f"  {count} live ({failed} failed; {dict(ways)}): {_line(found)}", flush=True)
    return figures


async def _users(client: AsyncClient, users: Iterable[int]) -> int:
    """One turn of each; how many failed."""
    coming = iter(users)
    failed = 0

    async def some() -> None:
        nonlocal failed
        for user in coming:
            try:
                await _turn(client, AGENT, f"user-{user}")
            except RoostError as error:
                failed += 1
                print(f"  user {user}: {error.message}", flush=True)

    await asyncio.gather(*(some() for _ in range(_AT_ONCE)))
    return failed


def _ways(log: str) -> Iterable[str]:
    for line in log.splitlines():
        for way in WAYS:
            if f": {way}, " in line:
                yield way


def _measured(mesh: Mesh, jails: list[list[int]], count: int, before: float) -> Figures:
    jailer = psutil.Process(mesh.nodes[NODE.name].pid)
    files = [child for child in jailer.children() if child.name() == "roost-files"]
    return {
        f"pss_mb.{count}": pss(itertools.chain(*jails)) / len(jails),
        f"daemon_rss_mb.{count}": mesh.daemon(NODE.name).memory_info().rss / MB,
        f"jailer_rss_mb.{count}": jailer.memory_info().rss / MB,
        f"files_rss_mb.{count}": sum(each.memory_info().rss for each in files) / MB,
        f"machine_mb.{count}": (before - available()) / count,
    }


async def parked(node: Node, counts: Sequence[int]) -> Figures:
    """Jails that wait for a user, so many of them cold; and those that are warm beside them."""
    figures: Figures = {}
    await node.contender("parked").ready(1)
    await node.stop()
    for count in counts:
        cold, warm = await node.park(count)
        await asyncio.sleep(_SETTLE_SECONDS)
        found = {f"pss_parked_mb.{count}": _pss_each(node, cold), "pss_warm_mb": _pss_each(node, warm)}
        figures |= found
        print(f"  {len(cold)} cold, {len(warm)} warm: {_line(found)}", flush=True)
    return figures


def _pss_each(node: Node, jail_ids: Sequence[str]) -> float:
    jails = pids_of_jails(node.jailer.data_dir / "jails" / jail_id / "state" for jail_id in jail_ids)
    return pss(itertools.chain(*jails)) / len(jails)


def _line(figures: Figures) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in figures.items())

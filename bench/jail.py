"""Starts and memory of jails, beside other sandboxes: one agent, made with a framework that takes a second to
import, is started afresh again and again, and each time its first reply is waited for.

Figures: WAY.p50_ms, p95_ms, p99_ms and success (0 to 1) of starts one after another, WAY.staggered.* and
WAY.burst.* of the other patterns, for each of parked, zygote, exec (at the node) and bwrap, runc, podman,
sandlock; WAY.loop_p50_ms with the framework's agent loop around the model; WAY.e2e_* through a mesh;
pss_parked_mb.N, pss_mb.N, machine_mb.N an instance, and daemon_rss_mb.N, jailer_rss_mb.N, files_rss_mb.N (of
the file service), with N of them;
NAME.pss_mb for one of a peer.

Parked jails are of two ranks. Of a version, as many wait as were started within 30 s; as many of these are
warm as were started within 10 s, but at least two. The times of `parked` are of what demand has made;
pss_parked_mb.N is of N that wait cold, and pss_warm_mb of the few beside them that are next to be given away.

STARTS and INSTANCES in the environment (default 100 and 100,1000,3000) make it shorter.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.jails.bundle import assemble
from bench.jails.figures import SEQUENTIAL, Figures, faster, prefix_of, summary, verdicts
from bench.jails.growth import end_to_end, live, parked
from bench.jails.memory import pss
from bench.jails.node import WAYS, Node, running_node
from bench.jails.peers import Peer, peers
from bench.jails.place import place
from bench.jails.plot import draw
from bench.jails.starts import AT_ONCE, LOOP_MESSAGE, PERIOD, Contender, Failed, Patterns
from shared.bundle import pack

_OUT = Path(__file__).parent / "out"
_PATTERNS = [SEQUENTIAL, "staggered", "burst"]
_E2E_STARTS = 30
_PEERS_AT_ONCE = 5  # whose memory is taken together
_PARKED_AT_MOST = 1000


@dataclass
class _Bench:
    directory: Path
    agent: Path
    starts: int
    instances: list[int]
    figures: Figures = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    async def run(self) -> None:
        await self._ours()
        await self._peers()
        say("a whole mesh, through the client")
        self.figures |= await end_to_end(self.directory / "mesh", self.agent, min(self.starts, _E2E_STARTS))
        say(f"{self.instances} live instances on a node")
        self.figures |= await live(self.directory / "many", self.agent, self.instances)
        self.figures |= faster(self.figures)

    async def _ours(self) -> None:
        bundle, policy = pack(self.agent), (self.agent / "agent.toml").read_text()
        async with running_node(policy, bundle, self.directory / "node") as node:
            for way in WAYS:
                contender = node.contender(way)
                await self._patterns(contender)
                with_loop = await Patterns(self.starts).sequential(contender, LOOP_MESSAGE)
                looped = summary(way, SEQUENTIAL, with_loop)
                self.figures |= {f"{way}.loop_p50_ms": looped.get(f"{way}.p50_ms", float("nan"))}
            await self._parked(node)

    async def _parked(self, node: Node) -> None:
        counts = [count for count in self.instances if count <= _PARKED_AT_MOST]
        say(f"{counts} parked jails on a node")
        self.figures |= await parked(node, counts)

    async def _peers(self) -> None:
        found, missing = peers(self.agent, self.directory)
        for name, why in missing.items():
            print(f"{name} is left out: {why}", flush=True)
        for peer in found:
            try:
                await (await peer.start()).end()
            except Failed as error:
                print(f"{peer.name} is left out, as it does not run here: {error}", flush=True)
            else:
                await self._patterns(peer)
                await self._memory(peer)

    async def _patterns(self, contender: Contender) -> None:
        self.names.append(contender.name)
        for pattern in _PATTERNS:
            patterns = Patterns(self.starts)
            began = time.monotonic()
            took = await getattr(patterns, pattern)(contender)
            found = summary(contender.name, pattern, took)
            self.figures |= found
            print(f"  {_row(found, prefix_of(contender.name, pattern))} {contender.remark()}"
                  f"  ({time.monotonic() - began:.0f} s)", flush=True)  # fmt: skip
            for why in sorted(set(patterns.failures))[:3]:
                print(f"    {why}", flush=True)

    async def _memory(self, peer: Peer) -> None:
        started = [await peer.start() for _ in range(_PEERS_AT_ONCE)]
        self.figures[f"{peer.name}.pss_mb"] = sum(pss(one.pids()) for one in started) / len(started)
        for one in started:
            await one.end()


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _row(figures: Figures, prefix: str) -> str:
    times = (figures.get(f"{prefix}.{key}", float("nan")) for key in ("p50_ms", "p95_ms", "p99_ms"))
    return f"{prefix:<18}" + "".join(f"{ms:>10.2f}" for ms in times) + f"{figures[f'{prefix}.success']:>9.2f}"


def _report(bench: _Bench) -> None:
    print(f"\n{'first reply, ms':<20}{'p50':>10}{'p95':>10}{'p99':>10}{'success':>9}")
    for name in bench.names:
        for pattern in _PATTERNS:
            print(f"  {_row(bench.figures, prefix_of(name, pattern))}")
    rows = {prefix_of(name, pattern) for name in bench.names for pattern in _PATTERNS}
    print("\nothers")
    for name, value in bench.figures.items():
        if name.rpartition(".")[0] not in rows or name.endswith((".pss_mb", ".loop_p50_ms")) or "e2e" in name:
            print(f"  {name:<34}{value:>10.2f}")
    print("\ntargets")
    for name, value, target, met in verdicts(bench.figures):
        print(f"  {name:<34}{value:>10.2f}  {target:<8}{'' if met else '  NOT MET'}")


async def _until_told(bench: _Bench) -> None:
    """SIGTERM ends it as Ctrl-C does: with nothing left behind."""
    running = asyncio.create_task(bench.run(), name="bench")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


def main(data: Path) -> Figures:
    starts = int(os.environ.get("STARTS", "100"))
    instances = sorted(int(n) for n in os.environ.get("INSTANCES", "100,1000,3000").split(","))
    say(f"{starts} starts a pattern: one after another, one each {PERIOD * 1000:g} ms, {AT_ONCE} at once")
    with place() as directory:
        bench = _Bench(directory, assemble(directory), starts, instances)
        try:
            asyncio.run(_until_told(bench))
        except asyncio.CancelledError:
            raise SystemExit("told to end") from None
    _report(bench)
    _OUT.mkdir(exist_ok=True)
    files = [_OUT / "jail.png", _OUT / "jail.svg"]
    if draw(bench.figures, bench.names, _PATTERNS, files):
        print(f"drawn in {files[0]}")
    else:
        print("nothing is drawn: matplotlib is not installed")
    return bench.figures

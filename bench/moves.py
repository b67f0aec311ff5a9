"""How long an instance that moves can take no turn, on loopback with real nodes, as `roost move` reports it:
from the moment when no turn can begin on the source to the one when the target is ready.

Beside it how long a turn takes whose instance was just taken from its node, with nothing prepared (`cold`).

Figures: NAME.p50_ms, NAME.p95_ms, for pause_1mb, pause_10mb, cold_1mb, cold_10mb (the turn's whole time).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from statistics import quantiles

from protos.v1 import admin_pb2, admin_pb2_grpc
from roost.client import AsyncChat
from shared import rpc
from tests.support.mesh import AGENTS, NORTH, SOUTH, Mesh, running_mesh

_MOVES = 20
_SIZES = (1, 10)  # MB


def main(data: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="roost-moves-") as directory:
        taken = asyncio.run(_measure(Path(directory)))
    figures: dict[str, float] = {}
    print(f"{'':12}{'p50 ms':>10}{'p95 ms':>10}")
    for name, times in taken.items():
        cuts = quantiles(times, n=20, method="inclusive")
        figures[f"{name}.p50_ms"], figures[f"{name}.p95_ms"] = cuts[9], cuts[18]
        print(f"{name:12}{cuts[9]:10.1f}{cuts[18]:10.1f}")
    return figures


async def _measure(directory: Path) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {}
    async with running_mesh(directory, [NORTH, SOUTH]) as mesh:
        await mesh.deploy(AGENTS / "probe")
        async with mesh.client(NORTH.position) as client:
            for size in _SIZES:
                async with client.attach("probe", f"user-{size}") as chat:
                    await chat.send(f"fill much {size}")
                    taken[f"pause_{size}mb"] = [await _pause(mesh, chat, n) for n in range(_MOVES)]
                    taken[f"cold_{size}mb"] = [await _cold(mesh, chat, n) for n in range(_MOVES)]
    return taken


async def _pause(mesh: Mesh, chat: AsyncChat, number: int) -> float:
    where = (await chat.send(f"append {number}")).receipt.node
    target = "edge-south" if where == "edge-north" else "edge-north"
    request = admin_pb2.MoveRequest(key=chat.key.to_proto(), node=target)
    async with rpc.channel(mesh.addresses[0]) as channel:
        async for progress in admin_pb2_grpc.AdminStub(channel).Move(request, timeout=60.0):
            moved = progress.moved
    assert moved.target == target
    assert not moved.trouble
    return moved.pause_ms


async def _cold(mesh: Mesh, chat: AsyncChat, number: int) -> float:
    await chat.send(f"append {number}")
    await mesh.take_away("probe", chat.key.user)
    began = time.perf_counter()
    await chat.send("lines")
    return (time.perf_counter() - began) * 1000

"""Nodes of one LAN find each other by real multicast, between network namespaces on one bridge."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.etcd import DYING_WITH_PARENT
from tests.support.netns import Host, lan
from tests.support.process import ROOT


@asynccontextmanager
async def discovering(host: Host, node: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *DYING_WITH_PARENT,
        *host.enter,
        *(sys.executable, "-m", "tests.support.discovering", node, "home", f"{host.address}:7400"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def hears(process: asyncio.subprocess.Process, *expected: str, within: float = 10.0) -> None:
    assert process.stdout is not None
    last = b""
    try:
        async with asyncio.timeout(within):
            while json.loads(last or b"null") != list(expected):
                last = await process.stdout.readline()
                assert last, "it ended"
    except TimeoutError:
        raise AssertionError(f"heard {last.decode()}, not {expected}") from None


async def test_three_nodes_find_each_other_and_notice_one_that_leaves() -> None:
    async with lan(3) as (a, b, c):
        async with discovering(a, "edge-a") as first, discovering(b, "edge-b") as second:
            async with discovering(c, "edge-c") as third:
                await hears(first, "edge-b@home 10.99.0.2:7400", "edge-c@home 10.99.0.3:7400")
                await hears(second, "edge-a@home 10.99.0.1:7400", "edge-c@home 10.99.0.3:7400")
                await hears(third, "edge-a@home 10.99.0.1:7400", "edge-b@home 10.99.0.2:7400")
                third.send_signal(signal.SIGINT)  # a clean leave says goodbye
                await hears(first, "edge-b@home 10.99.0.2:7400")

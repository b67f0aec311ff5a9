"""A LAN for tests: network namespaces on one bridge, held by processes that end with this one, so that
nothing is left even when the test is killed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.support.etcd import DYING_WITH_PARENT


class Host:
    """A network namespace. `enter` is the command line prefix that runs something in it."""

    def __init__(self, pid: int, address: str) -> None:
        self.pid = pid
        self.address = address
        self.enter = ("nsenter", "--net", "-t", str(pid))

    async def run(self, *command: str) -> None:
        process = await asyncio.create_subprocess_exec(
            *self.enter, *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, f"{command}: {output.decode()}"


@asynccontextmanager
async def _namespace(address: str) -> AsyncIterator[Host]:
    holder = await asyncio.create_subprocess_exec(
        *DYING_WITH_PARENT,
        *("unshare", "--net", "sh", "-c", "echo ready; exec sleep 600"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        await holder.stdout.readline()
        host = Host(holder.pid, address)
        await host.run("ip", "link", "set", "lo", "up")
        yield host
    finally:
        holder.kill()
        await holder.wait()


@asynccontextmanager
async def lan(count: int) -> AsyncIterator[list[Host]]:
    """`count` hosts, 10.99.0.1 and on, that reach each other and nothing else."""
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(_namespace(""))
        await hub.run("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        await hub.run("ip", "link", "set", "br0", "up")
        hosts = []
        for i in range(1, count + 1):
            host = await stack.enter_async_context(_namespace(f"10.99.0.{i}"))
            await hub.run(
                *("ip", "link", "add", f"veth{i}", "type", "veth"),
                *("peer", "name", "eth0", "netns", str(host.pid)),
            )
            await hub.run("ip", "link", "set", f"veth{i}", "master", "br0", "up")
            await host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            await host.run("ip", "link", "set", "eth0", "up")
            await host.run("ip", "route", "add", "224.0.0.0/4", "dev", "eth0")
            hosts.append(host)
        yield hosts

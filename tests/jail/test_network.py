"""Sockets inside jails of every way to start, that the jailer makes, and against agents that spoil them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

import pytest

from edge_agent.jail.api import Jail, JailGone, JailSpec
from edge_agent.jail.jailed import JailedAgent
from edge_agent.jail.remote_network import RemoteNetwork
from shared.errors import RoostError
from tests.support.jailer import ECHO, LIMITS, RunningJailer, needs_root, python, spec

DIAL = """
while True:
    peer = socket.create_connection(("127.0.0.1", int(recv())), timeout=5)
    peer.sendall(b"hello")
    send(peer.recv(100))
"""
SERVE = """
listening = socket.create_server(("127.0.0.1", 4000))
send(b"served")
while True:
    peer, _ = listening.accept()
    peer.sendall(peer.recv(100))
    peer.close()
"""


async def _make(jailer: RunningJailer, way: str, code: str) -> Jail:
    if way == "exec":
        return await jailer.jails.make(spec("a", python(code)))
    zygote = await jailer.zygote("v2", code)
    return await jailer.jails.make(JailSpec("a", "v2", ("/none",), {}, LIMITS, zygote.jail_id))


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_the_daemon_serves_a_port_inside(jailer: RunningJailer, way: str) -> None:
    loop = asyncio.get_running_loop()
    jail = await _make(jailer, way, DIAL)
    async with asyncio.timeout(10.0):
        with await jail.listen(3128) as listening:
            await jail.start()
            await jail.send(b"3128")
            peer, address = await loop.sock_accept(listening)
            with peer:
                assert (address[0], await loop.sock_recv(peer, 100)) == ("127.0.0.1", b"hello")
                await loop.sock_sendall(peer, b"welcome")
            assert await jail.receive() == b"welcome"


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_the_daemon_reaches_a_port_inside(jailer: RunningJailer, way: str) -> None:
    loop = asyncio.get_running_loop()
    jail = await _make(jailer, way, SERVE)
    await jail.start()
    async with asyncio.timeout(20.0):
        assert await jail.receive() == b"served"
        for i in range(100):
            with await jail.connect(4000) as peer:
                await loop.sock_sendall(peer, b"%d" % i)
                assert await loop.sock_recv(peer, 100) == b"%d" % i


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_a_port_that_the_agent_took_is_not_given(jailer: RunningJailer, way: str) -> None:
    jail = await jailer.started(way, "a", SERVE)
    assert await jail.receive() == b"served"
    with pytest.raises(RoostError, match="in use") as refused:
        await jail.listen(4000)
    assert "listens there" in refused.value.hint


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_what_is_refused_says_why_and_the_jailer_is_back_where_it_was(
    jailer: RunningJailer, way: str
) -> None:
    jail = await jailer.started(way, "a", ECHO)
    with pytest.raises(ConnectionRefusedError, match="port 4000 inside"):
        await jail.connect(4000)
    for port in (0, -1, 65_536):
        with pytest.raises(RoostError, match="is no port"):
            await jail.connect(port)
    with await jail.listen(4000), await jail.connect(4000):
        assert _network_of(jailer.process.pid) == _network_of(os.getpid())
    await jail.kill()
    with pytest.raises(JailGone):
        await jail.listen(4000)


async def test_the_port_is_of_that_jail_alone(jailer: RunningJailer) -> None:
    task = await jailer.jails.task(spec("b", ("/bin/sleep", "60")))
    a = await jailer.started("zygote", "a", ECHO)
    with await task.listen(4000), pytest.raises(ConnectionRefusedError):
        await a.connect(4000)


@needs_root
async def test_a_jailer_that_can_not_leave_a_jails_network_ends() -> None:
    code = """
import os
from edge_agent.jail.network import Networks
from edge_agent.jail.protocol import Listen
null = os.open("/dev/null", os.O_RDONLY)
print("began", flush=True)
Networks(null).socket_in(os.getpid(), Listen("a", 4000))
print("went on", flush=True)
"""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    assert (output, process.returncode) == (b"began\n", -signal.SIGABRT)


def _network_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


@pytest.mark.parametrize("way", ["exec", "zygote"])
async def test_an_agent_that_does_not_accept_holds_up_only_who_calls_it(
    jailer: RunningJailer, way: str
) -> None:
    code = """
listening = socket.socket()
listening.bind(("127.0.0.1", 4000))
listening.listen(0)
send(b"deaf")
recv()
"""
    jail = await jailer.started(way, "a", code)
    assert await jail.receive() == b"deaf"
    assert isinstance(jail, JailedAgent)
    network = RemoteNetwork(jail.jail_id, jail._ask_jailer, connect_seconds=0.5)
    peers: list[socket.socket] = []

    async def fill_its_queue() -> None:
        for _ in range(4):
            peers.append(await network.connect(4000))

    with pytest.raises(TimeoutError, match="4000"):
        await fill_its_queue()
    assert await jail.files.scan() == [], "who serves its files goes on"
    for peer in peers:
        peer.close()

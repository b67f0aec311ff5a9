"""Sockets that init gives out, from jails of every way to start, and against agents that spoil them."""

from __future__ import annotations

import asyncio
import socket

import pytest

from edge_agent.jail.api import Jail, JailSpec
from edge_agent.jail.client import JailedAgent
from edge_agent.jail.remote_network import RemoteNetwork
from shared.errors import RoostError
from tests.support.jailer import LIMITS, RunningJailer, python, spec

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


async def test_a_port_that_the_agent_took_is_not_given(jailer: RunningJailer) -> None:
    jail = await jailer.started("exec", "a", SERVE)
    assert await jail.receive() == b"served"
    with pytest.raises(RoostError, match="in use") as refused:
        await jail.listen(4000)
    assert "listens there" in refused.value.hint


async def test_an_agent_that_does_not_accept_holds_up_only_who_calls_it(jailer: RunningJailer) -> None:
    code = """
listening = socket.socket()
listening.bind(("127.0.0.1", 4000))
listening.listen(0)
send(b"deaf")
recv()
"""
    jail = await jailer.started("exec", "a", code)
    assert await jail.receive() == b"deaf"
    assert isinstance(jail, JailedAgent)
    network = RemoteNetwork(jail._ask_init, connect_seconds=0.5)
    peers: list[socket.socket] = []

    async def fill_its_queue() -> None:
        for _ in range(4):
            peers.append(await network.connect(4000))

    with pytest.raises(TimeoutError, match="4000"):
        await fill_its_queue()
    assert await jail.files.scan() == [], "init goes on"
    for peer in peers:
        peer.close()

"""Sockets inside a jail's network, got from its init: the daemon's side of `edge_agent.jail.network`."""

from __future__ import annotations

import asyncio
import os
import socket

from edge_agent.jail import network
from edge_agent.jail.calls import CallFailed
from edge_agent.jail.remote_files import Ask
from shared.errors import Reason, RoostError

_SECONDS = 10.0  # init's answer


class RemoteNetwork:
    """`ask` sends a request to init; JailGone comes from there. `connect_seconds`: until who listens inside
    accepts."""

    def __init__(self, ask: Ask, connect_seconds: float = 5.0) -> None:
        self._ask = ask
        self._connect_seconds = connect_seconds

    async def listen(self, port: int) -> socket.socket:
        return await self._socket("listen", port)

    async def connect(self, port: int) -> socket.socket:
        sock = await self._socket("connect", port)
        try:
            await _connected(sock, port, self._connect_seconds)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _socket(self, do: str, port: int) -> socket.socket:
        try:
            answer = await self._ask({"do": do, "port": port}, _SECONDS)
        except CallFailed as failed:
            if failed.kind == network.REFUSED:
                raise ConnectionRefusedError(failed.message) from None
            hint = "something of the agent listens there" if failed.kind == network.IN_USE else failed.hint
            raise RoostError(Reason.JAIL_FAILED, failed.message, hint) from None
        (fd,) = answer.fds
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        return sock


async def _connected(sock: socket.socket, port: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(sock, writable.set)
    try:
        async with asyncio.timeout(seconds):
            await writable.wait()
    except TimeoutError:
        raise TimeoutError(f"whoever listens at port {port} inside did not accept in {seconds:g} s") from None
    finally:
        loop.remove_writer(sock)
    problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if problem:
        raise OSError(problem, f"port {port} inside: {os.strerror(problem)}")  # of the errno's own class

"""Sockets inside a jail's network, got from the jailer: the daemon's side of `edge_agent.jail.network`."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

from edge_agent.jail.calls import Answer
from edge_agent.jail.protocol import Connect, Listen
from shared.errors import Reason, RoostError

Ask = Callable[[Listen | Connect], Awaitable[Answer]]


class RemoteNetwork:
    """`ask` sends a request to the jailer; JailGone and RoostError come from there. `connect_seconds`: until
    who listens inside accepts."""

    def __init__(self, jail_id: str, ask: Ask, connect_seconds: float = 5.0) -> None:
        self._jail_id = jail_id
        self._ask = ask
        self._connect_seconds = connect_seconds

    async def listen(self, port: int) -> socket.socket:
        return await self._socket(Listen, port)

    async def connect(self, port: int) -> socket.socket:
        sock = await self._socket(Connect, port)
        try:
            await _connected(sock, port, self._connect_seconds)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _socket(self, kind: type[Listen | Connect], port: int) -> socket.socket:
        try:
            request = kind(self._jail_id, port)
        except ValueError as error:
            raise RoostError(Reason.JAIL_FAILED, f"jail {self._jail_id}: {error}") from error
        (fd,) = (await self._ask(request)).fds
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

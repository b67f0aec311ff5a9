"""The daemon's end of an agent's turn socket: messages of a 4-byte big-endian length and that many bytes.

The socket outlives the daemon (the jailer keeps a copy), so a daemon may die in the midst of a message, and
nothing in a stream tells its successor. Therefore a mark is kept on the socket itself, the one thing that
both hold: its priority, which means nothing on a unix socket, is 0 only between messages.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from edge_agent.jail.api import MAX_MESSAGE
from shared.errors import Reason, RoostError

_CHUNK = 1 << 18
_SENDING, _RECEIVING = 1, 2


class TurnsEnded(Exception):
    """The agent's end is closed, and everything that it sent has been received."""


class TurnSocket:
    """One sender and one receiver at a time. A cancelled `receive` loses nothing: the next one goes on. A
    cancelled `send` leaves half a message, so the socket is of no more use and ends."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._in = bytearray()
        self._mark = 0
        self._over = False
        self._waiting: list[asyncio.Future[None]] = []  # a sender and a receiver, at most

    @property
    def torn(self) -> bool:
        """Did another process end in the midst of a message?"""
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) != 0

    async def send(self, message: bytes) -> None:
        """TurnsEnded if the agent is gone; RoostError MESSAGE_TOO_LARGE."""
        if len(message) > MAX_MESSAGE:
            raise RoostError(
                Reason.MESSAGE_TOO_LARGE,
                f"a message of {len(message)} bytes to an agent is more than {MAX_MESSAGE}",
            )
        if self._over:
            raise TurnsEnded
        left = memoryview(len(message).to_bytes(4, "big") + message)
        self._set_mark(_SENDING, True)
        try:
            while left:
                try:
                    left = left[self._sock.send(left) :]
                except BlockingIOError:
                    await self._wait(self._loop.add_writer, self._loop.remove_writer)
                except OSError as error:
                    raise TurnsEnded from error
        except asyncio.CancelledError:
            self.end()
            raise
        self._set_mark(_SENDING, False)

    async def receive(self) -> bytes:
        """The next message. TurnsEnded; RoostError AGENT_CRASHED if what came is none."""
        while True:
            message = self._whole_message()
            if message is not None:
                return message
            try:
                data = self._sock.recv(min(_CHUNK, self._missing()))
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
                continue
            except OSError as error:
                raise TurnsEnded from error
            if not data:
                raise TurnsEnded
            self._in += data
            self._set_mark(_RECEIVING, True)

    def end(self) -> None:
        """What has come can still be received; nothing more is waited for."""
        self._over = True
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def close(self) -> None:
        self.end()
        self._sock.close()

    def _whole_message(self) -> bytes | None:
        if self._missing() > 0:
            return None
        message = bytes(self._in[4:])
        self._in.clear()
        self._set_mark(_RECEIVING, False)
        return message

    def _missing(self) -> int:
        """Bytes until the length, or then the message, is whole. Never reads on into the next message:
        what is not yet received is still there for a successor."""
        if len(self._in) < 4:
            return 4 - len(self._in)
        size = int.from_bytes(self._in[:4], "big")
        if size > MAX_MESSAGE:
            raise RoostError(
                Reason.AGENT_CRASHED,
                f"the agent announced a message of {size} bytes; {MAX_MESSAGE} is the most",
                "agents talk to the node through roost.Agent alone; does this one write to ROOST_FD itself?",
            )
        return 4 + size - len(self._in)

    async def _wait(
        self, add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool]
    ) -> None:
        if self._over:
            raise TurnsEnded
        ready: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        self._waiting.append(ready)
        add(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            self._waiting.remove(ready)
            remove(fd)

    def _set_mark(self, bit: int, on: bool) -> None:
        mark = self._mark | bit if on else self._mark & ~bit
        if mark != self._mark and not self._over:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, mark)
            self._mark = mark

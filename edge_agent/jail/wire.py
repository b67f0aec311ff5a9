"""Frames over a unix stream socket: a 4-byte big-endian length, JSON, and descriptors beside it.

The same class serves the jailer, a jail's init, the file service and the daemon; it never blocks, so one peer
that does not read stops nobody. What must hold: descriptors arrive with the frame that they were queued with
(the kernel delivers them no later than the first byte that they were sent with, in order), and each is closed
once.
How it can fail: Closed at the end of the stream, Garbage when the peer keeps to no framing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_FRAME = 1 << 20  # bytes of JSON
_MAX_FDS = 20  # with one frame
_CHUNK = 1 << 16

Body = dict[str, Any]


class Closed(Exception):
    """The peer has closed its end."""


class Garbage(Exception):
    """What came is no frame; the stream is of no more use."""


@dataclass(frozen=True, slots=True)
class Frame:
    """`fds` belong to the receiver."""

    body: Body
    fds: tuple[int, ...] = ()

    def close(self) -> None:
        close_all(self.fds)


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)


@dataclass(slots=True)
class _Outgoing:
    data: memoryview
    fds: tuple[int, ...]


class Wire:
    """One end. Owns `sock`, and every descriptor queued to it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._in = bytearray()
        # Lists, which take a tenth of a deque while they are empty; a node has thousands of wires.
        self._in_fds: list[int] = []
        self._out: list[_Outgoing] = []

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, body: Body, fds: tuple[int, ...] = ()) -> None:
        """Queues a frame and sends what can be sent now. Takes the descriptors. Closed: the peer is gone."""
        if fds:
            body = {**body, "fds": len(fds)}
        data = json.dumps(body, separators=(",", ":")).encode()
        if len(data) > MAX_FRAME:
            close_all(fds)
            raise ValueError(f"a frame of {len(data)} bytes is more than {MAX_FRAME}")
        self._out.append(_Outgoing(memoryview(len(data).to_bytes(4, "big") + data), fds))
        self.flush()

    def flush(self) -> None:
        """Sends what can be sent now. Closed if the peer is gone."""
        while self._out:
            first = self._out[0]
            try:
                if first.fds:
                    sent = socket.send_fds(self._sock, [first.data], list(first.fds))
                else:
                    sent = self._sock.send(first.data)
            except BlockingIOError:
                return
            except OSError as error:
                raise Closed from error
            close_all(first.fds)
            first.fds = ()
            first.data = first.data[sent:]
            if not first.data:
                del self._out[0]

    def receive(self) -> list[Frame]:
        """The frames that have come. Closed at the end of the stream, once all before it were returned."""
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, _CHUNK, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Closed from error
        self._in_fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            raise Garbage("more descriptors than a frame may carry")
        if not data:
            raise Closed
        self._in += data
        frames: list[Frame] = []
        try:
            frames.extend(self._frames())
        except Garbage:
            for frame in frames:
                frame.close()
            raise
        return frames

    def _frames(self) -> Iterable[Frame]:
        while len(self._in) >= 4:
            size = int.from_bytes(self._in[:4], "big")
            if size > MAX_FRAME:
                raise Garbage(f"a frame of {size} bytes is more than {MAX_FRAME}")
            if len(self._in) < 4 + size:
                return
            data = bytes(self._in[4 : 4 + size])
            del self._in[: 4 + size]
            yield self._frame(data)
        if self._in_fds and not self._in:
            raise Garbage("descriptors that no frame names")

    def _frame(self, data: bytes) -> Frame:
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Garbage("a frame that is not JSON") from error
        if not isinstance(body, dict):
            raise Garbage("a frame that is no JSON object")
        count = body.pop("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._in_fds):
            raise Garbage("a frame without the descriptors that it names")
        fds = tuple(self._in_fds[:count])
        del self._in_fds[:count]
        return Frame(body, fds)

    def close(self) -> None:
        self._sock.close()
        close_all(self._in_fds)
        self._in_fds.clear()
        for outgoing in self._out:
            close_all(outgoing.fds)
        self._out.clear()


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

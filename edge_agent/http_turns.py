"""One turn as an HTTP request to a program that listens inside its jail: docs/any-program.md.

Each turn has a connection of its own, which is closed when the reply has come: whatever a server says
beyond that can't be taken for the next turn's. How it can fail: the program ends or says something that is
not HTTP (AGENT_CRASHED), says too much, or answers with any other status than 2xx (TURN_FAILED).
"""

from __future__ import annotations

import asyncio
import codecs
import io
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from urllib.parse import quote

import h11

from edge_agent.effects import TurnCalls
from edge_agent.jail.api import Jail, JailGone
from edge_agent.tasks import TurnTasks
from edge_agent.turns import MAX_RECEIVED, Deltas, Turn, check_size, crash, start_failed, timed_out
from shared.errors import Reason, RoostError

_READ = 16 << 10  # of the smallest chunks that is some 3,000 events
_MAX_HEAD = 16 << 10  # bytes of a status line with its headers
_MAX_INTERIM = 16  # answers that are none yet
_MAX_TOLD = 2000  # bytes of an error's body that are passed on
_POLL_FIRST, _POLL_MOST = 0.005, 0.25  # seconds between attempts to connect
_LAST_WORDS = 1.0  # seconds for the body of an error, and for the news that the program has ended


class HttpSpeaker:
    """See `Speaker`. A program that speaks HTTP can't ask for tasks, nor journal calls."""

    def __init__(self, port: int, path: str) -> None:
        self._port = port
        self._path = path

    async def ready(self, jail: Jail, timeout: float) -> None:
        pause = _POLL_FIRST
        try:
            async with asyncio.timeout(timeout):
                while True:
                    try:
                        (await jail.connect(self._port)).close()
                    except OSError:  # refused, or not accepted in time
                        await asyncio.sleep(pause)
                        pause = min(_POLL_MOST, 2 * pause)
                    else:
                        return
        except TimeoutError as error:
            raise RoostError(
                Reason.AGENT_START_FAILED,
                f"the agent accepted no connection at port {self._port} within {timeout:g} s",
                f"let it listen at 127.0.0.1:{self._port}, or raise run.start_timeout in agent.toml",
            ) from error
        except JailGone as gone:
            raise start_failed(gone.exit) from gone

    async def turn(
        self, jail: Jail, turn: Turn, deltas: Deltas, tasks: TurnTasks, calls: TurnCalls, timeout: float
    ) -> str:
        try:
            async with asyncio.timeout(timeout):
                with await self._connect(jail) as sock:
                    return await self._exchange(jail, sock, turn, deltas)
        except TimeoutError as error:
            raise timed_out(timeout) from error

    async def _connect(self, jail: Jail) -> socket.socket:
        try:
            return await jail.connect(self._port)
        except OSError as error:
            await _raise_if_gone(jail)
            raise RoostError(
                Reason.TURN_FAILED,
                f"the agent does not accept connections at port {self._port} any more: {error}",
                "its state is as it was before this turn",
            ) from error

    async def _exchange(self, jail: Jail, sock: socket.socket, turn: Turn, deltas: Deltas) -> str:
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        body = turn.message.encode()
        data = _sent(connection, self._request(turn, len(body)), h11.Data(body), h11.EndOfMessage())
        # Beside reading, as a server may answer before it has read everything, or never read at all.
        sending = asyncio.create_task(_send(sock, data), name=f"send turn {turn.id}")
        try:
            return await _reply(_received(connection, sock), deltas)
        except (h11.RemoteProtocolError, OSError) as error:
            try:
                await _raise_if_gone(jail)
            except JailGone as gone:
                raise crash(gone.exit) from gone
            raise _garbage(str(error)) from error
        finally:
            sending.cancel()
            await asyncio.wait({sending})

    def _request(self, turn: Turn, size: int) -> h11.Request:
        headers = [
            ("Host", f"127.0.0.1:{self._port}"),
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(size)),
            ("Accept", "text/plain, text/event-stream, */*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
            ("Roost-Turn", _header(turn.id)),
            ("Roost-User", _header(turn.user)),
        ]
        return h11.Request(method="POST", target=self._path, headers=headers)


def _header(text: str) -> str:
    """As it is, if it is printable ASCII; the rest, and %, as %XX of its UTF-8."""
    return quote(text, safe="!\"#$&'()*+,/:;<=>?@[\\]^`{|}")


def _sent(connection: h11.Connection, *events: h11.Event) -> bytes:
    return b"".join(connection.send(event) or b"" for event in events)


async def _send(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):  # whoever reads hears why
        await asyncio.get_running_loop().sock_sendall(sock, data)


async def _received(connection: h11.Connection, sock: socket.socket) -> AsyncGenerator[h11.Event, None]:
    """What comes, up to the end of the reply. RemoteProtocolError, OSError, or TURN_FAILED for too much."""
    loop = asyncio.get_running_loop()
    received = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            data = await loop.sock_recv(sock, _READ)
            # A server that never pauses must not keep the node from all else that it does.
            await asyncio.sleep(0)
            received += len(data)
            if received > MAX_RECEIVED:
                raise _garbage(f"it sent more than {MAX_RECEIVED >> 20} MiB in one turn")
            connection.receive_data(data)
        elif isinstance(event, h11.Event):
            yield event
            if isinstance(event, h11.EndOfMessage):
                return
        else:  # PAUSED: there is nothing for us behind an answer
            raise _garbage("it wants to speak another protocol")


async def _reply(events: AsyncGenerator[h11.Event, None], deltas: Deltas) -> str:
    text = _Plain()
    interim = size = 0
    reply = io.StringIO()
    async with aclosing(events):
        async for event in events:
            match event:
                case h11.InformationalResponse():  # 100 Continue and its like
                    interim += 1
                    if interim > _MAX_INTERIM:
                        raise _garbage("it does not come to its answer")
                case h11.Response(status_code=status) if not 200 <= status < 300:
                    raise _refused(status, await _complaint(events))
                case h11.Response():
                    if _content_type(event) == "text/event-stream":
                        text = _EventStream()
                case h11.Data() | h11.EndOfMessage():
                    data = bytes(event.data) if isinstance(event, h11.Data) else b""
                    piece = text.feed(data, isinstance(event, h11.EndOfMessage))
                    size += len(piece.encode())
                    check_size(size)
                    if piece:
                        reply.write(piece)
                        deltas.add(piece)
                case _:
                    raise _garbage(f"a {type(event).__name__} means nothing here")
    return reply.getvalue()


async def _complaint(events: AsyncGenerator[h11.Event, None]) -> bytes:
    """The beginning of a body that says why, as far as it comes soon."""
    told = b""
    with suppress(TimeoutError, h11.RemoteProtocolError, OSError):
        async with asyncio.timeout(_LAST_WORDS):
            async for event in events:
                told += bytes(event.data) if isinstance(event, h11.Data) else b""
                if len(told) >= _MAX_TOLD:
                    break
    return told[:_MAX_TOLD]


def _content_type(response: h11.Response) -> str:
    found = next((value for name, value in response.headers if name == b"content-type"), b"")
    return found.partition(b";")[0].strip().lower().decode("latin-1")


class _Plain:
    """Text as its bytes come."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def feed(self, data: bytes, ended: bool) -> str:
        try:
            return self._decoder.decode(data, ended)
        except UnicodeDecodeError as error:
            raise _garbage("its reply is not UTF-8") from error


class _EventStream(_Plain):
    """Of `text/event-stream`, the data: its lines joined, events one after another. Other fields mean
    nothing here, and neither does an event without the empty line that ends it."""

    def __init__(self) -> None:
        super().__init__()
        self._line = ""
        self._data = io.StringIO()

    def feed(self, data: bytes, ended: bool) -> str:
        *lines, self._line = (self._line + super().feed(data, ended)).split("\n")
        done = ""
        for line in (text.removesuffix("\r") for text in lines):
            if line.startswith("data:"):
                self._data.write(line[5:].removeprefix(" ") + "\n")
            elif not line:
                done += self._data.getvalue()[:-1]
                self._data = io.StringIO()
        check_size(len(self._line) + self._data.tell())
        return done


def _refused(status: int, body: bytes) -> RoostError:
    said = body.decode(errors="replace").strip()
    return RoostError(
        Reason.TURN_FAILED,
        f"the agent answered with HTTP status {status}" + (f": {said}" if said else ""),
        "its state is as it was before; a turn succeeds with a status of 200 to 299",
    )


def _garbage(what: str) -> RoostError:
    return RoostError(
        Reason.AGENT_CRASHED,
        f"the agent's HTTP can't be followed: {what}",
        "docs/any-program.md says what it gets and what it may answer",
    )


async def _raise_if_gone(jail: Jail) -> None:
    """Its connections end before the news of its end comes: JailGone, if that comes soon."""
    with suppress(TimeoutError, RoostError):
        async with asyncio.timeout(_LAST_WORDS):
            await jail.receive()

"""Turns by HTTP, with servers that may say anything, or nothing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import pytest

from edge_agent.http_turns import HttpSpeaker
from edge_agent.jail.api import Exit, JailGone
from edge_agent.turns import Deltas, Turn
from shared.errors import Reason, RoostError
from tests.support.calls import no_calls
from tests.support.tasks import no_tasks

TURN = Turn("t/1 ü", "ana", "hello, wörld")
Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class ServingJail:
    """`server` gets each connection, `refusals` of them are refused first. When `ends` is set the program
    has ended, and that is heard of after its connections have."""

    def __init__(self, server: Server, refusals: int = 0) -> None:
        self.ends: Exit | None = None
        self.refusals = refusals
        self.connections = 0
        self._server = server
        self._tasks: set[asyncio.Task[None]] = set()

    async def connect(self, port: int) -> socket.socket:
        assert port == 8080
        if self.ends:
            raise JailGone(self.ends)
        if self.refusals:
            self.refusals -= 1
            raise ConnectionRefusedError
        self.connections += 1
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        task = asyncio.create_task(self._serve(theirs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ours

    async def receive(self) -> bytes:
        if self.ends:
            raise JailGone(self.ends)
        raise RoostError(Reason.AGENT_CRASHED, "it has closed its socket")

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        try:
            await self._server(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()


def says(*pieces: bytes, hangs: bool = False) -> Server:
    """Reads the request's head, then sends the pieces one by one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if hangs:
            await asyncio.Event().wait()

    return serve


def ok(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(("HTTP/1.1 200 OK", *headers, "", "")).encode() + body


def sized(body: bytes) -> bytes:
    return ok(body, f"Content-Length: {len(body)}")


async def reply_of(server: Server, deltas: Deltas | None = None, timeout: float = 5.0) -> str:
    return await HttpSpeaker(8080, "/chat").turn(
        ServingJail(server),  # type: ignore[arg-type]
        TURN,
        deltas or Deltas(),
        no_tasks(),
        no_calls(),
        timeout,
    )


async def failure_of(server: Server, timeout: float = 5.0) -> RoostError:
    with pytest.raises(RoostError) as caught:
        await reply_of(server, timeout=timeout)
    return caught.value


async def test_a_turn_is_a_post_with_the_message_as_its_body() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        assert head[0] == "POST /chat HTTP/1.1"
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        assert headers["roost-turn"] == "t/1%20%C3%BC"
        assert headers["roost-user"] == "ana"
        assert headers["content-type"] == "text/plain; charset=utf-8"
        body = await reader.readexactly(int(headers["content-length"]))
        assert body.decode() == "hello, wörld"
        writer.write(sized("grüß dich\n".encode()))

    assert await reply_of(serve) == "grüß dich\n"


@pytest.mark.parametrize(
    ("server", "reply"),
    [
        (says(ok(b"until the end")), "until the end"),
        (says(b"HTTP/1.0 200 OK\r\n\r\nold"), "old"),
        (says(b"HTTP/1.1 204 No Content\r\n\r\n"), ""),
        (says(ok(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", "Transfer-Encoding: chunked")), "abcde"),
        (says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n", sized(b"then")), "then"),
        (says(sized(b"first") + sized(b"second"), hangs=True), "first"),
        (says(ok(b"longer than it says", "Content-Length: 6"), hangs=True), "longer"),
        (says(ok(b"\xc3", "Content-Length: 2"), b"\xa4", hangs=True), "ä"),
    ],
)
async def test_replies(server: Server, reply: str) -> None:
    assert await reply_of(server) == reply


async def test_pieces_are_streamed_as_they_come() -> None:
    go = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ok(b"3\r\nabc\r\n", "Transfer-Encoding: chunked"))
        await go.wait()
        writer.write(b"1\r\nd\r\n0\r\n\r\n")

    deltas = Deltas()
    turn = asyncio.create_task(reply_of(serve, deltas))
    said = deltas.listen()
    assert await anext(said) == "abc"
    go.set()
    assert await turn == "abcd"
    assert await anext(said) == "d"


async def test_of_an_event_stream_the_data_is_the_reply() -> None:
    stream = b": hello\r\nevent: x\r\ndata: one\r\n\r\n", b"data: tw", b"o\ndata:\n\nid: 3\n\ndata: not ended"
    assert await reply_of(says(ok(b"", "Content-Type: text/event-stream; x=y"), *stream)) == "onetwo\n"


@pytest.mark.parametrize(
    ("status", "told"),
    [(b"500 Oops", "status 500: it broke"), (b"302 Found", "status 302"), (b"404 No", "status 404")],
)
async def test_any_other_status_fails_the_turn_with_what_was_said(status: bytes, told: str) -> None:
    error = await failure_of(says(b"HTTP/1.1 " + status + b"\r\nLocation: /x\r\n\r\nit broke"))
    assert error.reason is Reason.TURN_FAILED
    assert told in error.message


async def test_a_long_complaint_is_cut() -> None:
    error = await failure_of(says(b"HTTP/1.1 500 Oops\r\n\r\n", *[b"x" * 1000] * 50, hangs=True))
    assert error.reason is Reason.TURN_FAILED
    assert len(error.message) < 2100


@pytest.mark.parametrize(
    "server",
    [
        says(b"what is this?\r\n\r\n"),
        says(b"\x16\x03\x01\x00\x00"),
        says(),
        says(b"HTTP/1.1 200 OK\r\nContent-Le"),
        says(ok(b"too little", "Content-Length: 99")),
        says(ok(b"", "Content-Length: -1")),
        says(ok(b"", "Content-Length: 1", "Content-Length: 2")),
        says(ok(b"zz\r\nabc", "Transfer-Encoding: chunked")),
        says(ok(b"3\r\nabc\r\n", "Transfer-Encoding: chunked")),
        says(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", hangs=True),
        says(b"HTTP/1.1 200 OK\r\n", *[b"X-Endless: yes\r\n"] * 5000, hangs=True),
        says(b"HTTP/1.1 200 OK" + b"k" * 100_000, hangs=True),
        says(b"HTTP/1.1 102 Processing\r\n\r\n" * 5000, hangs=True),
        says(sized(b"\xff\xfe\xfd")),
        says(ok(b"\xc3")),
    ],
)
async def test_what_is_not_http_is_the_agents_fault(server: Server) -> None:
    error = await failure_of(server)
    assert error.reason is Reason.AGENT_CRASHED
    assert "HTTP" in error.message


@pytest.mark.parametrize(
    "server",
    [
        says(ok(b""), *[b"x" * 65536] * 20, hangs=True),
        says(ok(b"", "Content-Type: text/event-stream"), *[b"data: " + b"x" * 9999 + b"\n"] * 200),
        says(ok(b"", "Content-Type: text/event-stream"), *[b"x" * 65536] * 20, hangs=True),
    ],
)
async def test_an_endless_reply_is_too_long(server: Server) -> None:
    error = await failure_of(server)
    assert error.reason is Reason.TURN_FAILED
    assert "1 MiB" in error.message


@pytest.mark.parametrize("server", [says(hangs=True), says(ok(b"begun"), hangs=True)])
async def test_a_server_that_does_not_end_its_answer_runs_into_the_timeout(server: Server) -> None:
    assert (await failure_of(server, timeout=0.05)).reason is Reason.TURN_TIMEOUT


async def test_a_server_may_answer_before_it_has_read_everything() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 413 Too Much\r\nContent-Length: 2\r\n\r\nno")
        await asyncio.Event().wait()

    turn = Turn("t1", "ana", "x" * (4 << 20))  # more than the sockets take
    with pytest.raises(RoostError, match="status 413: no"):
        await HttpSpeaker(8080, "/").turn(ServingJail(serve), turn, Deltas(), no_tasks(), no_calls(), 5.0)  # type: ignore[arg-type]


async def test_a_complaint_without_end_does_not_hide_the_status() -> None:
    error = await failure_of(says(b"HTTP/1.1 500 Oops\r\n\r\nit br", hangs=True))
    assert "status 500: it br" in error.message


async def test_a_program_that_ends_in_a_turn_has_crashed() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(b"hal", "Content-Length: 4"))
        jail.ends = Exit(3, out_of_memory=False, stderr_tail="segment\nviolated\n")

    jail = ServingJail(serve)
    with pytest.raises(RoostError) as caught:
        await HttpSpeaker(8080, "/").turn(jail, TURN, Deltas(), no_tasks(), no_calls(), 5.0)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.AGENT_CRASHED
    assert "exited with code 3" in caught.value.message
    assert "violated" in caught.value.hint


async def test_a_program_that_had_ended_before_did_not_get_the_turn() -> None:
    jail = ServingJail(says())
    jail.ends = Exit(0, out_of_memory=False)
    with pytest.raises(JailGone):
        await HttpSpeaker(8080, "/").turn(jail, TURN, Deltas(), no_tasks(), no_calls(), 5.0)  # type: ignore[arg-type]


async def test_it_is_ready_when_it_accepts() -> None:
    jail = ServingJail(says(), refusals=3)
    await HttpSpeaker(8080, "/").ready(jail, 5.0)  # type: ignore[arg-type]
    assert jail.connections == 1


async def test_one_that_never_listens_is_not_ready() -> None:
    with pytest.raises(RoostError, match="8080") as caught:
        await HttpSpeaker(8080, "/").ready(ServingJail(says(), refusals=10**9), 0.02)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.AGENT_START_FAILED


async def test_one_that_crashes_before_it_listens_says_why() -> None:
    jail = ServingJail(says())
    jail.ends = Exit(127, out_of_memory=False, stderr_tail="env: 'nodee': No such file or directory\n")
    with pytest.raises(RoostError, match="exited with code 127") as caught:
        await HttpSpeaker(8080, "/").ready(jail, 5.0)  # type: ignore[arg-type]
    assert caught.value.reason is Reason.AGENT_START_FAILED
    assert "nodee" in caught.value.hint


async def test_what_is_held_back_is_in_the_reply_alone() -> None:
    deltas = Deltas()
    deltas.hold()
    assert await reply_of(says(sized(b"secret")), deltas) == "secret"
    deltas.close()
    assert [said async for said in deltas.listen()] == []


async def test_a_turn_that_is_ended_early_closes_its_connection() -> None:
    begun, closed = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        begun.set()
        await reader.read()
        closed.set()

    turn = asyncio.create_task(reply_of(serve))
    async with asyncio.timeout(10.0):
        await begun.wait()
        turn.cancel()
        await closed.wait()

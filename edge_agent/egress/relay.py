"""Bytes between an agent and a target, until both are done or it has to stop.

Always true: nothing is passed on after `check` has raised; nobody's buffer grows beyond what its peer takes;
a connection on which nothing moves ends. A connection is never ended in a way that makes half an answer look
like a whole one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import h11

from edge_agent.egress.messages import MAX_ANSWER_HEAD, Scrubber, response_to_send
from edge_agent.egress.outside import Streams
from edge_agent.egress.rules import Denied, Why

_CHUNK = 1 << 16


@dataclass(slots=True)
class Traffic:
    """Bytes that were passed on."""

    out: int = 0
    back: int = 0


class Motion:
    """What both directions of a connection share: `check` before every chunk, and a deadline that each moves.
    Used as a block, which ends with TimeoutError when nothing has moved for too long."""

    def __init__(self, check: Callable[[], None], idle_seconds: float) -> None:
        self._check = check
        self._idle_seconds = idle_seconds
        self._timeout = asyncio.timeout(idle_seconds)

    async def __aenter__(self) -> Motion:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: object
    ) -> None:
        await self._timeout.__aexit__(kind, error, None)

    def moved(self) -> None:
        self._check()
        self._timeout.reschedule(asyncio.get_running_loop().time() + self._idle_seconds)


async def tunnel(inside: Streams, outside: Streams, motion: Motion, traffic: Traffic) -> None:
    """Both directions, until both have ended. OSError if one breaks."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, out: bool) -> None:
        while data := await reader.read(_CHUNK):
            motion.moved()
            writer.write(data)
            traffic.out += len(data) if out else 0
            traffic.back += 0 if out else len(data)
            await writer.drain()
        writer.write_eof()

    await _together(
        asyncio.create_task(pump(inside[0], outside[1], True), name="egress out"),
        asyncio.create_task(pump(outside[0], inside[1], False), name="egress back"),
    )


async def _together(*tasks: asyncio.Task[None]) -> None:
    """Until all have ended, or one has failed."""
    try:
        await asyncio.gather(*tasks)
    finally:
        await _end(*tasks)


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Exchange:
    """One plain request and its answer. `answering`: some of the answer has left for the agent, so that no
    other can be given."""

    def __init__(
        self,
        inside: Streams,
        parser: h11.Connection,
        motion: Motion,
        traffic: Traffic,
        scrubber: Scrubber | None,
    ) -> None:
        self._reader, self._writer = inside
        self._inside = parser
        self._outside = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER_HEAD)
        self._motion = motion
        self._traffic = traffic
        self._scrubber = scrubber
        self.answering = False

    async def run(self, request: h11.Request, outside: Streams) -> None:
        """Denied for what the agent or the target did wrong; OSError if a connection breaks."""
        reader, writer = outside
        await self._send_out(writer, self._outside.send(request))
        body = asyncio.create_task(self._pass_body(writer), name="egress body")
        answer = asyncio.create_task(self._pass_answer(reader), name="egress answer")
        try:
            await asyncio.wait({body, answer}, return_when=asyncio.FIRST_COMPLETED)
            # An answer may come before all of the body was read, and then stands. A body that broke is the
            # agent's fault: an answer to half of it is none.
            if not answer.done():
                await body
            await answer
        except h11.LocalProtocolError as error:
            raise Denied(Why.UPSTREAM_BROKEN, f"what came back can't be passed on: {error}") from error
        finally:
            await _end(body, answer)

    async def _pass_body(self, writer: asyncio.StreamWriter) -> None:
        if self._inside.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            self._writer.write(self._inside.send(go_on) or b"")
        while True:
            try:
                event = self._inside.next_event()
            except h11.RemoteProtocolError as error:
                raise Denied(Why.BAD_REQUEST, f"the request's body makes no sense: {error}") from error
            if event is h11.NEED_DATA:
                data = await self._reader.read(_CHUNK)
                self._motion.moved()
                self._inside.receive_data(data)
            elif isinstance(event, h11.Data):
                await self._send_out(writer, self._outside.send(h11.Data(data=event.data)))
            elif isinstance(event, h11.EndOfMessage):
                await self._send_out(writer, self._outside.send(h11.EndOfMessage()))
                return
            else:
                raise ConnectionResetError("the agent left")

    async def _send_out(self, writer: asyncio.StreamWriter, data: bytes | None) -> None:
        self._motion.moved()
        writer.write(data or b"")
        self._traffic.out += len(data or b"")
        await writer.drain()

    async def _pass_answer(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                event = self._outside.next_event()
            except h11.RemoteProtocolError as error:
                raise Denied(Why.UPSTREAM_BROKEN, f"what came back is no HTTP: {error}") from error
            if event is h11.NEED_DATA:
                data = await reader.read(_CHUNK)
                self._motion.moved()
                self._outside.receive_data(data)
            elif isinstance(event, h11.Response):
                await self._send_back(response_to_send(event, self._scrubber))
            elif isinstance(event, h11.Data):
                scrubbed = self._scrubber.feed(event.data) if self._scrubber else event.data
                await self._send_back(h11.Data(data=scrubbed))
            elif isinstance(event, h11.EndOfMessage):
                if self._scrubber:
                    await self._send_back(h11.Data(data=self._scrubber.end()))
                await self._send_back(h11.EndOfMessage())
                return
            elif not isinstance(event, h11.InformationalResponse):
                raise Denied(Why.UPSTREAM_BROKEN, "the connection ended before an answer")

    async def _send_back(self, event: h11.Response | h11.Data | h11.EndOfMessage) -> None:
        data = self._inside.send(event) or b""
        self.answering = True
        self._writer.write(data)
        self._traffic.back += len(data)
        await self._writer.drain()

"""What one jail's proxy does: it takes the connections of one listening socket, and lets out what may go.

Always true: who asks is known from the socket, which lies in that jail's network alone; nothing leaves while
`may_leave` says no, and what was under way then is broken off. More connections than `MOST` wait in the
kernel until others end, and no more than `Bounds.rate` come in a second, so a jail that asks without end
costs the node little. How it can fail: each refusal is answered, counted and logged, with a bound on the
lines.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from edge_agent.egress import sni
from edge_agent.egress.credentials import Credentials
from edge_agent.egress.messages import (
    MAX_HEAD,
    Request,
    Scrubber,
    read_request,
    refusal,
    request_to_send,
)
from edge_agent.egress.outside import Outside, Streams
from edge_agent.egress.relay import Exchange, Motion, Traffic, tunnel
from edge_agent.egress.rules import Denied, Target, Tunnel, Why, decide
from shared.identity import InstanceKey
from shared.network_policy import NetworkSection, is_address

log = logging.getLogger(__name__)

MOST = 128  # connections of a jail at the same time
_LINGER_SECONDS, _LINGER_BYTES = 2.0, 16 << 20  # for what an agent still sends when it was answered
_LOG_LINES, _LOG_SECONDS = 50, 10.0
_CHUNK = 1 << 16
_ALERT = bytes((21, 3, 1, 0, 2, 2, 112))  # TLS: fatal, unrecognized_name

ALLOWED = "allowed"


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one jail's connections."""

    rate: int = 200  # new ones a second
    head_seconds: float = 10.0  # for a request's head, and for a ClientHello
    idle_seconds: float = 300.0  # without a byte in either direction: models may think for long


USUAL = Bounds()


class Gate:
    """Owns `listening`. `slots`: connections that the whole node may still take."""

    def __init__(
        self,
        listening: socket.socket,
        key: InstanceKey,
        network: NetworkSection,
        may_leave: Callable[[], bool],
        outside: Outside,
        credentials: Credentials,
        slots: asyncio.Semaphore,
        bounds: Bounds = USUAL,
    ) -> None:
        self.key = key
        self.counts: Counter[str] = Counter()  # of decisions: ALLOWED, or a Why
        self.traffic = Traffic()
        self._listening = listening
        self._network = network
        self._may_leave = may_leave
        self._outside = outside
        self._credentials = credentials
        self._node_slots = slots
        self._bounds = bounds
        self._slots = asyncio.Semaphore(MOST)
        self._connections: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}
        self._lines = 0
        self._lines_since = float("-inf")
        self._accepting = asyncio.create_task(self._accept(), name=f"egress {key}")

    def cut(self) -> list[asyncio.Task[None]]:
        """Breaks off all that is under way, at once. The tasks that were at it end soon."""
        for writers in self._connections.values():
            for writer in writers:
                _break_off(writer)
        tasks = list(self._connections)
        for task in tasks:
            task.cancel()
        return tasks

    def close(self) -> list[asyncio.Task[None]]:
        """For good. The tasks that were at it end soon."""
        self._accepting.cancel()
        tasks = [self._accepting, *self.cut()]
        self._listening.close()
        if self.counts:
            summary = ", ".join(f"{what} {count}" for what, count in sorted(self.counts.items()))
            log.info("egress %s: %s; %d B out, %d B back", self.key, summary, *self._sums())
        return tasks

    def _sums(self) -> tuple[int, int]:
        return self.traffic.out, self.traffic.back

    # --- connections ----------------------------------------------------------------------------------

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        window, taken = loop.time(), 0
        while True:
            await self._slots.acquire()
            await self._node_slots.acquire()
            try:
                sock, _ = await loop.sock_accept(self._listening)
            except OSError as error:  # no descriptors are left
                self._release()
                log.error("egress %s: no connection can be taken: %s", self.key, error)  # noqa: TRY400
                await asyncio.sleep(1.0)
                continue
            except BaseException:
                self._release()
                raise
            task = asyncio.create_task(self._serve(sock), name=f"egress {self.key}")
            self._connections[task] = []
            task.add_done_callback(self._served)
            if loop.time() - window >= 1.0:
                window, taken = loop.time(), 0
            taken += 1
            if taken >= self._bounds.rate:
                await asyncio.sleep(window + 1.0 - loop.time())

    def _served(self, task: asyncio.Task[None]) -> None:
        for writer in self._connections.pop(task):
            writer.close()
        self._release()
        if not task.cancelled() and (error := task.exception()):
            log.error("egress %s failed by a bug", self.key, exc_info=error)

    def _release(self) -> None:
        self._slots.release()
        self._node_slots.release()

    def _keep(self, writer: asyncio.StreamWriter) -> None:
        """Ends with the task, or when it is cut."""
        task = asyncio.current_task()
        assert task is not None
        self._connections[task].append(writer)

    async def _serve(self, sock: socket.socket) -> None:
        inside = await _streams(sock)
        self._keep(inside[1])
        said = "what is no request"
        try:
            request = read_request(await _read_head(inside[0], self._bounds.head_seconds))
            said = _in_words(request)
            target = decide(request.asked, self._network)
            self._check()
            if isinstance(request.asked, Tunnel):
                await self._tunnel(said, target, inside)
            else:
                await self._exchange(said, request, target, inside)
        except Denied as denied:
            self._refused(said, denied)
            inside[1].write(refusal(denied))
            await _finish(inside)
        except OSError:  # somebody left, or nothing moved for too long
            _break_off(inside[1])

    def _check(self) -> None:
        if not self._may_leave():
            raise Denied(
                Why.NOT_OWNER,
                "this node is not sure that it still owns this instance, so nothing leaves",
                "the instance goes on here when the node is sure again, or elsewhere",
            )

    async def _tunnel(self, said: str, target: Target, inside: Streams) -> None:
        outside = await self._outside.connect(target, tls=False)
        self._keep(outside[1])
        inside[1].write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            hello = await _read_hello(inside[0], target.host, self._bounds.head_seconds)
            self._allowed(said)
            async with Motion(self._check, self._bounds.idle_seconds) as motion:
                motion.moved()
                outside[1].write(hello)
                self.traffic.out += len(hello)
                await tunnel(inside, outside, motion, self.traffic)
        except Denied as denied:  # too late for an answer in HTTP
            self._refused(said, denied)
            _break_off(outside[1])
            if denied.why is Why.NOT_OWNER:
                _break_off(inside[1])
            else:
                inside[1].write(_ALERT)
                await _finish(inside)
        except OSError:
            _break_off(outside[1])
            raise

    async def _exchange(self, said: str, request: Request, target: Target, inside: Streams) -> None:
        path = target.path + request.target
        addition = self._credentials.addition(self.key, target, path) if target.credential else None
        outside = await self._outside.connect(target, tls=target.tls)
        self._keep(outside[1])
        self._allowed(said)
        scrubber = Scrubber(addition.secret) if addition else None
        motion = Motion(self._check, self._bounds.idle_seconds)
        exchange = Exchange(inside, request.inside, motion, self.traffic, scrubber)
        try:
            async with motion:
                await exchange.run(request_to_send(request, path, target.authority, addition), outside)
        except (Denied, OSError) as error:
            _break_off(outside[1])
            if exchange.answering:  # what came of it must not look whole
                raise ConnectionResetError from error
            raise _as_denied(error, target) from error
        await _finish(inside)

    # --- what is told ---------------------------------------------------------------------------------

    def _allowed(self, said: str) -> None:
        self.counts[ALLOWED] += 1
        self._log(logging.INFO, "egress %s: allowed %s", self.key, said)

    def _refused(self, said: str, denied: Denied) -> None:
        self.counts[denied.why] += 1
        self._log(logging.WARNING, "egress %s: %s %s: %s", self.key, denied.why, said, denied.message)

    def _log(self, level: int, text: str, *args: object) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._lines_since >= _LOG_SECONDS:
            self._lines, self._lines_since = 0, now
        self._lines += 1
        if self._lines <= _LOG_LINES:
            log.log(level, text, *args)
        elif self._lines == _LOG_LINES + 1:
            log.warning("egress %s: more than is told here for a while; all is counted", self.key)


def _as_denied(error: Denied | OSError, target: Target) -> Denied:
    match error:
        case Denied():
            return error
        case TimeoutError():
            return Denied(Why.TIMED_OUT, f"{target.authority} said nothing for too long")
        case _:
            return Denied(Why.UPSTREAM_BROKEN, f"{target.authority} closed the connection")


def _in_words(request: Request) -> str:
    """Without the query, in which there may be secrets."""
    asked = request.asked
    if isinstance(asked, Tunnel):
        return f"CONNECT {asked.host}:{asked.port}"
    return f"{asked.method[:20]} http://{asked.host}:{asked.port}{asked.path[:200]}"


async def _streams(sock: socket.socket) -> Streams:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_HEAD)
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, sock)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


async def _read_head(reader: asyncio.StreamReader, seconds: float) -> bytes:
    """ConnectionError if the agent leaves before."""
    try:
        async with asyncio.timeout(seconds):
            return await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise Denied(
            Why.HEAD_TOO_LARGE, f"the request's line and headers are more than {MAX_HEAD} bytes"
        ) from None
    except asyncio.IncompleteReadError:
        raise ConnectionResetError from None
    except TimeoutError:
        raise Denied(
            Why.BAD_REQUEST, f"the request's line and headers did not come in {seconds:g} s"
        ) from None


async def _read_hello(reader: asyncio.StreamReader, host: str, seconds: float) -> bytes:
    """The beginning of a TLS connection to `host`. Denied for anything else, ConnectionError for nothing."""
    data = b""
    hello = None
    try:
        async with asyncio.timeout(seconds):
            while hello is None:
                more = await reader.read(sni.MAX_HELLO - len(data))
                if not more:
                    raise ConnectionResetError
                data += more
                hello = sni.parse(data)
    except sni.NotTls as error:
        raise Denied(Why.NOT_TLS, f"tunnels are for TLS alone: {error}") from error
    except TimeoutError:
        raise Denied(Why.NOT_TLS, f"TLS did not begin in {seconds:g} s") from None
    if hello.name != host and not (hello.name is None and is_address(host)):
        told = "no server" if hello.name is None else hello.name[:200]
        raise Denied(
            Why.NAME_MISMATCH, f"TLS names {told}, but the target is {host}", "both must name the same host"
        )
    return data


async def _finish(inside: Streams) -> None:
    """Ends the connection so that what was written arrives: an end with unread data would overtake it."""
    reader, writer = inside
    left = _LINGER_BYTES
    with suppress(OSError):
        async with asyncio.timeout(_LINGER_SECONDS):
            await writer.drain()
            writer.write_eof()
            while left > 0 and (data := await reader.read(_CHUNK)):
                left -= len(data)


def _break_off(writer: asyncio.StreamWriter) -> None:
    """So that the peer takes what came for incomplete: an error, not an end."""
    sock = writer.get_extra_info("socket")
    if sock is not None:  # else it has ended already
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

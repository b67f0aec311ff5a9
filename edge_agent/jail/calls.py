"""Requests and answers over a `Wire`, for asyncio: the daemon's side of the jailer, an init, or the file
service."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_agent.jail.wire import Body, Closed, Frame, Garbage, Wire, close_all

log = logging.getLogger(__name__)


class CallFailed(Exception):
    """The other side refused. `kind` is its word for it, if it has one."""

    def __init__(self, kind: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint


class CallsEnded(Exception):
    """The socket is closed: no request is answered any more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`fds` belong to the caller. `parts`: what came in pieces before the answer."""

    values: Body
    fds: tuple[int, ...]
    parts: tuple[Any, ...]


@dataclass(slots=True)
class _Pending:
    future: asyncio.Future[Answer]
    parts: list[Any] = field(default_factory=list)


class Calls:
    """Owns `sock`. `on_event` gets the frames that answer nothing; `on_end` is called once, at the end of
    the socket."""

    def __init__(
        self,
        sock: socket.socket,
        on_event: Callable[[Body], None] = lambda body: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._wire = Wire(sock)
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._on_end = on_end
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._ended = False
        self._loop.add_reader(self._wire.fileno(), self._readable)

    async def ask(self, body: Body, timeout: float, fds: tuple[int, ...] = ()) -> Answer:
        """CallFailed, CallsEnded, or TimeoutError after `timeout` seconds: it may still be done then. Copies
        of `fds` go along."""
        request_id = next(self._ids)
        pending = self._pending[request_id] = _Pending(self._loop.create_future())
        future = pending.future
        try:
            self.post(body, request_id, fds)
            async with asyncio.timeout(timeout):
                return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                close_all(future.result().fds)  # it came just as we were cancelled
            raise
        finally:
            del self._pending[request_id]

    def post(self, body: Body, request_id: int = 0, fds: tuple[int, ...] = ()) -> None:
        """Sends without waiting for the answer. CallsEnded if the socket is closed."""
        if self._ended:
            raise CallsEnded
        try:
            self._wire.send({"id": request_id, **body}, tuple(map(os.dup, fds)))
        except Closed as error:
            self.close()
            raise CallsEnded from error
        if self._wire.wants_write:
            self._loop.add_writer(self._wire.fileno(), self._writable)

    def close(self) -> None:
        if self._ended:
            return
        self._ended = True
        self._loop.remove_reader(self._wire.fileno())
        self._loop.remove_writer(self._wire.fileno())
        self._wire.close()
        for pending in self._pending.values():
            if not pending.future.done():
                pending.future.set_exception(CallsEnded())
        self._on_end()

    def _writable(self) -> None:
        try:
            self._wire.flush()
        except Closed:
            self.close()
            return
        if not self._wire.wants_write:
            self._loop.remove_writer(self._wire.fileno())

    def _readable(self) -> None:
        try:
            frames = self._wire.receive()
        except Closed:
            self.close()
            return
        except Garbage as error:
            log.error("a socket of the jailer or a jail: %s", error)  # noqa: TRY400
            self.close()
            return
        for frame in frames:
            self._take(frame)

    def _take(self, frame: Frame) -> None:
        body = frame.body
        if "id" not in body:
            frame.close()
            self._on_event(body)
            return
        pending = self._pending.get(body["id"])
        if pending is None or pending.future.done():
            frame.close()
        elif "part" in body:
            pending.parts.append(body["part"])
        elif "ok" in body:
            pending.future.set_result(Answer(body["ok"], frame.fds, tuple(pending.parts)))
        else:
            frame.close()
            error = body.get("error", {})
            kind, message, hint = (str(error.get(key, "")) for key in ("kind", "message", "hint"))
            pending.future.set_exception(CallFailed(kind, message, hint))

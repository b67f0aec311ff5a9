"""An agent's line to its node. Like agent.py it is bound into jails: standard library alone, Python 3.9."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from roost._effects import CallError
from roost._tasks import TaskError

MAX_FRAME = 8 << 20  # bytes, as the node has it

_LENGTH = struct.Struct(">I")
_ANSWERS = {"run": "result", "call": "called", "done": "kept"}
_NAMES = {"result": "task", "called": "call", "kept": "call"}  # the field that says to which one
_NEXT = ("turn", "warm")  # what an agent that is in no turn waits for

Message = dict[str, Any]


class Line:
    """Both directions to the node, for all threads of an agent, and without one of its own: an agent that
    runs no tasks has a single thread.

    Invariant: one thread at a time reads; what it reads for another it leaves in `_next` or `_results`. A
    message of a turn is sent before the one that ends it, or not at all.
    """

    def __init__(self, node: socket.socket) -> None:
        self._node = node
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._reading = False
        self._over = False
        self._next: Message | None = None  # that nobody has begun
        self._current: str | None = None  # id of the one under way
        self._results: dict[tuple[str, Any], Message] = {}

    def emit(self, message: Message) -> None:
        frame = _frame(message)
        with self._sending:
            if "id" in message and message["id"] != self._current:
                raise RuntimeError("this turn has ended: nothing more can be said or run in it")
            if message["kind"] in ("reply", "error"):
                with self._changed:
                    self._current = None
                    self._changed.notify_all()
            self._node.sendall(frame)

    def ready(self) -> None:
        """Says so. The message is made already: many a process says nothing else for long, and is to write to
        as little memory as it can."""
        with self._sending:
            self._node.sendall(_READY)

    def next(self) -> Message | None:
        """A "turn" or "warm". None when the node has closed."""
        self._read_until(lambda: self._next is not None)
        with self._changed:
            asked, self._next = self._next, None
            self._current = asked.get("id") if asked else None
            self._results.clear()
        return asked

    def ask(self, message: Message) -> Message:
        """The node's answer to `message`, a "run", "call" or "done"."""
        self.emit(message)
        wanted = _ANSWERS[message["kind"]]
        what = (wanted, message[_NAMES[wanted]])
        self._read_until(lambda: what in self._results or self._current != message["id"])
        with self._changed:
            answer = self._results.pop(what, None)
        if answer is None:
            told = "the turn ended, and what it waited for with it"
            raise TaskError("TURN_ENDED", told, "") if wanted == "result" else CallError("TURN_ENDED", told)
        return answer

    def _read_until(self, done: Callable[[], bool]) -> None:
        """Or until the node has closed."""
        with self._changed:
            while not (done() or self._over):
                if self._reading:
                    self._changed.wait()
                    continue
                self._reading = True
                self._changed.release()
                payload = None
                try:
                    payload = _receive(self._node)
                finally:
                    self._changed.acquire()
                    self._reading = False
                    self._take(payload)
                    self._changed.notify_all()

    def _take(self, payload: bytes | None) -> None:
        if payload is None:
            self._over = True
            return
        message = json.loads(payload)
        if message["kind"] in _NEXT:
            self._next = message
        elif message["kind"] in _NAMES and message["id"] == self._current:
            self._results[message["kind"], message[_NAMES[message["kind"]]]] = message
        # Other kinds are a newer node's: not for this SDK.


def _receive(node: socket.socket) -> bytes | None:
    """The next message, or None when the other side has closed."""
    header = _read_exactly(node, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME:
        raise ValueError(f"the node sent a message of {length} bytes; at most {MAX_FRAME} are allowed")
    return _read_exactly(node, length)


def _read_exactly(node: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = node.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


def _frame(message: Message) -> bytes:
    """As it is sent, in UTF-8; lone surrogates, which UTF-8 can't carry, become question marks."""
    payload = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    if len(payload) > MAX_FRAME:
        raise ValueError(f"a message of {len(payload)} bytes is over the limit of {MAX_FRAME >> 20} MiB")
    return _LENGTH.pack(len(payload)) + payload


_READY = _frame({"kind": "ready"})

"""What a node is to an agent that runs in the test's own process."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any


class Node:
    """The node's end of an agent's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.settimeout(10)

    def send(self, **message: Any) -> None:
        payload = json.dumps(message).encode()
        self._sock.sendall(struct.pack(">I", len(payload)) + payload)

    def receive(self) -> dict[str, Any]:
        (length,) = struct.unpack(">I", self._read(4))
        message = json.loads(self._read(length))
        assert isinstance(message, dict)
        return message

    def turn(self, message: str, turn_id: str = "t", user: str = "ana") -> list[dict[str, Any]]:
        """All that the agent says in a turn; the last is its reply or error."""
        self.send(kind="turn", id=turn_id, user=user, message=message)
        said = [self.receive()]
        while said[-1]["kind"] == "delta":
            said.append(self.receive())
        return said

    def close(self) -> None:
        self._sock.close()

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = self._sock.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return data


Serve = Callable[..., Node]

"""Sockets of a jail's network namespace for the daemon: docs/decisions/0004-no-veth.md.

    daemon -> init  {"do": "listen", "port"}   answered with a listening socket of 127.0.0.1:port inside
                    {"do": "connect", "port"}  answered with a socket that connects to 127.0.0.1:port inside

Init waits for nobody: an agent that listens but does not accept holds up its own callers alone, who wait
outside. Stdlib only, for init runs it.
"""

from __future__ import annotations

import errno
import os
import socket

from edge_agent.jail.wire import Body

_ADDRESS = "127.0.0.1"
_BACKLOG = 128  # connections that nobody has accepted yet

REQUESTS = ("listen", "connect")
IN_USE, REFUSED = "in use", "refused"  # kinds of errors


def answer(request: Body) -> tuple[Body, tuple[int, ...]]:
    """The answer's body, and the descriptor that goes with it."""
    port = request.get("port")
    if type(port) is not int or not 1 <= port <= 65_535:
        return _error("nonsense", f"{port!r} is no port: use 1 to 65535")
    try:
        sock = _listen(port) if request["do"] == "listen" else _connect(port)
    except OSError as error:
        kind = {errno.EADDRINUSE: IN_USE, errno.ECONNREFUSED: REFUSED}.get(error.errno or 0, "failed")
        return _error(kind, f"{request['do']} at {_ADDRESS}:{port} inside: {os.strerror(error.errno or 0)}")
    return {"ok": {}}, (sock.detach(),)


def _listen(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        # A new daemon listens again where connections of the last one may still linger.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_ADDRESS, port))
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _connect(port: int) -> socket.socket:
    """Perhaps not connected yet: that can take as long as the agent likes."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    problem = sock.connect_ex((_ADDRESS, port))
    if problem not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(problem, os.strerror(problem))
    return sock


def _error(kind: str, message: str) -> tuple[Body, tuple[int, ...]]:
    return {"error": {"kind": kind, "message": message, "hint": ""}}, ()

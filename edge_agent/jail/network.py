"""Sockets of a jail's network namespace, for the daemon: docs/decisions/0004-no-veth.md.

The jailer makes them: it enters the namespace, makes the socket there, for life, and goes back. What must
hold: whatever becomes of the socket, the jailer is in its own namespace again when it does anything else.
How it can fail: the jail has ended, or the port is taken; if the way back is refused, the jailer ends at
once, and all jails with it.

The jailer waits for nobody: an agent that listens but does not accept holds up its own callers alone, who
wait outside.
"""

from __future__ import annotations

import errno
import logging
import os
import socket

from edge_agent.jail import kernel
from edge_agent.jail.protocol import Connect, Listen, Refused

log = logging.getLogger(__name__)

_ADDRESS = "127.0.0.1"
_BACKLOG = 128  # connections that nobody has accepted yet


class Networks:
    """`own`: a descriptor of the network namespace that this process is in."""

    def __init__(self, own: int | None = None) -> None:
        self._own = _namespace_of("self") if own is None else own

    def socket_in(self, pid: int, request: Listen | Connect) -> int:
        """Made where process `pid` is; the descriptor is the caller's. Refused."""
        do = listen if isinstance(request, Listen) else connect
        what = f"{request.do} at {_ADDRESS}:{request.port} in jail {request.jail_id}"
        try:
            namespace = _namespace_of(str(pid))
            try:
                kernel.enter_namespace(namespace, kernel.CLONE_NEWNET)
                try:
                    return do(request.port).detach()
                finally:
                    self._go_back()
            finally:
                os.close(namespace)
        except OSError as error:
            hint = "something of the agent listens there" if error.errno == errno.EADDRINUSE else ""
            raise Refused(f"{what}: {os.strerror(error.errno or 0)}", hint) from error

    def _go_back(self) -> None:
        try:
            kernel.enter_namespace(self._own, kernel.CLONE_NEWNET)
        except BaseException:
            log.exception("there is no way back out of a jail's network: the node ends")
            os.abort()


def listen(port: int) -> socket.socket:
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


def connect(port: int) -> socket.socket:
    """Perhaps not connected yet: that can take as long as the agent likes."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setblocking(False)
    problem = sock.connect_ex((_ADDRESS, port))
    if problem not in (0, errno.EINPROGRESS):
        sock.close()
        raise OSError(problem, os.strerror(problem))
    return sock


def _namespace_of(process: str) -> int:
    return os.open(f"/proc/{process}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

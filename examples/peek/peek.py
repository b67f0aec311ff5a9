"""Tries to look at what is not its own, and says how far it came. Used by `make demo`."""

import os
import socket

from roost import Agent

agent = Agent()


def _look(path):
    try:
        return f"{path}: {', '.join(sorted(os.listdir(path))) or 'empty'}"
    except OSError as error:
        return f"{path}: {error.strerror}"


def _call(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return f"network: {error.strerror or error}"
    return f"network: {host} can be reached"


@agent.turn
def peek(turn):
    """The message is a path on the host that holds other users' files."""
    processes = [name for name in os.listdir("/proc") if name.isdecimal()]
    yield _look(turn.message) + "\n"
    yield _look("/state") + "\n"
    yield f"processes that it sees: {len(processes)} (itself), uid {os.getuid()}\n"
    yield _call("192.0.2.1", 80)

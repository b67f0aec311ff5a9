"""How a daemon lives: named tasks in one group, a stop event that signals set, and systemd told of it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


class ServiceEnded(RuntimeError):
    """A service that should run until the daemon stops has returned: a bug."""


async def _forever(name: str, service: Coroutine[Any, Any, object]) -> None:
    await service
    raise ServiceEnded(f"service {name} returned")


class Services:
    """The daemon's background tasks. Leaving the block cancels them; one that fails ends the daemon."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Services:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*exc)

    def start(self, name: str, service: Coroutine[Any, Any, object]) -> None:
        self._tasks.append(self._group.create_task(_forever(name, service), name=name))


async def wait_for_stop(stop: asyncio.Event) -> None:
    """Waits for SIGTERM, SIGINT or `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def notify(state: str) -> None:
    """Tells the service manager, e.g. `READY=1`; without one (no NOTIFY_SOCKET) it does nothing.

    The protocol of sd_notify(3): one datagram to a unix socket, `@` meaning the abstract namespace.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        try:
            s.connect("\0" + address[1:] if address.startswith("@") else address)
            s.sendall(state.encode())
        except OSError as error:
            log.warning("the service manager can't be told %r: %s", state, error)


async def retry_until(
    deadline: float, attempt: Callable[[float], Awaitable[T]], retriable: Callable[[Exception], bool]
) -> T:
    """Calls `attempt(seconds left)` until it succeeds; backs off 50 ms, doubling to 1 s.

    `deadline` is on the running loop's clock; the last error is raised when it has passed.
    """
    loop = asyncio.get_running_loop()
    pause = 0.05
    while True:
        try:
            return await attempt(max(0.01, deadline - loop.time()))
        except Exception as error:
            if not retriable(error) or loop.time() + pause >= deadline:
                raise
        await asyncio.sleep(pause)
        pause = min(1.0, pause * 2)

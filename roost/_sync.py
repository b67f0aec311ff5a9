"""The client for programs without an event loop: the async one, run on a loop of its own in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Sequence
from typing import Any, TypeVar

from roost._async import TURN_TIMEOUT, AsyncChat, AsyncClient
from roost._types import Event, Reply

T = TypeVar("T")

_CANCEL_TIMEOUT = 5.0  # seconds for an interrupted call to clean up


class Client:
    """As `AsyncClient`, without async. Close it, or use it in a `with` block."""

    def __init__(
        self,
        coordinators: Sequence[str] | None = None,
        tenant: str = "default",
        position: tuple[float, float] | None = None,
    ) -> None:
        self._client = AsyncClient(coordinators, tenant, position)
        self._loop = _LoopThread()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.stopped:
            self._loop.run(self._client.close())
            self._loop.stop()

    def attach(self, agent: str, user: str) -> Chat:
        return Chat(self._client.attach(agent, user), self._loop)


class Chat:
    """As `AsyncChat`, without async."""

    def __init__(self, chat: AsyncChat, loop: _LoopThread) -> None:
        self._chat = chat
        self._loop = loop

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def close(self) -> None:
        self._loop.run(self._chat.close())

    def cancel(self) -> None:
        """As `AsyncChat.cancel`; from any thread, or from a signal's handler."""
        self._loop.call(self._chat.cancel)

    def send(
        self,
        message: str,
        turn_id: str | None = None,
        timeout: float = TURN_TIMEOUT,
        cancel_if_left: bool = False,
    ) -> Reply:
        """As `AsyncChat.send`. KeyboardInterrupt, too, is leaving it."""
        return self._loop.run(self._chat.send(message, turn_id, timeout, cancel_if_left))

    def stream(
        self,
        message: str,
        turn_id: str | None = None,
        timeout: float = TURN_TIMEOUT,
        cancel_if_left: bool = False,
    ) -> Generator[Event, None, None]:
        events = self._chat.stream(message, turn_id, timeout, cancel_if_left)
        try:
            while (event := self._loop.run(_next(events))) is not None:
                yield event
        finally:
            self._loop.run(events.aclose())


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


class _LoopThread:
    """An event loop in a daemon thread. An interrupt of the caller cancels what it waits for."""

    def __init__(self) -> None:
        # A Runner ends what is left in the loop before it closes it; grpc.aio has tasks of its own there.
        # Named by its factory, the loop does not become that of the caller's thread.
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._run, name="roost-client", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._loop.run_forever()
        self._runner.close()  # here, since the caller's thread may have a loop that runs

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        finished = threading.Event()

        async def tracked() -> T:
            try:
                return await coroutine
            finally:
                finished.set()

        future = asyncio.run_coroutine_threadsafe(tracked(), self._loop)
        try:
            return future.result()
        except BaseException:
            if future.cancel():  # the caller was interrupted, and the coroutine still runs
                finished.wait(_CANCEL_TIMEOUT)
            raise

    def call(self, function: Callable[[], None]) -> None:
        """In its thread, soon."""
        self._loop.call_soon_threadsafe(function)

    @property
    def stopped(self) -> bool:
        return self._loop.is_closed()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

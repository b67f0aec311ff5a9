"""The jailer's event loop: descriptors, timers, signals and children, all in one thread that never blocks."""

from __future__ import annotations

import functools
import heapq
import itertools
import logging
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

Callback = Callable[[], None]


class Watched(Protocol):
    """A `Wire`, or what is read in the same way."""

    @property
    def wants_write(self) -> bool: ...

    def fileno(self) -> int: ...


class Timer:
    """A call that is due; `cancel` it, or let it come."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """`run` calls back until `stop`. Children are reaped here; `on_child` says who wants to know."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._signals: dict[int, Callback] = {}
        self._children: dict[int, Callable[[int], None]] = {}
        self._watched: dict[Watched, Callback] = {}
        self._stopped = False

    def watch(self, watched: Watched, callback: Callback) -> None:
        """Calls back when `watched` can be read, or, while it has something queued, written."""
        self._watched[watched] = callback
        self._selector.register(watched, selectors.EVENT_READ, watched)
        self.refresh(watched)

    def unwatch(self, watched: Watched) -> None:
        """Before it is closed. Not being watched is fine."""
        if self._watched.pop(watched, None) is not None:
            self._selector.unregister(watched)

    def refresh(self, watched: Watched) -> None:
        """After it was sent to: a peer that does not read is not read from either."""
        if watched in self._watched:
            events = selectors.EVENT_WRITE if watched.wants_write else selectors.EVENT_READ
            self._selector.modify(watched, events, watched)

    def after(self, seconds: float, callback: Callback) -> Timer:
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), timer))
        return timer

    def on_signal(self, number: signal.Signals, callback: Callback) -> None:
        self._signals[number] = callback

    def on_child(self, pid: int, callback: Callable[[int], None]) -> None:
        """Calls back with the exit code (or -signal) of child `pid`, which must not be waited for."""
        self._children[pid] = callback

    def forget_child(self, pid: int) -> None:
        self._children.pop(pid, None)

    def knows(self, pid: int) -> bool:
        return pid in self._children

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, *self._signals):
            signal.signal(number, lambda *_: None)
        self._selector.register(woken, selectors.EVENT_READ, None)
        self._reap()  # those who ended before we listened
        try:
            while not self._stopped:
                self._turn(woken)
        finally:
            signal.set_wakeup_fd(-1)
            woken.close()
            wake.close()
            self._selector.close()

    def _turn(self, woken: socket.socket) -> None:
        for key, _ in self._selector.select(self._patience()):
            if key.data is None:
                self._take_signals(woken)
                continue
            callback = self._watched.get(key.data)
            if callback is not None:  # else: an earlier callback of this turn dropped it
                _guarded(callback)
                self.refresh(key.data)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                _guarded(timer.callback)

    def _patience(self) -> float | None:
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def _take_signals(self, woken: socket.socket) -> None:
        try:
            numbers = woken.recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if number == signal.SIGCHLD:
                self._reap()
            elif number in self._signals:
                _guarded(self._signals[number])

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            callback = self._children.pop(pid, None)
            if callback is not None:
                _guarded(functools.partial(callback, os.waitstatus_to_exitcode(status)))


def _guarded(callback: Callback) -> None:
    """What goes wrong with one jail must not end the jailer, and with it all the others."""
    try:
        callback()
    except Exception:
        log.exception("a bug in the jailer; it goes on")

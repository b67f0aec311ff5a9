"""A jail's init: pid 1 of its pid namespace, root of its user namespace and nobody outside.

It is forked from the jailer and never executes anything itself. It serves the jail's files, starts the
agent, reaps orphans, and ends when the agent's process ends or the jailer does; the kernel then ends all that
is left in the namespace. Two sockets: `supervisor` to the jailer, for life; `control` to the daemon, which is
replaced when a new daemon adopts the jail.

    jailer -> init  {"do": "control"} with a socket; {"do": "agent ended", "code"} of one that a zygote forked
    init -> jailer  {"step": ...} while it is made (see `spawn`), then {"ended": code, "stderr_tail": ...}
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from typing import NoReturn

from edge_agent.jail.agent_process import Descriptors, start_agent
from edge_agent.jail.file_server import FileServer
from edge_agent.jail.output import Output, to_stderr
from edge_agent.jail.protocol import Make, Refused
from edge_agent.jail.wire import Body, Closed, Garbage, Wire
from edge_agent.state.tree import Tree

_LAST_WORDS_SECONDS = 2.0


class Init:
    """`turn` and `cgroups` are descriptors for the agent, which are closed here once it runs. Without `turn`
    a zygote will fork the agent, and the jailer say when it ends."""

    def __init__(
        self,
        request: Make,
        supervisor: Wire,
        turn: int | None,
        cgroups: tuple[int, ...],
        owner: tuple[int, int],
    ) -> None:
        self._request = request
        self._supervisor = supervisor
        self._control: Wire | None = None
        self._turn = turn
        self._cgroups = cgroups
        root = os.open("/state", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = FileServer(Tree(root, owner))
        self._agent: int | None = None
        self._output: Output | None = None
        self._selector = selectors.DefaultSelector()

    def serve(self) -> NoReturn:
        """Until the agent or the jailer ends."""
        woken, wake = socket.socketpair()
        woken.setblocking(False)
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._reap(woken))
        self._selector.register(self._supervisor, selectors.EVENT_READ, self._hear_jailer)
        while True:
            for key, _ in self._selector.select():
                key.data()
            if self._control is not None:
                self._watch_control(self._control)

    def _watch_control(self, control: Wire) -> None:
        # Not read while answers wait to be sent: a daemon that only asks must not fill this jail's memory.
        events = selectors.EVENT_WRITE if control.wants_write else selectors.EVENT_READ
        self._selector.modify(control, events, self._hear_daemon)

    def _hear_jailer(self) -> None:
        try:
            frames = self._supervisor.receive()
        except (Closed, Garbage):
            os._exit(1)  # the jailer is gone, and with it everybody who could end this jail
        for frame in frames:
            if frame.body.get("do") == "agent ended":
                self._end(int(frame.body["code"]))
            if frame.body.get("do") == "control" and len(frame.fds) == 1:
                self._drop_control()
                self._control = Wire(socket.socket(fileno=frame.fds[0]))
                self._selector.register(self._control, selectors.EVENT_READ, self._hear_daemon)

    def _drop_control(self) -> None:
        if self._control is not None:
            self._selector.unregister(self._control)
            self._control.close()
            self._control = None
            self._files.forget_writes()

    def _hear_daemon(self) -> None:
        control = self._control
        if control is None:
            return
        try:
            control.flush()
            if control.wants_write:
                return
            for frame in control.receive():
                frame.close()
                self._answer(control, frame.body)
        except (Closed, Garbage):
            self._drop_control()

    def _answer(self, control: Wire, request: Body) -> None:
        if request.get("do") != "start":
            for body, fds in self._files.answer(request):
                control.send({"id": request.get("id"), **body}, fds)
            return
        try:
            self._start()
            control.send({"id": request.get("id"), "ok": {}})
        except Refused as refused:
            control.send({"id": request.get("id"), "error": {"kind": "failed", **refused.body()}})

    def _start(self) -> None:
        if self._agent is not None:
            raise Refused("the agent of this jail was started already")
        if self._turn is None:
            raise Refused("the agent of this jail is forked by a zygote")
        readable, writable = os.pipe2(os.O_CLOEXEC)
        try:
            self._agent = start_agent(self._request, Descriptors(self._turn, self._cgroups, writable))
        except BaseException:
            os.close(readable)
            raise
        finally:
            os.close(writable)
        # The last copy outside of the agent: from now on its end is the socket's end.
        for fd in (self._turn, *self._cgroups):
            os.close(fd)
        self.read_output(readable)

    def read_output(self, fd: int) -> None:
        """`fd`: the end of a pipe, of which the agent has the other."""
        self._output = Output(fd, self._request.jail_id, to_stderr)
        self._selector.register(fd, selectors.EVENT_READ, self._read_output)

    def _read_output(self) -> None:
        if self._output is not None and not self._output.read():
            self._selector.unregister(self._output.fd)

    def _reap(self, woken: socket.socket) -> None:
        with suppress(BlockingIOError):
            woken.recv(4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._agent:
                self._end(os.waitstatus_to_exitcode(status))

    def _end(self, code: int) -> NoReturn:
        tail = ""
        if self._output is not None:
            self._output.drain()
            tail = self._output.tail
        with suppress(Closed):
            self._supervisor.send({"ended": code, "stderr_tail": tail})
            flush_within(self._supervisor, _LAST_WORDS_SECONDS)
        os._exit(0)


def flush_within(wire: Wire, seconds: float) -> None:
    """Sends all that is queued, or gives up after `seconds`."""
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(wire, selectors.EVENT_WRITE)
        while wire.wants_write and (left := deadline - time.monotonic()) > 0:
            if selector.select(left):
                wire.flush()

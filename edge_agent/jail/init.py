"""The init of a jail whose program is executed: pid 1 of its pid namespace, root of its user namespace and
nobody outside. (That of one that a zygote forks into does nothing: see `spawn_shell` and `file_service`.)

It is forked from the wright and never executes anything itself. It serves the jail's files, starts the
agent, reaps orphans, and ends when the agent's process ends or the jailer does; the kernel then ends all that
is left in the namespace. Two sockets: `supervisor` to the jailer, for life; `control` to the daemon, which is
replaced when a new daemon adopts the jail.

The init of a task, a program that is no agent, hands out the ends of its output, and outlives it so that its
files can be read: it says how the program ended to whoever asks it to "wait".

    jailer -> init  {"do": "control"} with a socket; {"do": "measure"} what is in /state
    init -> jailer  {"step": ...} while it is made (see `spawn`); {"measured": true} if that is not too much;
                    in the end {"ended": code, "stderr_tail": ..., "disk_full": bool}
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import quota
from edge_agent.jail.agent_process import Descriptors, start_agent
from edge_agent.jail.file_server import FileServer
from edge_agent.jail.output import Output, to_stderr
from edge_agent.jail.protocol import AGENT_ID, Make, Refused, Way
from edge_agent.jail.wire import Body, Closed, Garbage, Wire, close_all
from edge_agent.state.tree import Tree, TreeTooLarge, whole

_LAST_WORDS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Program:
    """What to execute. `turn` and `cgroups` are descriptors for the agent, closed here once it runs."""

    request: Make
    turn: int
    cgroups: tuple[int, ...]


class Init:
    """`disk_bytes`: as much may be in /state."""

    def __init__(self, jail_id: str, disk_bytes: int, supervisor: Wire, program: Program) -> None:
        self._jail_id = jail_id
        self._disk_bytes = disk_bytes
        self._supervisor = supervisor
        self._control: Wire | None = None
        self._program = program
        root = os.open("/state", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files = FileServer(Tree(root, (AGENT_ID, AGENT_ID)))
        self._agent: int | None = None
        self._output: Output | None = None
        self._task_code: int | None = None  # how a task has ended
        self._waiting: list[int] = []  # ids of requests that wait for that
        self._selector = selectors.DefaultSelector()

    @property
    def _is_task(self) -> bool:
        return self._program.request.way is Way.TASK

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
            if frame.body.get("do") == "measure":
                self._measure()
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
        if request.get("do") == "wait":
            self._waiting.append(request["id"])
            self._tell_waiting()
            return
        if request.get("do") != "start":
            for step in self._files.answer(request):
                if isinstance(step, tuple):
                    body, fds = step
                    control.send({"id": request.get("id"), **body}, fds)
                elif step is not None:
                    step()
            return
        try:
            control.send({"id": request.get("id"), "ok": {}}, self._start())
        except Refused as refused:
            control.send({"id": request.get("id"), "error": {"kind": "failed", **refused.body()}})

    def _start(self) -> tuple[int, ...]:
        """What the daemon gets: the ends of a task's standard output and error."""
        if self._agent is not None:
            raise Refused("the agent of this jail was started already")
        if self._is_task:
            return self._start_task(self._program)
        request, turn, cgroups = self._program.request, self._program.turn, self._program.cgroups
        readable, writable = os.pipe2(os.O_CLOEXEC)
        try:
            self._agent = start_agent(request, Descriptors(turn, cgroups, writable, writable))
        except BaseException:
            os.close(readable)
            raise
        finally:
            os.close(writable)
        # The last copy outside of the agent: from now on its end is the socket's end.
        for fd in (turn, *cgroups):
            os.close(fd)
        self._keep_output(readable)
        return ()

    def _start_task(self, program: Program) -> tuple[int, ...]:
        output, errors = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        try:
            for _, writable in (output, errors):
                os.fchown(writable, AGENT_ID, AGENT_ID)  # so that it can open /dev/stdout
            self._agent = start_agent(
                program.request, Descriptors(None, program.cgroups, output[1], errors[1])
            )
        except BaseException:
            close_all((output[0], errors[0]))
            raise
        finally:
            close_all((output[1], errors[1]))
        return output[0], errors[0]

    def _keep_output(self, fd: int) -> None:
        """`fd`: the end of a pipe, of which the agent has the other."""
        self._output = Output(fd, self._jail_id, to_stderr)
        self._selector.register(fd, selectors.EVENT_READ, self._read_output)

    def _read_output(self) -> None:
        if self._output is not None and self._output.read() is None:
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
                code = os.waitstatus_to_exitcode(status)
                if not self._is_task:
                    self._end(code)
                self._task_ended(code)

    def _task_ended(self, code: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)  # whatever it left behind in this pid namespace
        self._task_code = code
        with suppress(Closed):
            self._supervisor.send({"ended": code, "stderr_tail": ""})
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        while self._task_code is not None and self._control is not None and self._waiting:
            self._control.send({"id": self._waiting.pop(), "ok": {"code": self._task_code}})

    def _measure(self) -> None:
        """Ends the jail if there is more in /state than it may have."""
        most = quota.most_taken(self._disk_bytes)
        try:
            over = whole(self._files.taken(most, quota.MAX_FILES)) > most
        except TreeTooLarge:
            over = True
        except OSError:
            over = False  # the disk fails, or descriptors are short: the next time tells
        if over:
            self._end(-signal.SIGKILL, disk_full=True)
        with suppress(Closed):
            self._supervisor.send({"measured": True})

    def _end(self, code: int, disk_full: bool = False) -> NoReturn:
        tail = ""
        if self._output is not None:
            self._output.drain()
            tail = self._output.tail
        with suppress(Closed):
            self._supervisor.send({"ended": code, "stderr_tail": tail, "disk_full": disk_full})
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

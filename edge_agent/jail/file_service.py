"""The process that serves the files of jails that a zygote forked into, and reads what their agents print.

One for a node, since one in each jail would cost megabytes for what takes a millisecond a turn. It is root
with three capabilities (to read and write what agents have protected, and to give files away), in an empty
root of its own, without network, and sees no process but itself, under the system call filter of agents. Each
jail's `/state` comes to it as a mount that is attached nowhere, out of which no path leads; and it follows
neither links nor `..` (`state/tree.py`).

    jailer -> service  {"do": "serve", "jail", "name", "owner", "keeper"} with that mount, and the end of a
                       pipe, of which the agent has the other as its output; `jail` is a number that is used
                       once, `name` is for the log, `owner` is the agent's uid and gid, and `keeper` those of
                       whom files belong to until they are committed: the jail's, but not the agent's
                       {"do": "control", "jail"} with a socket to the daemon, in place of the one before
                       {"do": "measure", "jail", "most"} is there more than so many bytes in /state?
                       {"do": "end", "jail"} its processes have ended
    service -> jailer  {"measured": jail, "over": bool}
                       {"ended": jail, "tail": the last that the agent printed}

What must hold: no request of one jail's reaches another's files; a large tree or a slow disk holds others up
for no longer than _SLICE, or what is done in one piece: a system call that looks something up, the sorting of
one tree's names; output is read at a bounded rate, and who prints more waits; what fails of one jail fails
for that one alone. It ends with the jailer. How it can fail: it is killed; then the jailer ends the jails
that it served, as if their inits had ended.
"""

from __future__ import annotations

import logging
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn

from edge_agent.jail import kernel, quota, roots, seccomp
from edge_agent.jail.file_server import FileServer
from edge_agent.jail.operations import Do, Operation, carry_out
from edge_agent.jail.output import Output, to_stderr
from edge_agent.jail.steps import KeepCapabilities
from edge_agent.jail.wire import Body, Closed, Frame, Garbage, Wire, close_all
from edge_agent.jail.wright import Tools
from edge_agent.state.tree import Tree, TreeTooLarge

log = logging.getLogger(__name__)

SERVE_FILES = b"f"
NAMESPACES: int = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)
_CAPABILITIES = (kernel.CAP_DAC_OVERRIDE, kernel.CAP_CHOWN, kernel.CAP_FOWNER)
_SLICE = 0.002  # seconds, after which others go on
_SPARE = 24  # more than one message brings along
_OUTPUT_BYTES = 8 << 20  # of one agent's output a second; what is printed is mostly dropped anyway

# What is done a slice at a time.
Work = Iterator[Callable[[], None] | None]


def serve_files(tools: Tools, given: bytes, fds: list[int]) -> NoReturn:
    """The wright's job."""
    kernel.set_name("roost-files")
    try:
        carry_out(walls(tools))
        Service(Wire(socket.socket(fileno=fds[0]))).run()
    except Closed:
        os._exit(0)  # the jailer is gone, perhaps before we asked to die with it
    except BaseException:
        log.exception("the file service failed")
    finally:
        os._exit(1)


def walls(tools: Tools) -> tuple[Operation, ...]:
    return (
        *roots.empty_plan(tools.config),
        Do("have as many files open as it may: an agent decides on some hundreds", _raise_limit),
        KeepCapabilities(_CAPABILITIES),
        Do("set no_new_privs", kernel.no_new_privs),
        Do("ask to die with the jailer", kernel.die_with_parent),
        Do("filter system calls", lambda: kernel.filter_system_calls(seccomp.agent_filter())),
    )


def _raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(slots=True)
class _Jail:
    """`asked`: what the daemon wants beside what is being answered, which waits while something of it is done
    `aside`. `events`: of `control`, that are waited for. `paused`: until when output is not read, monotonic;
    `printed`: bytes since `since`."""

    number: int
    name: str
    root: int
    files: FileServer
    output: Output
    control: Wire | None = None
    events: int = 0
    asked: list[Body] = field(default_factory=list)
    answering: Work | None = None
    aside: bool = False
    measuring: Work | None = None
    paused: float = 0.0
    since: float = 0.0
    printed: int = 0

    @property
    def waits_for_daemon(self) -> bool:
        """It must read first: one that only asks must not fill our memory."""
        return self.control is not None and self.control.wants_write


class Service:
    def __init__(self, jailer: Wire) -> None:
        self._jailer = jailer
        # By their numbers.
        self._jails: dict[int, _Jail] = {}
        self._busy: dict[int, _Jail] = {}  # have work that can go on
        self._paused: dict[int, _Jail] = {}
        self._spare: list[int] = []  # descriptors that are kept free for what the jailer gives
        self._back: list[_Jail] = []  # for whom something was done aside
        woken, self._wake = os.pipe2(os.O_CLOEXEC)
        self._fill_spare()
        self._selector = selectors.DefaultSelector()
        self._selector.register(woken, selectors.EVENT_READ, lambda: self._come_back(woken))
        self._selector.register(jailer, selectors.EVENT_READ, self._hear_jailer)

    def run(self) -> NoReturn:
        """Until the jailer ends: Closed."""
        while True:
            self.turn(self._patience())

    def turn(self, patience: float | None) -> None:
        """Does what there is to do, a slice for each jail, or waits for it for `patience` seconds."""
        for key, _ in self._selector.select(patience):
            key.data()
        for jail in list(self._busy.values()):
            self._alone(jail, self._work)
        for jail in [jail for jail in self._paused.values() if jail.paused <= time.monotonic()]:
            del self._paused[jail.number]
            self._watch_output(jail)

    def _patience(self) -> float | None:
        if self._busy:
            return 0.0
        if not self._paused:
            return None
        return max(0.0, min(jail.paused for jail in self._paused.values()) - time.monotonic())

    # --- the jailer --------------------------------------------------------------------------------------

    def _alone(self, jail: _Jail, work: Callable[[_Jail], None]) -> None:
        """What goes wrong with one jail costs that one what it was asked, and no other anything."""
        if self._jails.get(jail.number) is not jail:
            return  # it was ended just now
        try:
            work(jail)
        except Closed:
            raise  # the jailer is gone
        except Exception:
            log.exception("a bug in the file service; it goes on without what jail %s was asked", jail.name)
            if jail.measuring is not None:
                jail.measuring = None
                self._tell({"measured": jail.number, "over": False})
            self._drop_control(jail)

    def _hear_jailer(self) -> None:
        self._jailer.flush()
        close_all(self._spare)  # what comes along must find room
        self._spare.clear()
        for frame in self._jailer.receive():
            self._take(frame)
            self._keep_spare(frame.body["jail"])
        with suppress(OSError):  # as many as there are
            self._fill_spare()
        self._watch_jailer()

    def _keep_spare(self, number: int) -> None:
        """Where no descriptors are left, the jail that was heard of last is given up, rather than all."""
        try:
            self._fill_spare()
        except OSError as error:
            if number in self._jails:
                log.error("jail %s is served no more: %s", self._jails[number].name, error)  # noqa: TRY400
                self._end(self._jails[number])

    def _fill_spare(self) -> None:
        while len(self._spare) < _SPARE:
            self._spare.append(os.dup(self._wake))

    def _watch_jailer(self) -> None:
        """It is read from even while it does not read: it does not before all that it says is read, and else
        both would wait for each other."""
        writing = selectors.EVENT_WRITE if self._jailer.wants_write else 0
        self._selector.modify(self._jailer, selectors.EVENT_READ | writing, self._hear_jailer)

    def _take(self, frame: Frame) -> None:
        number, fds = frame.body["jail"], frame.fds
        match frame.body["do"]:
            case "serve":
                self._serve(number, frame.body, *fds)
            case "control":
                self._take_control(self._jails[number], *fds)
            case "measure":
                jail = self._jails[number]
                jail.measuring = self._measure(jail, frame.body["most"])
                self._go_on(jail)
            case "end":
                self._end(self._jails[number])

    def _tell(self, body: Body) -> None:
        self._jailer.send(body)
        self._watch_jailer()

    def _serve(self, number: int, body: Body, root: int, output: int) -> None:
        name, owner, keeper = body["name"], body["owner"], body["keeper"]
        files = FileServer(Tree(root, (owner, owner), (keeper, keeper)))
        jail = self._jails[number] = _Jail(number, name, root, files, Output(output, name, to_stderr))
        self._watch_output(jail)

    def _take_control(self, jail: _Jail, fd: int) -> None:
        self._drop_control(jail)
        jail.control = Wire(socket.socket(fileno=fd))
        self._watch(jail)

    def _measure(self, jail: _Jail, most: int) -> Work:
        over = False
        try:
            over = (yield from jail.files.taken(most, quota.MAX_FILES)) > most
        except TreeTooLarge:
            over = True
        except OSError:
            pass  # the disk fails, or descriptors are short: the next time tells
        self._tell({"measured": jail.number, "over": over})

    def _end(self, jail: _Jail) -> None:
        self._alone(jail, self._finish)
        del self._jails[jail.number]
        self._busy.pop(jail.number, None)
        close_all((jail.output.fd, jail.root))
        self._tell({"ended": jail.number, "tail": jail.output.tail})

    def _finish(self, jail: _Jail) -> None:
        jail.measuring = None
        self._unwatch_output(jail)
        self._drop_control(jail)
        jail.output.drain()

    # --- the daemon --------------------------------------------------------------------------------------

    def _hear_daemon(self, jail: _Jail) -> None:
        control = jail.control
        if control is None:
            return
        try:
            control.flush()
            if not (control.wants_write or jail.asked or jail.answering):
                for frame in control.receive():
                    frame.close()
                    jail.asked.append(frame.body)
        except (Closed, Garbage):
            self._drop_control(jail)
            return
        self._go_on(jail)

    def _go_on(self, jail: _Jail) -> None:
        answers = (jail.answering or jail.asked) and not (jail.waits_for_daemon or jail.aside)
        if jail.measuring or answers:
            self._busy[jail.number] = jail
        else:
            self._busy.pop(jail.number, None)
        self._watch(jail)

    def _work(self, jail: _Jail) -> None:
        """A slice of what there is."""
        if jail.answering is None and jail.asked:
            jail.answering = self._answer(jail, jail.asked.pop(0))
        goes_on = jail.answering is not None and not (jail.waits_for_daemon or jail.aside)
        if goes_on and self._advance(jail, jail.answering):
            jail.answering = None
        if jail.measuring is not None and self._advance(jail, jail.measuring):
            jail.measuring = None
        self._go_on(jail)

    def _advance(self, jail: _Jail, work: Work | None) -> bool:
        """Has it ended?"""
        until = time.monotonic() + _SLICE
        for to_do in work or ():
            if to_do is not None and self._begin_aside(jail, to_do):
                return False
            if jail.waits_for_daemon or time.monotonic() >= until:
                return False
        return True

    def _begin_aside(self, jail: _Jail, to_do: Callable[[], None]) -> bool:
        try:
            threading.Thread(target=self._do_aside, args=(jail, to_do)).start()
        except RuntimeError:  # there can be no more threads
            to_do()
            return False
        jail.aside = True
        return True

    def _do_aside(self, jail: _Jail, to_do: Callable[[], None]) -> None:
        """In a thread of its own."""
        try:
            to_do()
        finally:
            self._back.append(jail)
            os.write(self._wake, b".")

    def _come_back(self, woken: int) -> None:
        os.read(woken, 1)
        jail = self._back.pop()
        jail.aside = False
        self._alone(jail, self._go_on)

    def _answer(self, jail: _Jail, request: Body) -> Work:
        control = jail.control
        assert control is not None  # else this would have been dropped
        for step in jail.files.answer(request):
            if not isinstance(step, tuple):
                yield step
                continue
            body, fds = step
            try:
                control.send({"id": request.get("id"), **body}, fds)
            except Closed:
                self._drop_control(jail)
                return
            yield None

    def _watch(self, jail: _Jail) -> None:
        control = jail.control
        if control is None:
            return
        if control.wants_write:
            events = selectors.EVENT_WRITE
        else:
            events = 0 if jail.asked or jail.answering else selectors.EVENT_READ
        if events == jail.events:
            return
        if jail.events:
            self._selector.unregister(control)
        if events:
            self._selector.register(control, events, lambda: self._alone(jail, self._hear_daemon))
        jail.events = events

    def _drop_control(self, jail: _Jail) -> None:
        if jail.control is None:
            return
        if jail.events:
            self._selector.unregister(jail.control)
        jail.control.close()
        jail.control, jail.events = None, 0
        jail.asked.clear()
        jail.answering = None
        jail.files.forget_writes()

    # --- output ------------------------------------------------------------------------------------------

    def _watch_output(self, jail: _Jail) -> None:
        self._selector.register(
            jail.output.fd, selectors.EVENT_READ, lambda: self._alone(jail, self._read_output)
        )

    def _unwatch_output(self, jail: _Jail) -> None:
        self._paused.pop(jail.number, None)
        with suppress(KeyError):  # it is paused, or has come to its end
            self._selector.unregister(jail.output.fd)

    def _read_output(self, jail: _Jail) -> None:
        now = time.monotonic()
        if now - jail.since >= 1.0:
            jail.since, jail.printed = now, 0
        read = jail.output.read()
        if read is None:
            self._unwatch_output(jail)
            return
        jail.printed += read
        if jail.printed >= _OUTPUT_BYTES:
            self._unwatch_output(jail)
            jail.paused = jail.since + 1.0
            self._paused[jail.number] = jail

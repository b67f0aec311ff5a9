"""The wright forks all that the jailer makes: docs/decisions/0009-wright.md says why.

It is forked from the jailer when that has made nothing yet, and then does nothing but clone itself when it is
told to, into children of the jailer. So its pages stay as they are, and all that it has made shares them.

    jailer -> wright  one packet: `_HEADER`, what the job is given; descriptors beside it, the cgroup's last
    wright -> jailer  one packet: the pid, or -errno

What must hold: it has one thread, no child, and no descriptor of a jail or a daemon; what it makes dies with
the jailer, as if that had made it. How it can fail: it is killed; then there is a new one, forked from what
the jailer is by then, and only what was being forked has failed.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.roots import System
from edge_agent.jail.wire import close_all

log = logging.getLogger(__name__)

_HEADER = struct.Struct("=cQ?")  # the job; the clone's flags; does a cgroup come along?
_PID = struct.Struct("=i")
_SECONDS = 5.0  # for a clone
_MAX_JOB, _MAX_FDS = 128 << 10, 8
# Blocked, and not ignored: what it makes inherits that, and whoever executes a program clears the mask.
_BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Tools:
    """What every job works with, in the wright's memory from the start."""

    config: JailerConfig
    system: System
    cgroups: Cgroups
    jailer: int  # pid


# What a new child does with the bytes and the descriptors that it is given.
Job = Callable[[Tools, bytes, list[int]], NoReturn]


class Wright:
    """The jailer's end. `jobs` by their names, of one byte each. `on_child` is told who wants to know when a
    child of the jailer's has ended."""

    def __init__(
        self,
        tools: Tools,
        jobs: Mapping[bytes, Job],
        on_child: Callable[[int, Callable[[int], None]], None],
    ) -> None:
        self._tools = tools
        self._jobs = jobs
        self._on_child = on_child
        self._stopped = False
        self._start()

    def spawn(
        self, job: bytes, given: bytes, fds: tuple[int, ...], flags: int = 0, group: int | None = None
    ) -> int:
        """The pid of a new child of the jailer's that runs `job` with copies of `fds`. It is cloned with
        `flags`, into the cgroup that `group` has open. OSError if there can be none."""
        packet = _HEADER.pack(job, flags, group is not None) + given
        given_away = fds if group is None else (*fds, group)
        try:
            socket.send_fds(self._sock, [packet], given_away)
        except ConnectionError:  # it was killed, and that was not heard of yet
            self._replace()
            socket.send_fds(self._sock, [packet], given_away)
        try:
            answer = self._sock.recv(_PID.size)
        except (TimeoutError, ConnectionError):  # it stands still, or ended before it had read all
            answer = b""
        if not answer:  # it may have made the child; whoever closes its other ends ends that
            self._replace()
            raise OSError(errno.ECHILD, "the wright ended as it forked; there is a new one")
        (pid,) = _PID.unpack(answer)
        if pid < 0:
            raise OSError(-pid, os.strerror(-pid))
        return int(pid)

    def close(self) -> None:
        """What it has made stays."""
        self._stopped = True
        self._sock.close()
        self._kill()
        with suppress(ChildProcessError):  # the loop may have been quicker
            os.waitpid(self.pid, 0)

    def _start(self) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(_SECONDS)
        gc.collect()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            _work(theirs, self._tools, self._jobs)
        theirs.close()
        pid = self.pid
        self._on_child(pid, lambda code: self._ended(pid, code))

    def _ended(self, pid: int, code: int) -> None:
        if pid == self.pid and not self._stopped:
            log.error("the wright ended with %d; there is a new one", code)
            self._sock.close()
            self._start()

    def _replace(self) -> None:
        """Its end, if it has not ended by itself, is noticed later, and is then nothing new."""
        self._kill()
        self._sock.close()
        self._start()

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def _work(sock: socket.socket, tools: Tools, jobs: Mapping[bytes, Job]) -> NoReturn:
    try:
        _forget_jailer(sock.fileno())
        kernel.die_with_parent()
        if os.getppid() == tools.jailer:  # else: it died before we asked to die with it
            _serve(sock, tools, jobs)
    except BaseException:
        log.exception("the wright failed")
    finally:
        os._exit(1)


def _serve(sock: socket.socket, tools: Tools, jobs: Mapping[bytes, Job]) -> None:
    while True:
        packet, fds, _, _ = socket.recv_fds(sock, _MAX_JOB, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not packet:
            return
        job, flags, grouped = _HEADER.unpack_from(packet)
        try:
            pid = kernel.clone(flags | kernel.CLONE_PARENT, fds[-1] if grouped else None)
        except OSError as error:
            pid = -(error.errno or errno.EIO)
        if pid == 0:
            sock.close()
            if grouped:
                os.close(fds.pop())
            kernel.set_name("roost-init")
            jobs[job](tools, packet[_HEADER.size :], fds)
        close_all(fds)
        sock.send(_PID.pack(pid))


def _forget_jailer(kept: int) -> None:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)
    for number in (*_BLOCKED, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 20)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for standard in (0, 1):
        os.dup2(null, standard)
    os.close(null)
    os.umask(0o022)
    kernel.set_name("roost-wright")

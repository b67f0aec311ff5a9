"""Makes what a zygote needs: itself, and jails that it can fork into. docs/decisions/0007-zygotes.md says why
in this order.

What must hold: all of a jail's mounts are made by real root in a mount namespace that belongs to the initial
user namespace, and become the jail's only by a copy into its own, which locks them.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel, seccomp
from edge_agent.jail.agent_process import default_signals, environment, set_limits
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.init import Init
from edge_agent.jail.plan import Do, Operation, carry_out
from edge_agent.jail.protocol import AGENT_ID, Make, Refused
from edge_agent.jail.spawn import (
    BORN,
    READY,
    Spawned,
    become_init,
    forget_jailer,
    tell_failure,
    wait_readable,
    write_id_maps,
)
from edge_agent.jail.wire import Closed, Garbage, Wire, pair

log = logging.getLogger(__name__)

WIRE_FD = 3  # of a zygote, to the jailer
_OF_INIT: int = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_PARENT
)
_OF_ZYGOTE: int = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
# In the order in which a zygote's child enters them: the first gives it the right to the others.
_ENTERED = ("user", "cgroup", "ipc", "uts", "net", "mnt", "pid")


@dataclass(frozen=True, slots=True)
class Walls:
    """`mounts` are carried out from outside, `names` by init. `owner` is the zygote's uid."""

    mounts: tuple[Operation, ...]
    names: tuple[Operation, ...]
    owner: int
    init_uid: int


def spawn_for_fork(request: Make, walls: Walls, cgroups: Cgroups) -> Spawned:
    """Returns at once, with the pid of the builder. Over the supervisor wire come BORN with the pid of init,
    which is a child of the caller, and then READY, or FAILED."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    supervisor, inner_supervisor = pair()
    turn, inner_turn = pair()
    readable, writable = os.pipe2(os.O_CLOEXEC)
    steps = (
        Do("join the jail's control groups", lambda: cgroups.join(request.jail_id)),
        Do("enter a mount namespace", lambda: kernel.unshare(kernel.CLONE_NEWNS)),
        *walls.mounts,
    )
    group = cgroups.clone_into(request.jail_id)
    try:
        pid = kernel.clone(0, group)
        if pid == 0:
            _Builder(request, walls, steps, Wire(inner_supervisor), readable, progress).run()
    except BaseException:
        supervisor.close()
        turn.close()
        os.close(writable)
        inner_turn.close()
        raise
    finally:
        inner_supervisor.close()
        os.close(readable)
        if group is not None:
            os.close(group)
    return Spawned(pid, Wire(supervisor), turn, steps, progress, (inner_turn.detach(), writable))


class _Builder:
    """The process that builds a jail's walls, and those that it forks."""

    def __init__(
        self,
        request: Make,
        walls: Walls,
        steps: tuple[Operation, ...],
        supervisor: Wire,
        output: int,
        progress: mmap.mmap,
    ) -> None:
        self._request = request
        self._walls = walls
        self._steps = steps
        self._supervisor = supervisor
        self._output = output
        self._progress = progress

    def run(self) -> NoReturn:
        with _nothing_returns(self._supervisor, self._request.jail_id):
            gc.freeze()
            forget_jailer(tuple(sorted((self._supervisor.fileno(), self._output))))
            kernel.die_with_parent()
            self._carry_out(0, 2)
            sysctl = os.open("/proc/sys", os.O_PATH | os.O_CLOEXEC)
            built, tell_built = os.pipe2(os.O_CLOEXEC)
            os.seteuid(self._walls.owner)  # whose the user namespace is to be
            init = kernel.clone(_OF_INIT)
            if init == 0:
                self._init(built, tell_built, sysctl)
            os.seteuid(0)
            self._supervisor.send({"step": BORN, "pid": init})
            write_id_maps(init, self._walls.init_uid)
            namespace = os.open(f"/proc/{init}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
            kernel.enter_namespace(namespace, kernel.CLONE_NEWPID)
            mounter = os.fork()
            if mounter == 0:
                self._mount()
            _, status = os.waitpid(mounter, 0)
            if status == 0:
                os.write(tell_built, b".")
                os._exit(0)
            os._exit(1)  # the mounter has said why

    def _mount(self) -> NoReturn:
        with _nothing_returns(self._supervisor, self._request.jail_id):
            self._carry_out(2, len(self._steps))
            os._exit(0)

    def _init(self, built: int, tell_built: int, sysctl: int) -> NoReturn:
        with _nothing_returns(self._supervisor, self._request.jail_id):
            os.close(tell_built)
            if os.read(built, 1) != b".":
                os._exit(1)  # the builder failed, and has said why
            os.close(built)
            kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWCGROUP)
            os.chdir("/")  # the old one is the host's
            carry_out(self._walls.names)
            become_init(sysctl)
            init = Init(self._request, self._supervisor, None, (), (AGENT_ID, AGENT_ID))
            init.read_output(self._output)
            self._supervisor.send({"step": READY})
            wait_readable(self._supervisor)  # see `spawn`
            init.serve()

    def _carry_out(self, first: int, end: int) -> None:
        carry_out(
            self._steps[first:end], lambda index: self._progress.__setitem__(0, min(255, first + index))
        )


def spawn_zygote(request: Make, plan: tuple[Operation, ...], cgroups: Cgroups, uid: int) -> Spawned:
    """Returns at once. FAILED may come over the wire until the program runs; after that, its own words."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    ours, theirs = pair()
    unused, _ = pair()
    parent = os.getpid()
    opened: list[int] = []
    steps = (
        Do("join the zygote's control groups", lambda: cgroups.join(request.jail_id)),
        Do("open its own control group", lambda: opened.extend(cgroups.open_agent(request.jail_id))),
        Do("enter a cgroup namespace", lambda: kernel.unshare(kernel.CLONE_NEWCGROUP)),
        *plan,
    )
    group = cgroups.clone_into(request.jail_id)
    try:
        pid = kernel.clone(_OF_ZYGOTE, group)
        if pid == 0:
            _zygote(request, steps, theirs, opened, uid, parent)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        if group is not None:
            os.close(group)
    return Spawned(pid, Wire(ours), unused, steps, progress)


def _zygote(
    request: Make, steps: tuple[Operation, ...], sock: socket.socket, opened: list[int], uid: int, parent: int
) -> NoReturn:
    with _nothing_returns(Wire(sock), request.jail_id):
        forget_jailer((sock.fileno(),))
        carry_out(steps)
        for group in opened:
            os.write(group, b"0")
        os.setsid()
        default_signals()
        set_limits()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        kernel.keep_capabilities((kernel.CAP_SETUID,))
        os.setresuid(uid, uid, uid)
        kernel.drop_capabilities()
        kernel.no_new_privs()
        kernel.die_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        os.dup2(1, 2)  # what it has to say comes over its socket, and again when `exec` starts the agent
        os.set_blocking(sock.fileno(), True)
        os.dup2(sock.fileno(), WIRE_FD, inheritable=True)
        os.closerange(WIRE_FD + 1, 1 << 16)
        kernel.filter_system_calls(seccomp.zygote_filter())
        os.execve(request.argv[0], request.argv, {**environment(request), "HOME": "/tmp"})


def open_namespaces(init: int) -> list[int]:
    """Descriptors, in the order in which they are to be entered. OSError if init has ended."""
    opened: list[int] = []
    try:
        for name in _ENTERED:
            opened.append(os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        for fd in opened:
            os.close(fd)
        raise
    return opened


def is_in_jail(pid: int, init: int) -> bool:
    """Is `pid` in the pid namespace of `init`?"""
    with suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid") == os.readlink(f"/proc/{init}/ns/pid")
    return False


class _nothing_returns:  # used as a block
    """Ends this process when the block ends, having told the jailer of what went wrong in it."""

    def __init__(self, supervisor: Wire, jail_id: str) -> None:
        self._supervisor = supervisor
        self._jail_id = jail_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> NoReturn:
        try:
            if isinstance(error, Refused):
                tell_failure(self._supervisor, error)
            elif error is not None and not isinstance(error, (Closed, Garbage, TimeoutError)):
                log.error("a process that makes jail %s failed", self._jail_id, exc_info=error)
                tell_failure(
                    self._supervisor, Refused(f"making the jail failed: {error}", "see the node's log")
                )
        finally:
            os._exit(1)

"""Makes a jail's init: one clone into new namespaces, the plan, and then the loss of privilege.

The order, and why: the cgroup first, so that all that follows counts against the jail's limits; then, still
real root, every mount, so that the mount, pid, network and other namespaces belong to the initial user
namespace and even root inside the jail has no power over them; then the user namespace, ids, capabilities;
death with the parent last, because the kernel forgets it when credentials change.
"""

from __future__ import annotations

import logging
import os
import pickle
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel, roots
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.init import Init, Program
from edge_agent.jail.operations import Do, Operation, Progress, carry_out
from edge_agent.jail.protocol import Make, Refused
from edge_agent.jail.steps import Script, Unshare, cloning, keeping, run
from edge_agent.jail.wire import Body, Closed, Frame, Garbage, Wire, pair
from edge_agent.jail.wright import Tools, Wright

log = logging.getLogger(__name__)

# What init does inside: kill, become the agent, and read and write files that the agent protected.
_INIT_CAPABILITIES = (
    kernel.CAP_KILL,
    kernel.CAP_SETUID,
    kernel.CAP_SETGID,
    kernel.CAP_DAC_OVERRIDE,
    kernel.CAP_CHOWN,
    kernel.CAP_FOWNER,
)
_PATIENCE = 30.0  # seconds that init waits for the jailer; longer than the jailer gives it

MAKE_INIT = b"i"
_NAMESPACES: int = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)
IN_USER_NAMESPACE, READY, FAILED, BORN = "in user namespace", "ready", "failed", "born"


@dataclass(frozen=True, slots=True)
class Spawned:
    """The jailer's ends of a new init. Of a shell: `for_fork`, the agent's ends of its turn socket and of the
    pipe for its output, which a zygote's child is to get; `settling`, where it waits for its jail's state;
    `output`, the other end of that pipe."""

    pid: int
    supervisor: Wire
    turn: socket.socket
    progress: Progress
    for_fork: tuple[int, ...] = ()
    settling: socket.socket | None = None
    output: int = -1

    def close(self) -> None:
        """All but `for_fork` and `output`, which may have been given away."""
        self.supervisor.close()
        self.turn.close()
        self.progress.close()
        if self.settling is not None:
            self.settling.close()


def spawn(request: Make, wright: Wright, cgroups: Cgroups) -> Spawned:
    """Returns at once; init reports over the supervisor wire: IN_USER_NAMESPACE (and waits to be mapped),
    READY, or FAILED. PlanFailed if it could not even be cloned."""
    supervisor, inner_supervisor = pair()
    turn, inner_turn = pair()
    progress = Progress.begin()
    group = None
    born: list[int] = []
    try:
        group = cgroups.clone_into(request.jail_id)
        inner = (inner_supervisor.fileno(), inner_turn.fileno(), progress.fd)

        def clone() -> None:
            born.append(wright.spawn(MAKE_INIT, pickle.dumps(request), inner, _NAMESPACES, group))

        carry_out(birth(cgroups, clone), progress.note)
    except BaseException:
        supervisor.close()
        turn.close()
        progress.close()
        raise
    finally:
        inner_supervisor.close()
        inner_turn.close()
        if group is not None:
            os.close(group)
    return Spawned(born[0], Wire(supervisor), turn, progress)


def birth(cgroups: Cgroups, clone: Callable[[], object]) -> tuple[Operation, ...]:
    """The jailer's part. `clone` has the wright do it."""
    return (Do(cloning("init", _NAMESPACES, cgroups.starts_inside), clone),)


@dataclass(slots=True)
class Opened:
    """Descriptors that steps of init leave for later ones."""

    groups: tuple[int, ...] = ()  # the agent's control groups
    sysctl: int = -1  # /proc/sys

    def take_groups(self, groups: tuple[int, ...]) -> None:
        self.groups = groups

    def take_sysctl(self) -> None:
        self.sysctl = os.open("/proc/sys", os.O_PATH | os.O_CLOEXEC)


def walls(request: Make, tools: Tools, opened: Opened) -> tuple[Operation, ...]:
    """Init's, while it is real root."""
    cgroups = tools.cgroups
    return (
        *joining(request, cgroups),
        Do(
            "open the agent's control group",
            lambda: opened.take_groups(cgroups.open_agent(request.jail_id)),
        ),
        Do("open /proc/sys", opened.take_sysctl),
        Unshare(kernel.CLONE_NEWCGROUP),
        *roots.jail_plan(request, tools.system, tools.config),
        Unshare(kernel.CLONE_NEWUSER),
    )


def joining(request: Make, cgroups: Cgroups) -> tuple[Operation, ...]:
    if cgroups.starts_inside:
        return ()
    return (Do("join the jail's control groups", lambda: cgroups.join(request.jail_id)),)


def make_init(tools: Tools, given: bytes, fds: list[int]) -> NoReturn:
    """The job of an init."""
    # A pickle, for both ends are the same program and the same user.
    request: Make = pickle.loads(given)
    supervisor, turn, progress = Wire(socket.socket(fileno=fds[0])), fds[1], Progress(fds[2], "init")
    with nothing_returns(fds[0], request.jail_id):
        opened = Opened()
        carry_out(walls(request, tools, opened), progress.note)
        supervisor.send({"step": IN_USER_NAMESPACE})
        _receive(supervisor)  # mapped
        run(BECOMING_INIT, opened, progress.note)
        progress.close()
        program = Program(request, turn, opened.groups)
        supervisor.send({"step": READY})
        # The answer proves that the jailer lived after we asked to die with it. It brings the control socket,
        # which Init takes, so only look that it is there.
        _wait_readable(supervisor)
        Init(request.jail_id, request.limits.disk_bytes, supervisor, program).serve()


def _become_its_root(opened: Opened) -> None:
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _forbid_user_namespaces(opened: Opened) -> None:
    """In this user namespace, and so in the jail, none can be made: each would bring its maker capabilities
    over new namespaces, with which most of the kernel's holes begin. The limit is each namespace's own."""
    limit = os.open("user/max_user_namespaces", os.O_WRONLY | os.O_CLOEXEC, dir_fd=opened.sysctl)
    os.write(limit, b"0")
    os.close(limit)
    os.close(opened.sysctl)


def becoming_init(capabilities: tuple[int, ...]) -> Script[Opened]:
    """In a user namespace that is mapped. Closes `sysctl`."""
    return (
        ("become uid and gid 0 of its user namespace, in no other group", _become_its_root),
        ("allow no user namespaces within", _forbid_user_namespaces),
        (keeping(capabilities), lambda opened: kernel.keep_capabilities(capabilities)),
        ("set no_new_privs", lambda opened: kernel.no_new_privs()),
        ("ask to die with the jailer", lambda opened: kernel.die_with_parent()),
    )


BECOMING_INIT = becoming_init(_INIT_CAPABILITIES)


def _receive(wire: Wire) -> Frame:
    while True:
        _wait_readable(wire)
        for frame in wire.receive():
            return frame


def _wait_readable(wire: Wire) -> None:
    poll = select.poll()
    poll.register(wire, select.POLLIN)
    if not poll.poll(_PATIENCE * 1000):
        raise TimeoutError


def tell(supervisor: int, body: Body) -> None:
    """To the jailer, if it lives, from one who says no more than this."""
    with suppress(Closed), socket.socket(fileno=os.dup(supervisor)) as sock:
        Wire(sock).send(body)


class nothing_returns:  # used as a block
    """Ends this process when the block ends, having told the jailer of what went wrong in it, over the
    socket that `supervisor` has open."""

    def __init__(self, supervisor: int, jail_id: str) -> None:
        self._supervisor = supervisor
        self._jail_id = jail_id

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> NoReturn:
        try:
            if isinstance(error, Refused):
                tell(self._supervisor, {"step": FAILED, **error.body()})
            elif error is not None and not isinstance(error, (Closed, Garbage, TimeoutError)):
                log.error("a process that makes jail %s failed", self._jail_id, exc_info=error)
                refused = Refused(f"making the jail failed: {error}", "see the node's log")
                tell(self._supervisor, {"step": FAILED, **refused.body()})
        finally:
            os._exit(1)

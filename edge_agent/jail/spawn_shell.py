"""Makes a shell: all of a jail that a zygote can fork into but its name, its state and its control groups. It
is made ahead and waits; then it is settled. docs/decisions/0007-zygotes.md says why in this order.

What must hold: all of a jail's mounts are made by real root in a mount namespace that belongs to the initial
user namespace, and become the jail's only by a copy into its own, which locks them. A shell becomes a jail
once, and has met nobody before that.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel, plan, roots
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.config import JailerConfig
from edge_agent.jail.operations import Do, Operation, Progress, carry_out
from edge_agent.jail.protocol import Make
from edge_agent.jail.spawn import BORN, READY, Opened, Spawned, becoming_init, nothing_returns, tell
from edge_agent.jail.steps import MapIds, Script, cloning, entering, run
from edge_agent.jail.wire import Wire, close_all, pair
from edge_agent.jail.wright import Tools, Wright

log = logging.getLogger(__name__)

MAKE_SHELL = b"s"
_OF_INIT: int = (
    kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_PARENT
)
_GIVEN = struct.Struct("=I?")  # the zygote's uid; are builder and init to note what they do?
_COPIED: int = kernel.CLONE_NEWNS | kernel.CLONE_NEWCGROUP
_CAT = "/usr/bin/cat" if os.path.exists("/usr/bin/cat") else "/bin/cat"
_MAX_NAME, _MAX_FDS = 128, 16


def spawn_shell(request: Make, wright: Wright, owner: int) -> Spawned:
    """Returns at once, with the pid of the builder. Over the supervisor wire comes BORN with the pid of init,
    which is a child of the caller, or FAILED; after `settle`, READY. `request` stands for all that the shell
    fits; `owner` is the zygote's uid."""
    supervisor, inner_supervisor = pair()
    turn, inner_turn = pair()
    settling, inner_settling = _packets()
    progress = Progress.begin()
    try:
        readable, writable = os.pipe2(os.O_CLOEXEC)
    except OSError:
        progress.close()
        raise
    inner = (inner_supervisor.fileno(), inner_settling.fileno(), progress.fd)
    born: list[int] = []

    def clone() -> None:
        given = _GIVEN.pack(owner, log.isEnabledFor(logging.DEBUG)) + pickle.dumps(request)
        born.append(wright.spawn(MAKE_SHELL, given, inner))

    try:
        carry_out(birth(clone), progress.note)
    except BaseException:
        for end in (supervisor, turn, inner_turn, settling, progress):
            end.close()
        close_all((readable, writable))
        raise
    finally:
        inner_supervisor.close()
        inner_settling.close()
    for_fork = (inner_turn.detach(), writable)
    return Spawned(born[0], Wire(supervisor), turn, progress, for_fork, settling, readable)


def birth(clone: Callable[[], object]) -> tuple[Operation, ...]:
    """The jailer's part. `clone` has the wright do it."""
    return (Do("clone a builder", clone),)


def settling(
    request: Make, shell: Callable[[], Spawned], ids: MapIds, cgroups: Cgroups, config: JailerConfig
) -> tuple[Operation, ...]:
    """The jailer's part of making a shell the jail of `request`."""
    given: list[int] = []

    def give() -> None:
        settling = shell().settling
        assert settling is not None
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has failed, and has said why
                socket.send_fds(settling, [request.jail_id.encode()], given)
        finally:
            close_all(given)

    def take_groups() -> None:
        try:
            given.extend(cgroups.open_init(request.jail_id))
        except OSError:
            close_all(given)
            raise

    return (
        ids,
        Do(
            f"copy the mount of {request.jail_id}/state of {config.jails_dir}, attached nowhere yet",
            lambda: given.append(roots.jail_state(request.jail_id, config)),
        ),
        Do("open the jail's control groups", take_groups),
        Do("give the mounter these and the jail's name", give),
    )


# --- the job --------------------------------------------------------------------------------------------


def make_shell(tools: Tools, given: bytes, fds: list[int]) -> NoReturn:
    """The job of a builder."""
    kernel.die_with_parent()
    owner, telling = _GIVEN.unpack_from(given)
    builder = Builder(tools, given[_GIVEN.size :], owner, telling, *fds)
    with nothing_returns(builder.supervisor, "to be"):
        run(BUILDING, builder, Progress(builder.progress, "builder").note if telling else None)
        os._exit(0)


class Builder:
    """It forks init before it touches anything, as init keeps what it inherits for life, and then the
    mounter, which does the work. `request` is pickled; the others are descriptors."""

    def __init__(
        self,
        tools: Tools,
        request: bytes,
        owner: int,
        telling: bool,
        supervisor: int,
        settling: int,
        progress: int,
    ) -> None:
        self._tools = tools
        self._request = request
        self.owner = owner
        self._telling = telling
        self.supervisor = supervisor
        self._settling = settling
        self.progress = progress
        self.opened = Opened()
        self._init = 0  # its pid
        self._inside: list[int] = []  # its pid and network namespaces

    def clone_init(self) -> None:
        named, self._name = _packets()
        self._init = kernel.clone(_OF_INIT)
        if self._init == 0:
            close_all((self._settling, self._name.detach()))
            if not self._telling:
                os.close(self.progress)
            progress = Progress(self.progress, "init") if self._telling else None
            _init(named, self.supervisor, self.opened, progress)
        named.close()

    def open_inside(self) -> None:
        tell(self.supervisor, {"step": BORN, "pid": self._init})
        for kind in ("pid", "net"):
            path = f"/proc/{self._init}/ns/{kind}"
            self._inside.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))

    def enter(self) -> None:
        kernel.enter_namespace(self._inside[0], kernel.CLONE_NEWPID)

    def clone_mounter(self) -> None:
        if kernel.clone(0) == 0:
            with nothing_returns(self.supervisor, "to be"):
                request, progress = pickle.loads(self._request), Progress(self.progress, "mounter")
                _mount(self._tools, request, self._settling, self._name, progress, self._inside[1])


BUILDING: Script[Builder] = (
    (entering(kernel.CLONE_NEWNS), lambda builder: kernel.unshare(kernel.CLONE_NEWNS)),
    ("open /proc/sys", lambda builder: builder.opened.take_sysctl()),
    (
        "become the zygote's uid, whose the user namespace is to be",
        lambda builder: os.seteuid(builder.owner),
    ),
    (cloning("init", _OF_INIT), Builder.clone_init),
    ("become root again", lambda builder: os.seteuid(0)),
    ("open init's pid and network namespaces", Builder.open_inside),
    ("enter the first, whose processes /proc is to show", Builder.enter),
    ("clone a mounter", Builder.clone_mounter),
)


def _mount(
    tools: Tools, request: Make, settling: int, name: socket.socket, progress: Progress, network: int
) -> None:
    """The mounter. Its failure, or the jailer's end, closes `name`, and so ends init."""
    carry_out(mounting(request, tools, network), progress.note)
    with socket.socket(fileno=settling) as jailer:
        its_name, fds, _, _ = socket.recv_fds(jailer, _MAX_NAME, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    if its_name:
        state, *groups = fds
        carry_out(finishing(state, lambda: socket.send_fds(name, [its_name], groups)), progress.note)
    os._exit(0)


def mounting(request: Make, tools: Tools, network: int) -> tuple[Operation, ...]:
    """The mounter's, ahead."""
    return (
        *roots.shell_mounts(request, tools.system, tools.config),
        Do("enter the jail's network", lambda: kernel.enter_namespace(network, kernel.CLONE_NEWNET)),
        plan.LoopbackUp(),
    )


def finishing(state: int, pass_on: Callable[[], object]) -> tuple[Operation, ...]:
    """The mounter's, when there is a jail to be made of it."""
    return (plan.Attach(state, "/state"), Do("give init the name and the control groups", pass_on))


@dataclass(slots=True)
class _Settled:
    """What init has been given."""

    jail_id: str
    groups: list[int]


def _init(named: socket.socket, supervisor: int, opened: Opened, progress: Progress | None) -> NoReturn:
    """Waits for its name. What it touches is its own until it executes a program that touches next to
    nothing: each instance has an init, and one in Python would keep two megabytes for itself."""
    with nothing_returns(supervisor, "to be"):
        note = None if progress is None else progress.note
        run(BEGINNING, None, note)
        encoded, groups, _, _ = socket.recv_fds(named, _MAX_NAME, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        if not encoded:
            os._exit(1)  # the mounter failed, and has said why, or there is nothing to do
        named.close()
        run(SETTLED, _Settled(encoded.decode(), groups), note)
        run(BECOMING_INIT, opened, note)
        run(STAYING, supervisor, note)
    os._exit(1)  # which it does not come to


def _stay(supervisor: int) -> None:
    tell(supervisor, {"step": READY})
    os.set_blocking(supervisor, True)
    os.dup2(supervisor, 0)
    os.execve(_CAT, ["cat"], {})  # by that name, for it may be one of many that a program has


# Before the first one ends, which is the mounter.
BEGINNING: Script[None] = (
    ("have the kernel reap orphans", lambda _: signal.signal(signal.SIGCHLD, signal.SIG_IGN)),
)
BECOMING_INIT = becoming_init(())
# It reads until the jailer has ended, which may have been before init asked to die with it.
STAYING: Script[int] = (
    (f"say that it is ready, and execute {_CAT}, which waits as long as the jailer lives", _stay),
)


def _join(settled: _Settled) -> None:
    for group in settled.groups:
        os.write(group, b"0")
        os.close(group)


# Init's, before it becomes what it stays.
SETTLED: Script[_Settled] = (
    ("join the jail's control groups", _join),
    (entering(_COPIED), lambda settled: kernel.unshare(_COPIED)),
    ("go to /, as the old one is the host's", lambda settled: os.chdir("/")),
    ("set the host name to the jail's", lambda settled: socket.sethostname(settled.jail_id[:63])),
)


def _packets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

"""Makes a jail's init: one clone into new namespaces, the plan, and then the loss of privilege.

The order, and why: the cgroup first, so that all that follows counts against the jail's limits; then, still
real root, every mount, so that the mount, pid, network and other namespaces belong to the initial user
namespace and even root inside the jail has no power over them; then the user namespace, ids, capabilities;
death with the parent last, because the kernel forgets it when credentials change.
"""

from __future__ import annotations

import gc
import logging
import mmap
import os
import selectors
import signal
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.init import Init
from edge_agent.jail.plan import Do, Operation, carry_out
from edge_agent.jail.protocol import AGENT_ID, Make, Refused
from edge_agent.jail.wire import Closed, Frame, Garbage, Wire, pair

log = logging.getLogger(__name__)

_NAMESPACES: int = (
    kernel.CLONE_NEWNS | kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
)
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

IN_USER_NAMESPACE, READY, FAILED, BORN = "in user namespace", "ready", "failed", "born"


@dataclass(frozen=True, slots=True)
class Spawned:
    """The jailer's ends of a new init. `steps[progress[0]]` is the one that it is at. `for_fork`: the agent's
    ends of its turn socket and of the pipe for its output, which a zygote's child is to get."""

    pid: int
    supervisor: Wire
    turn: socket.socket
    steps: tuple[Operation, ...]
    progress: mmap.mmap
    for_fork: tuple[int, ...] = ()


def spawn(request: Make, plan: tuple[Operation, ...], cgroups: Cgroups) -> Spawned:
    """Returns at once; init reports over the supervisor wire: IN_USER_NAMESPACE (and waits to be mapped),
    READY, or FAILED. OSError if it could not even be cloned."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)  # shared with the child
    supervisor, inner_supervisor = pair()
    turn, inner_turn = pair()
    opened: list[int] = []  # by the steps, in the child: of the agent's control groups, then /proc/sys
    steps = (
        Do("join the jail's control groups", lambda: cgroups.join(request.jail_id)),
        Do("open the agent's control group", lambda: opened.extend(cgroups.open_agent(request.jail_id))),
        Do("open /proc/sys", lambda: opened.append(os.open("/proc/sys", os.O_PATH | os.O_CLOEXEC))),
        Do("enter a cgroup namespace", lambda: kernel.unshare(kernel.CLONE_NEWCGROUP)),
        *plan,
        Do("enter a user namespace", lambda: kernel.unshare(kernel.CLONE_NEWUSER)),
    )
    group = cgroups.clone_into(request.jail_id)
    try:
        pid = kernel.clone(_NAMESPACES, group)
        if pid == 0:
            kept = (inner_supervisor.fileno(), inner_turn.fileno())
            _child(request, steps, Wire(inner_supervisor), kept, opened, progress)
    except BaseException:
        supervisor.close()
        turn.close()
        raise
    finally:
        inner_supervisor.close()
        inner_turn.close()
        if group is not None:
            os.close(group)
    return Spawned(pid, Wire(supervisor), turn, steps, progress)


def write_id_maps(pid: int, init_uid: int) -> None:
    """Inside 0 is `init_uid`, and the agent is the next one; uids and gids alike."""
    text = f"0 {init_uid} 1\n{AGENT_ID} {init_uid + 1} 1\n"
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{pid}/{name}", "w") as file:
            file.write(text)


def _child(
    request: Make,
    steps: tuple[Operation, ...],
    supervisor: Wire,
    kept: tuple[int, int],
    opened: list[int],
    progress: mmap.mmap,
) -> NoReturn:
    # Never returns into the jailer's frames, whatever happens: they are a copy, but their sockets are not.
    try:
        gc.freeze()
        forget_jailer(kept)
        carry_out(steps, lambda index: progress.__setitem__(0, index))
        *agent_groups, sysctl = opened
        _give_up_power(supervisor, sysctl)
        init = Init(request, supervisor, kept[1], tuple(agent_groups), (AGENT_ID, AGENT_ID))
        supervisor.send({"step": READY})
        # The answer proves that the jailer lived after we asked to die with it. It brings the control
        # socket, which Init takes, so only look that it is there.
        wait_readable(supervisor)
        init.serve()
    except Refused as refused:
        tell_failure(supervisor, refused)
    except (Closed, Garbage, TimeoutError):
        pass  # the jailer is gone
    except BaseException:
        log.exception("init of jail %s failed", request.jail_id)
        tell_failure(supervisor, Refused("init failed by a bug", "see the node's log"))
    finally:
        os._exit(1)


def forget_jailer(kept: tuple[int, ...]) -> None:
    signal.set_wakeup_fd(-1)
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(signal_number, signal.SIG_DFL)
    low = 3
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 1 << 20)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in (0, 1):
        os.dup2(null, number)
    os.close(null)
    os.umask(0o022)
    kernel.set_name("roost-init")


def _give_up_power(supervisor: Wire, sysctl: int) -> None:
    supervisor.send({"step": IN_USER_NAMESPACE})
    _receive(supervisor)  # mapped
    become_init(sysctl)


def become_init(sysctl: int) -> None:
    """In a user namespace that is mapped."""
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    _forbid_user_namespaces(sysctl)
    kernel.keep_capabilities(_INIT_CAPABILITIES)
    kernel.no_new_privs()
    kernel.die_with_parent()


def _forbid_user_namespaces(sysctl: int) -> None:
    """In this user namespace, and so in the jail, none can be made: each would bring its maker capabilities
    over new namespaces, with which most of the kernel's holes begin. The limit is each namespace's own."""
    limit = os.open("user/max_user_namespaces", os.O_WRONLY | os.O_CLOEXEC, dir_fd=sysctl)
    os.write(limit, b"0")
    os.close(limit)
    os.close(sysctl)


def _receive(wire: Wire) -> Frame:
    while True:
        wait_readable(wire)
        for frame in wire.receive():
            return frame


def wait_readable(wire: Wire) -> None:
    deadline = time.monotonic() + _PATIENCE
    with selectors.DefaultSelector() as selector:
        selector.register(wire, selectors.EVENT_READ)
        if not selector.select(deadline - time.monotonic()):
            raise TimeoutError


def tell_failure(supervisor: Wire, refused: Refused) -> None:
    with suppress(Closed):
        supervisor.send({"step": FAILED, **refused.body()})

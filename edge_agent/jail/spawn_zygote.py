"""Makes a zygote: docs/decisions/0007-zygotes.md says what it may and may not."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from typing import NoReturn

from edge_agent.jail import kernel, roots, seccomp
from edge_agent.jail.agent_process import environment, isolating, limiting
from edge_agent.jail.cgroups.base import Cgroups
from edge_agent.jail.operations import Do, Operation, Progress, carry_out
from edge_agent.jail.protocol import Make
from edge_agent.jail.spawn import Spawned, joining, nothing_returns
from edge_agent.jail.steps import Execute, KeepCapabilities, Unshare, cloning
from edge_agent.jail.wire import Wire, pair
from edge_agent.jail.wright import Tools, Wright

MAKE_ZYGOTE = b"z"
_NAMESPACES: int = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
WIRE_FD = 3  # of a zygote, to the jailer


def spawn_zygote(request: Make, wright: Wright, cgroups: Cgroups, uid: int) -> Spawned:
    """Returns at once. FAILED may come over the wire until the program runs; after that, its own words."""
    ours, theirs = pair()
    unused, other = pair()
    other.close()
    progress = Progress.begin()
    group = None
    born: list[int] = []
    try:
        group = cgroups.clone_into(request.jail_id)
        inner = (theirs.fileno(), progress.fd)

        def clone() -> None:
            given = pickle.dumps((request, uid))
            born.append(wright.spawn(MAKE_ZYGOTE, given, inner, _NAMESPACES, group))

        carry_out(birth(cgroups, clone), progress.note)
    except BaseException:
        for end in (ours, unused, progress):
            end.close()
        raise
    finally:
        theirs.close()
        if group is not None:
            os.close(group)
    return Spawned(born[0], Wire(ours), unused, progress)


def birth(cgroups: Cgroups, clone: Callable[[], object]) -> tuple[Operation, ...]:
    """The jailer's part. `clone` has the wright do it."""
    return (Do(cloning("the zygote", _NAMESPACES, cgroups.starts_inside), clone),)


def make_zygote(tools: Tools, given: bytes, fds: list[int]) -> NoReturn:
    """The job of a zygote: to become one."""
    request: Make
    request, uid = pickle.loads(given)
    sock, progress = socket.socket(fileno=fds[0]), Progress(fds[1], "zygote")
    with nothing_returns(fds[0], request.jail_id):
        carry_out(walls(request, tools, uid), progress.note)
        # What it has to say comes over its socket, and again when `exec` starts the agent.
        os.dup2(1, 2)
        os.set_blocking(sock.fileno(), True)
        os.dup2(sock.fileno(), WIRE_FD, inheritable=True)
        os.closerange(WIRE_FD + 1, 1 << 16)
        _finish(request)


def _finish(request: Make) -> NoReturn:
    with nothing_returns(WIRE_FD, request.jail_id):
        carry_out(last_steps(request))
        os._exit(1)  # which it does not come to


def walls(request: Make, tools: Tools, uid: int) -> tuple[Operation, ...]:
    cgroups = tools.cgroups
    opened: list[int] = []
    return (
        *joining(request, cgroups),
        Do("open its own control group", lambda: opened.extend(cgroups.open_agent(request.jail_id))),
        Unshare(kernel.CLONE_NEWCGROUP),
        *roots.zygote_plan(request, tools.system, tools.config),
        Do("join its own control group", lambda: _join(opened)),
        *isolating(),
        *limiting(request),
        *_dropping_power(uid, tools.jailer),
    )


def last_steps(request: Make) -> tuple[Operation, ...]:
    return (
        Do("filter system calls", lambda: kernel.filter_system_calls(seccomp.zygote_filter())),
        Execute(request.argv, {**environment(request), "HOME": "/tmp"}),
    )


def _join(groups: list[int]) -> None:
    for group in groups:
        os.write(group, b"0")


def _dropping_power(uid: int, jailer: int) -> tuple[Operation, ...]:
    return (
        Do("become a gid that nobody else has, in no other group", lambda: _change_gid(uid)),
        KeepCapabilities((kernel.CAP_SETUID,)),
        Do("become a uid that nobody else has", lambda: os.setresuid(uid, uid, uid)),
        Do("drop all capabilities", kernel.drop_capabilities),
        Do("set no_new_privs", kernel.no_new_privs),
        Do("ask to die with the jailer", lambda: _die_with(jailer)),
    )


def _change_gid(gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)


def _die_with(jailer: int) -> None:
    kernel.die_with_parent()
    if os.getppid() != jailer:  # it died before we asked to die with it
        os._exit(1)

"""Starts an agent's process from its jail's init: the last and lasting loss of privilege."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel, seccomp
from edge_agent.jail.plan import Do, Operation, carry_out
from edge_agent.jail.protocol import AGENT_ID, Make, Refused
from edge_agent.state.files import MAX_STATE

TURN_FD = 3
LIMITS = (
    # Of one byte, since only that stops a core dump that is piped into a program of the host's, which runs as
    # root; a limit of 0 stops those that go to files alone.
    (resource.RLIMIT_CORE, 1),
    (resource.RLIMIT_NOFILE, 1024),
    (resource.RLIMIT_FSIZE, MAX_STATE),
    (resource.RLIMIT_RTPRIO, 0),
    (resource.RLIMIT_NICE, 0),
)
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/state",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "ROOST_FD": str(TURN_FD),
}


@dataclass(frozen=True, slots=True)
class Descriptors:
    """`cgroups`: see `Cgroups.open_agent`. `output`: the end of a pipe to write to."""

    turn: int
    cgroups: tuple[int, ...]
    output: int


def environment(request: Make) -> dict[str, str]:
    return {**dict(variable.split("=", 1) for variable in request.env), **ENVIRONMENT}


def start_agent(request: Make, fds: Descriptors) -> int:
    """Forks and executes; returns the pid when the program runs. Refused if it can't be run."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _child(request, fds, tell)
    os.close(tell)
    with open(told, "rb") as file:  # ends when the program runs, as the other end closes on exec
        problem = file.read().decode(errors="replace")
    if problem:
        os.waitpid(pid, 0)
        raise Refused(problem, "does the agent's version hold that program, and is it executable for all?")
    return pid


def _child(request: Make, fds: Descriptors, tell: int) -> NoReturn:
    try:
        tell = _arrange(fds, tell)
        _become_agent()
        os.execve(request.argv[0], request.argv, environment(request))
    except BaseException as error:
        os.write(tell, f"{request.argv[0]} can't be run: {error}".encode())
    os._exit(127)


def _arrange(fds: Descriptors, tell: int) -> int:
    """Joins the agent's cgroup, and leaves 0 to 3 open and a copy of `tell`, which is returned."""
    for group in fds.cgroups:
        os.write(group, b"0")
    # Out of the way of the numbers that they are to be copied to.
    turn, output, tell = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (fds.turn, fds.output, tell))
    null = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2), (turn, TURN_FD)):
        os.dup2(source, target, inheritable=True)
    os.closerange(TURN_FD + 1, tell)
    os.closerange(tell + 1, 1 << 16)
    return tell


def _become_agent() -> None:
    carry_out(LAST_STEPS)


def default_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and exec would keep so
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def set_limits() -> None:
    for kind, most in LIMITS:
        resource.setrlimit(kind, (most, most))


def _change_ids() -> None:
    os.setgroups([])
    os.setresgid(AGENT_ID, AGENT_ID, AGENT_ID)
    os.setresuid(AGENT_ID, AGENT_ID, AGENT_ID)


# What is left to do in the agent's own process when the root is made. The order matters at the end:
# capabilities go with the ids, no_new_privs allows the filter, and the filter forbids what came before it.
LAST_STEPS: tuple[Operation, ...] = (
    Do("begin a session of its own", os.setsid),
    Do("reset signals", default_signals),
    Do("limit files to 4 GiB, open ones to 1024; no core dump, no real-time priority", set_limits),
    Do("go to /agent", lambda: os.chdir("/agent")),
    Do(f"become uid and gid {AGENT_ID}", _change_ids),
    Do("drop all capabilities", kernel.drop_capabilities),
    Do("set no_new_privs", kernel.no_new_privs),
    Do("filter system calls", lambda: kernel.filter_system_calls(seccomp.agent_filter())),
)

"""Starts an agent's process from its jail's init: the last and lasting loss of privilege."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
from dataclasses import dataclass
from typing import NoReturn

from edge_agent.jail import kernel, seccomp
from edge_agent.jail.operations import Do, Operation, carry_out
from edge_agent.jail.protocol import AGENT_ID, Make, Refused, Way
from edge_agent.jail.steps import Execute
from shared.units import format_size

TURN_FD = 3
_LIMITS = (
    # Of one byte, since only that stops a core dump that is piped into a program of the host's, which runs as
    # root; a limit of 0 stops those that go to files alone.
    (resource.RLIMIT_CORE, 1),
    (resource.RLIMIT_NOFILE, 1024),
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
    """`turn`: None for a task. `cgroups`: see `Cgroups.open_agent`. The others: ends of pipes to write to."""

    turn: int | None
    cgroups: tuple[int, ...]
    output: int
    errors: int


def limits(request: Make) -> tuple[tuple[int, int], ...]:
    return (*_LIMITS, (resource.RLIMIT_FSIZE, request.limits.disk_bytes))


def environment(request: Make) -> dict[str, str]:
    variables = {**dict(variable.split("=", 1) for variable in request.env), **ENVIRONMENT}
    if request.way is Way.TASK:
        del variables["ROOST_FD"]
    return variables


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
        carry_out(last_steps(request))
    except BaseException as error:
        os.write(tell, f"{request.argv[0]} can't be run: {error}".encode())
    os._exit(127)


def _arrange(fds: Descriptors, tell: int) -> int:
    """Joins the agent's control group, and leaves 0 to 2, an agent's 3 and a copy of `tell` open, which it
    returns."""
    carry_out(first_steps(fds.cgroups))
    # Out of the way of the numbers that they are to be copied to.
    null = os.open("/dev/null", os.O_RDONLY)
    inherited = [null, fds.output, fds.errors, *([] if fds.turn is None else [fds.turn])]
    *inherited, tell = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64) for fd in (*inherited, tell))
    for target, source in enumerate(inherited):
        os.dup2(source, target, inheritable=True)
    os.closerange(len(inherited), tell)
    os.closerange(tell + 1, 1 << 16)
    return tell


def _default_signals() -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and exec would keep so
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _set_limits(request: Make) -> None:
    for kind, most in limits(request):
        resource.setrlimit(kind, (most, most))


def _change_ids() -> None:
    os.setgroups([])
    os.setresgid(AGENT_ID, AGENT_ID, AGENT_ID)
    os.setresuid(AGENT_ID, AGENT_ID, AGENT_ID)


def _join(groups: tuple[int, ...]) -> None:
    for group in groups:
        os.write(group, b"0")


def first_steps(groups: tuple[int, ...]) -> tuple[Operation, ...]:
    """`groups`: see `Descriptors`."""
    return (Do("join the agent's control group", lambda: _join(groups)),)


def isolating() -> tuple[Operation, ...]:
    return (Do("begin a session of its own", os.setsid), Do("reset signals", _default_signals))


def limiting(request: Make) -> tuple[Operation, ...]:
    size = format_size(request.limits.disk_bytes)
    text = f"limit files to {size}, open ones to 1024; no core dump, no real-time priority"
    return (Do(text, lambda: _set_limits(request)),)


def last_steps(request: Make) -> tuple[Operation, ...]:
    """What is left to do in the agent's own process when the root is made, up to its execution. The order
    matters at the end: capabilities go with the ids, no_new_privs allows the filter, and the filter forbids
    what came before it."""
    where = "/state" if request.way is Way.TASK else "/agent"
    return (
        *isolating(),
        *limiting(request),
        Do(f"go to {where}", lambda: os.chdir(where)),
        Do(f"become uid and gid {AGENT_ID}, in no other group", _change_ids),
        Do("drop all capabilities", kernel.drop_capabilities),
        Do("set no_new_privs", kernel.no_new_privs),
        Do("filter system calls", lambda: kernel.filter_system_calls(seccomp.agent_filter())),
        Execute(request.argv, environment(request)),
    )

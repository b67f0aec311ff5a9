"""Runs in a zygote: imports an agent once, and forks a process of it for each user. Standard library only.

Over the socket in descriptor 3, messages are a 4-byte big-endian length and JSON:

    zygote -> node   {"step": "ready"}  once, or  {"step": "failed", "message", "hint"}  and its end
    node -> zygote   {"do": "fork"}  with the descriptors of `_Where`: into a jail that nobody has yet
    child -> node    {"pid": n}  or  {"problem": text}, over the descriptor `report`
    node -> fork     {"env", "uid", "limits", "filter"}  and those of `_Given`, over `line`: now it has a user
    fork -> node     {"step": "entered"}  or  {"problem": text}, over `line`

What must hold: the zygote has one thread when it forks, and gets to see no user's data; a fork becomes the
agent of one jail. How it can fail: the import fails, or leaves threads running; then it says so and ends, and
the node does without it.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from roost.agent import Agent, load

WIRE_FD, TURN_FD = 3, 3
PARKS_VARIABLE = "ROOST_PARKS"  # set where forks wait for users who have not come yet, most of them for long
EXIT_FAILED = 3

_LENGTH = struct.Struct(">I")
_MAX_MESSAGE = 1 << 20
_MAX_FDS = 32
_USER, _PID = 0x10000000, 0x20000000
# cgroup, ipc, uts, net, mnt: the order in which they come.
_NAMESPACES = (0x02000000, 0x08000000, 0x04000000, 0x40000000, 0x00020000)
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAP_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
# The variant that keeps the GIL: between fork and the child's return nothing else may touch the interpreter.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _Where(NamedTuple):
    """Descriptors of one fork: where it goes to be born, and how it is spoken with."""

    report: int
    line: int
    user: int  # namespaces; the first gives the right to the second
    pid: int


class _Given(NamedTuple):
    """Descriptors that make a fork the agent of a jail."""

    turn: int
    output: int
    namespaces: list[int]
    groups: list[int]


def main_zygote(entry: str) -> NoReturn:
    """Forks on demand until the node closes the socket. In a child it becomes the agent."""
    node = socket.socket(fileno=WIRE_FD)
    node.set_inheritable(False)
    parks = os.environ.pop(PARKS_VARIABLE, None) is not None
    hooks = _Hooks()
    hooks.record()
    try:
        agent = load(entry)
    except (Exception, SystemExit):
        _fail(node, f"it can't be imported: {traceback.format_exc(limit=1).splitlines()[-1][:500]}")
    threads = _threads()
    if threads > 1:
        _fail(node, f"its import left {threads - 1} threads running, and a fork would lose them")
    shared = _shared_memory()
    if shared:
        _fail(node, f"its import left {shared} mapped, which every user's instance would share")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that only fork the agent
    gc.collect()
    gc.freeze()
    _send(node, {"step": "ready"})
    prepare = _nothing if parks else agent.make_loop
    while True:
        _fork_spare(node, agent, hooks, prepare)


class _Hooks:
    """What the agent's libraries want done around a fork."""

    def __init__(self) -> None:
        self._before: list[Callable[[], object]] = []
        self._in_child: list[Callable[[], object]] = []

    def record(self) -> None:
        """From now on. Those of the standard library are left out: they are for processes with other threads,
        and `_seed` does the rest."""
        register = os.register_at_fork
        ours: frozenset[str] = getattr(sys, "stdlib_module_names", frozenset())  # Python 3.10

        def recorded(**hooks: Callable[[], object]) -> None:
            register(**hooks)  # for what the agent forks by itself
            module = sys._getframe(1).f_globals.get("__name__", "")
            if module.partition(".")[0] not in ours:
                self._before += [hooks[name] for name in ("before",) if name in hooks]
                self._in_child += [hooks[name] for name in ("after_in_child",) if name in hooks]

        os.register_at_fork = recorded  # type: ignore[assignment]

    def before(self) -> None:
        for hook in reversed(self._before):
            hook()

    def in_child(self) -> None:
        for hook in self._in_child:
            hook()


def _fork() -> int:
    """A fork without the interpreter's own hooks: they are about other threads, which a zygote has not, and
    touch most of a megabyte, which every instance would then have for itself."""
    return _check(_libc_with_gil.fork(), "fork")


def _nothing() -> None:
    """What a fork prepares that may have to wait for long: it writes to no page that it can leave alone."""


def _fork_spare(node: socket.socket, agent: Agent, hooks: _Hooks, prepare: Callable[[], None]) -> None:
    """Has a child wait for the next request, so that the fork is done before somebody waits for it. Returns
    when it has taken one. `prepare` is run in the child's fork, ahead."""
    told, tell = os.pipe()
    if _fork() == 0:
        os.close(told)
        request, fds = _receive(node)
        if request is None:
            os._exit(0)
        os.write(tell, b".")  # taken
        _enter(node, agent, hooks, prepare, _Where(*fds), tell)
    os.close(tell)
    if not os.read(told, 1):
        os._exit(0)  # the node has closed the socket
    os.read(told, 1)  # or its end: from here on it may be killed together with the jail
    os.close(told)


def _fail(node: socket.socket, why: str) -> NoReturn:
    _send(node, {"step": "failed", "message": f"no zygote of this agent: {why}", "hint": ""})
    os._exit(EXIT_FAILED)


def _threads() -> int:
    try:
        return len(os.listdir("/proc/self/task"))  # those of libraries, too
    except OSError:
        return threading.active_count()


def _shared_memory() -> str:
    """The first mapping whose pages all forks could write to and see; empty if there is none. Without this,
    what one user's instance is made to write there reaches another's."""
    name = ""
    with open("/proc/self/smaps", errors="replace") as file:
        for line in file:
            fields = line.split()
            if fields[0] == "VmFlags:" and "sh" in fields:
                return name
            if not fields[0].endswith(":"):
                name = "shared memory" + (f" ({fields[5]})" if len(fields) > 5 else "")
    return ""


# --- in the child ------------------------------------------------------------------------------------


def _enter(
    node: socket.socket,
    agent: Agent,
    hooks: _Hooks,
    prepare: Callable[[], None],
    where: _Where,
    tell: int,
) -> NoReturn:
    """Goes to the jail's processes and forks there; lives on until the node has seen that. Writes to `tell`
    when the zygote may fork again: at the same time both forks would be slower."""
    try:
        node.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _set_namespace(where.user, _USER)
        _set_namespace(where.pid, _PID)
        hooks.before()
        pid = _fork()
    except BaseException as error:
        os.write(tell, b".")
        _end_with(where.report, f"a zygote's child can't enter the jail: {error!r}")
    if pid == 0:
        _wait(agent, hooks, prepare, where.line)
    os.write(tell, b".")
    os.close(where.line)
    with socket.socket(fileno=where.report) as report:
        _send(report, {"pid": pid})
        report.recv(1)
    os._exit(0)


def _wait(agent: Agent, hooks: _Hooks, prepare: Callable[[], None], line: int) -> NoReturn:
    """Waits until the jail is somebody's, and becomes the agent. All that it inherited is closed before."""
    try:
        node = socket.socket(fileno=_alone(line))
        prepare()
        request, fds = _receive(node)
        if request is None:
            os._exit(0)  # nobody has wanted it
        given = _Given(fds[0], fds[1], fds[2:7], fds[7:])
        for group in given.groups:  # first, so that all that follows counts against the jail's limits
            os.write(group, b"0")
        for fd, kind in zip(given.namespaces, _NAMESPACES):  # noqa: B905  # Python 3.9
            _set_namespace(fd, kind)
        _become_agent(given, request)
        hooks.in_child()
        for fd in fds:
            os.close(fd)
        _send(node, {"step": "entered"})
        node.close()
    except BaseException as error:
        _end_with(line, f"a zygote's child can't become the agent: {error!r}")
    agent.run()


def _set_namespace(fd: int, kind: int) -> None:
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def _end_with(report: int, problem: str) -> NoReturn:
    try:
        with socket.socket(fileno=report) as node:
            _send(node, {"problem": problem[:1000]})
    finally:
        os._exit(1)


def _alone(line: int) -> int:
    """A copy of `line`, which is now all that is open, beside descriptors 0 to 3, kept for what comes."""
    line = fcntl.fcntl(line, fcntl.F_DUPFD_CLOEXEC, 64)
    null = os.open("/dev/null", os.O_RDONLY)
    for number in range(TURN_FD + 1):
        os.dup2(null, number)
    os.closerange(TURN_FD + 1, line)
    os.closerange(line + 1, 1 << 16)
    return line


def _become_agent(given: _Given, request: dict[str, Any]) -> None:
    """The same as an agent that is executed: see edge_agent/jail/agent_process.py."""
    uid = int(request["uid"])
    os.setsid()
    for kind, most in request["limits"]:
        resource.setrlimit(kind, (most, most))
    os.umask(0o022)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.chdir("/agent")
    for source, target in ((given.output, 1), (given.output, 2), (given.turn, TURN_FD)):
        os.dup2(source, target, inheritable=True)
    _set_environment(request["env"])
    _seed()
    # The kernel keeps capabilities here, as neither uid was the namespace's root: they are dropped by name.
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")
    _check(_libc.capset(struct.pack("=II", _CAP_VERSION_3, 0), struct.pack("=6I", *[0] * 6)), "capset")
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    # Gives it its own /proc/self back, which the change of uid took away. Nobody else has this uid.
    _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl")
    # Last, when everything that needs more than an agent may has been done.
    _filter_system_calls(bytes.fromhex(request["filter"]))


def _set_environment(env: dict[str, str]) -> None:
    """Most of it is the zygote's, too: what is the same is not written anew."""
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    for name, value in env.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _filter_system_calls(program: bytes) -> None:
    pointer = ctypes.cast(ctypes.c_char_p(program), ctypes.c_void_p)  # a buffer would be a type of its own
    header = _FilterProgram(len(program) // 8, pointer)
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _check(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(header), 0, 0), "seccomp")


def _seed() -> None:
    """What the import seeded would be the same for each user. `os.urandom`, `uuid`, `secrets` and `ssl` need
    nothing; generators that the agent's module made itself are its own matter."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


# --- messages ----------------------------------------------------------------------------------------


def _send(node: socket.socket, message: dict[str, Any]) -> None:
    payload = json.dumps(message).encode()
    node.sendall(_LENGTH.pack(len(payload)) + payload)


def _receive(node: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message with its descriptors; None when the node has closed."""
    data = b""
    fds: list[int] = []
    while len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]:
        wanted = _LENGTH.size + (_LENGTH.unpack_from(data)[0] if len(data) >= _LENGTH.size else 0)
        part, more, _, _ = socket.recv_fds(node, min(wanted - len(data), _MAX_MESSAGE), _MAX_FDS)
        fds += more
        if not part:
            return None, fds
        data += part
    message: dict[str, Any] = json.loads(data[_LENGTH.size :])
    return message, fds

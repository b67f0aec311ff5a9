"""Runs in a zygote: imports an agent once, and forks a process of it for each user. Standard library only.

Over the socket in descriptor 3, messages are a 4-byte big-endian length and JSON:

    zygote -> node   {"step": "ready"}  once, or  {"step": "failed", "message", "hint"}  and its end
    node -> zygote   {"do": "fork", "env", "uid"}  with the descriptors of `_Given`
    child -> node    {"pid": n}  or  {"problem": text}, over the descriptor `report`

What must hold: the zygote has one thread when it forks, and gets to see no user's data. How it can fail: the
import fails, or leaves threads running; then it says so and ends, and the node does without it.
"""

from __future__ import annotations

import ctypes
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
from typing import Any, NamedTuple, NoReturn

from roost.agent import Agent, load

WIRE_FD, TURN_FD = 3, 3
EXIT_FAILED = 3

_LENGTH = struct.Struct(">I")
_MAX_MESSAGE = 1 << 20
_MAX_FDS = 32
# user, cgroup, ipc, uts, net, mnt, pid: the order in which they come.
_NAMESPACES = (0x10000000, 0x02000000, 0x08000000, 0x04000000, 0x40000000, 0x00020000, 0x20000000)
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_CAP_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _Given(NamedTuple):
    """Descriptors of one fork."""

    report: int
    turn: int
    output: int
    namespaces: list[int]
    groups: list[int]


def main_zygote(entry: str) -> NoReturn:
    """Forks on demand until the node closes the socket. In a child it becomes the agent."""
    node = socket.socket(fileno=WIRE_FD)
    node.set_inheritable(False)
    try:
        agent = load(entry)
    except (Exception, SystemExit):
        _fail(node, f"it can't be imported: {traceback.format_exc(limit=1).splitlines()[-1][:500]}")
    threads = _threads()
    if threads > 1:
        _fail(node, f"its import left {threads - 1} threads running, and a fork would lose them")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that only fork the agent
    gc.collect()
    gc.freeze()
    _send(node, {"step": "ready"})
    while True:
        _fork_spare(node, agent)


def _fork_spare(node: socket.socket, agent: Agent) -> None:
    """Has a child wait for the next request, so that the fork is done before somebody waits for it. Returns
    when it has taken one."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.close(told)
        request, fds = _receive(node)
        if request is None:
            os._exit(0)
        os.write(tell, b".")  # taken
        _enter(node, agent, request, fds, tell)
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


# --- in the child ------------------------------------------------------------------------------------


def _enter(node: socket.socket, agent: Agent, request: dict[str, Any], fds: list[int], tell: int) -> NoReturn:
    """Enters the jail and forks the agent in there; lives on until the node has seen that. Writes to `tell`
    when the zygote may fork again: at the same time both forks would be slower."""
    given = _Given(fds[0], fds[1], fds[2], fds[3:10], fds[10:])
    try:
        node.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for group in given.groups:  # first, so that all that follows counts against the jail's limits
            os.write(group, b"0")
        for fd, kind in zip(given.namespaces, _NAMESPACES):  # noqa: B905  # Python 3.9
            _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")
        pid = os.fork()
    except BaseException as error:
        os.write(tell, b".")
        _end_with(given.report, f"a zygote's child can't enter the jail: {error!r}")
    if pid == 0:
        try:
            _become_agent(given, request)
        except BaseException as error:
            _end_with(given.report, f"a zygote's child can't become the agent: {error!r}")
        agent.run()
    os.write(tell, b".")
    with socket.socket(fileno=given.report) as report:
        _send(report, {"pid": pid})
        for fd in (given.turn, given.output):
            os.close(fd)
        report.recv(1)
    os._exit(0)


def _end_with(report: int, problem: str) -> NoReturn:
    try:
        with socket.socket(fileno=report) as node:
            _send(node, {"problem": problem[:1000]})
    finally:
        os._exit(1)


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
    null = os.open("/dev/null", os.O_RDONLY)
    turn, output = (_high(fd) for fd in (given.turn, given.output))
    for source, target in ((null, 0), (output, 1), (output, 2), (turn, TURN_FD)):
        os.dup2(source, target, inheritable=True)
    os.closerange(TURN_FD + 1, 1 << 16)
    os.environ.clear()
    os.environ.update(request["env"])
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


def _filter_system_calls(program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _FilterProgram(len(program) // 8, ctypes.addressof(buffer))
    mode = ctypes.c_ulong(_SECCOMP_MODE_FILTER)
    _check(_libc.prctl(_PR_SET_SECCOMP, mode, ctypes.byref(header), 0, 0), "seccomp")


def _high(fd: int) -> int:
    """A copy of `fd` that is out of the way of the numbers that matter."""
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def _seed() -> None:
    """What the import seeded would be the same for each user. `os.urandom`, `uuid`, `secrets` and `ssl` need
    nothing; generators that the agent's module made itself are its own matter."""
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


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

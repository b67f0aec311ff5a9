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
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from roost._memory import fill_holes, shared_memory
from roost.agent import STATE_DIR, Agent, load

WIRE_FD, TURN_FD = 3, 3
_NODE_FD = 64  # where WIRE_FD is moved to, out of the way of the agent's, which has its number
PARKS_VARIABLE = "ROOST_PARKS"  # set where forks wait for users who have not come yet, most of them for long
EXIT_FAILED = 3

_LENGTH = struct.Struct(">I")
_ANCILLARY = socket.CMSG_LEN(32 * 4)  # of so many descriptors
_USER, _PID = 0x10000000, 0x20000000
# cgroup, ipc, uts, net, mnt: the order in which they come.
_NAMESPACES = (0x02000000, 0x08000000, 0x04000000, 0x40000000, 0x00020000)
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_PR_SET_SECCOMP = 22
_CAP_VERSION_3 = 0x20080522
_MAX_FILTER = 4096 * 8  # bytes, as the kernel has it

_libc = ctypes.CDLL(None, use_errno=True)
# The variant that keeps the GIL: between fork and the child's return nothing else may touch the interpreter.
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)


class _FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


# Made here, once for all forks: see "in the child".
_decoder = json.JSONDecoder()
_no_capabilities = struct.pack("=II", _CAP_VERSION_3, 0), bytes(24)
_mode_filter = ctypes.c_ulong(2)
_filter = ctypes.create_string_buffer(_MAX_FILTER)
_program = _FilterProgram(0, ctypes.addressof(_filter))
_generator: Any = random._inst
_seed_random = super(random.Random, _generator).seed


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
    turn = socket.socket(fileno=TURN_FD)  # which it is in each fork
    turn.set_inheritable(False)
    node = socket.socket(fileno=fcntl.fcntl(WIRE_FD, fcntl.F_DUPFD_CLOEXEC, _NODE_FD))
    parks = os.environ.pop(PARKS_VARIABLE, None) is not None
    hooks = _Hooks()
    hooks.record()
    try:
        agent = load(entry)
    except (Exception, SystemExit):
        _fail(node, f"it can't be imported: {traceback.format_exc(limit=1).splitlines()[-1][:500]}")
    try:
        agent.prepare(turn)
    except Exception:
        _fail(node, f"it can't be made ready: {traceback.format_exc(limit=1).splitlines()[-1][:500]}")
    threads = _threads()
    if threads > 1:
        _fail(node, f"its import left {threads - 1} threads running, and a fork would lose them")
    shared = shared_memory()
    if shared:
        _fail(node, f"its import left {shared} mapped, which every user's instance would share")
    os.environ["HOME"] = str(STATE_DIR)  # as in each fork, which then has nothing to change
    made = _Fork(node, agent, hooks, dict(os.environ), parks, [])
    gc.collect()
    made.kept.extend(fill_holes())
    gc.freeze()
    _send(node, {"step": "ready"})
    while True:
        _fork_spare(made)
        _reap()


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


class _Fork(NamedTuple):
    """What each fork gets of its zygote. `environment`: as it is. `parks`: the fork may have to wait for
    long, and makes nothing ahead. `kept`: so that it is not freed."""

    node: socket.socket
    agent: Agent
    hooks: _Hooks
    environment: dict[str, str]
    parks: bool
    kept: list[object]


def _fork() -> int:
    """A fork without the interpreter's own hooks: they are about other threads, which a zygote has not, and
    touch most of a megabyte, which every instance would then have for itself."""
    return _check(_libc_with_gil.fork(), "fork")


def _reap() -> None:
    """The children that only fork the agent. Who has not ended yet is left to the next call."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _fork_spare(made: _Fork) -> None:
    """Has a child wait for the next request, so that the fork is done before somebody waits for it. Returns
    when it has taken one."""
    told, tell = os.pipe()
    if _fork() == 0:
        os.close(told)
        request, fds = _receive(made.node)
        if request is None:
            os._exit(0)
        os.write(tell, b".")  # taken
        _enter(made, _Where(*fds), tell)
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
#
# Forks wait here, for long and in great number, and each page that one writes to is its own from then on. In
# CPython to use an object is to write to it: so what can be made in the zygote is made there, and the
# shortest way is taken, through the fewest functions.


def _enter(made: _Fork, where: _Where, tell: int) -> NoReturn:
    """Goes to the jail's processes and forks there; lives on until the node has seen that. Writes to `tell`
    when the zygote may fork again: at the same time both forks would be slower."""
    try:
        _set_namespace(where.user, _USER)
        _set_namespace(where.pid, _PID)
        made.hooks.before()
        pid = _fork()
    except BaseException as error:
        os.write(tell, b".")
        _end_with(where.report, f"a zygote's child can't enter the jail: {error!r}")
    if pid == 0:
        _wait(made, where.line)
    os.write(tell, b".")
    for fd in (TURN_FD, _NODE_FD, where.line):
        os.close(fd)
    with socket.socket(fileno=where.report) as report:
        _send(report, {"pid": pid})
        report.recv(1)
    os._exit(0)


def _wait(made: _Fork, line: int) -> NoReturn:
    """Waits until the jail is somebody's, and becomes the agent. All that it inherited is closed before."""
    node = made.node
    try:
        _leave_all_but(line)
        if not made.parks:
            made.agent.make_loop()
        request, fds = _receive(node)
        if request is None:
            os._exit(0)  # nobody has wanted it
        given = _Given(fds[0], fds[1], fds[2:7], fds[7:])
        for group in given.groups:  # first, so that all that follows counts against the jail's limits
            os.write(group, b"0")
        for fd, kind in zip(given.namespaces, _NAMESPACES):  # noqa: B905  # Python 3.9
            _set_namespace(fd, kind)
        _become_agent(given, request, made.environment)
        made.hooks.in_child()
        for fd in fds:
            os.close(fd)
        node.sendall(_ENTERED)
        os.close(node.detach())
    except BaseException as error:
        _end_with(_NODE_FD, f"a zygote's child can't become the agent: {error!r}")
    made.agent.run()


def _set_namespace(fd: int, kind: int) -> None:
    _check(_libc.setns(ctypes.c_int(fd), ctypes.c_int(kind)), "setns")


def _end_with(report: int, problem: str) -> NoReturn:
    try:
        with socket.socket(fileno=report) as node:
            _send(node, {"problem": problem[:1000]})
    finally:
        os._exit(1)


def _leave_all_but(line: int) -> None:
    """It takes the place of the zygote's socket, and is then all that is open, beside descriptors 0 to 3,
    which are kept for what comes."""
    os.dup2(line, _NODE_FD, False)
    null = os.open("/dev/null", os.O_RDONLY)
    for number in range(TURN_FD + 1):
        os.dup2(null, number)
    os.closerange(TURN_FD + 1, _NODE_FD)
    os.closerange(_NODE_FD + 1, 1 << 16)


def _become_agent(given: _Given, request: dict[str, Any], environment: dict[str, str]) -> None:
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
        os.dup2(source, target)
    if request["env"] != environment:
        _set_environment(request["env"])
    _seed()
    # The kernel keeps capabilities here, as neither uid was the namespace's root: they are dropped by name.
    for capability in range(64):
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break
    _check(_libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl")
    _check(_libc.capset(*_no_capabilities), "capset")
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
    _filter.raw = program
    _program.length = len(program) // 8
    _check(_libc.prctl(_PR_SET_SECCOMP, _mode_filter, ctypes.byref(_program), 0, 0), "seccomp")


def _seed() -> None:
    """What the import seeded would be the same for each user. `os.urandom`, `uuid`, `secrets` and `ssl` need
    nothing; generators that the agent's module made itself are its own matter."""
    _seed_random()
    _generator.gauss_next = None
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
    node.sendall(_frame(message))


def _frame(message: dict[str, Any]) -> bytes:
    payload = json.dumps(message).encode()
    return _LENGTH.pack(len(payload)) + payload


_ENTERED = _frame({"step": "entered"})


def _receive(node: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message with its descriptors; None when the node has closed."""
    data = b""
    fds: list[int] = []
    wanted = _LENGTH.size
    while len(data) < wanted:
        part, ancillary, _, _ = node.recvmsg(wanted - len(data), _ANCILLARY)
        for _, _, passed in ancillary:
            fds += memoryview(passed).cast("i")
        if not part:
            return None, fds
        data += part
        if len(data) == _LENGTH.size:
            wanted += int.from_bytes(data, "big")
    message: dict[str, Any] = _decoder.raw_decode(data[_LENGTH.size :].decode())[0]
    return message, fds

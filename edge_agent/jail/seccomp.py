"""The filter between an agent and the kernel's system calls: which may be made, and with which arguments.

A classic BPF program, put together here, since the jailer imports as little as it can. Deny by default: what
`syscalls` does not list gets EPERM; what is newer than that list gets ENOSYS, as from an older kernel, for
that is what C libraries look for when they fall back. A call in another ABI's numbering ends the process, or
is unknown (x32).

A program is a nested expression: a list of instructions every path of which ends in a verdict. So one is
never jumped out of, and none needs a label. What must hold: an argument is compared only as wide as the
kernel reads it; pointers are never followed, for what they point to may change after the check.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Iterable
from typing import NamedTuple

from edge_agent.jail import syscalls
from edge_agent.jail.protocol import Refused


class Instruction(NamedTuple):
    """struct sock_filter. Of a conditional jump: how many to skip if so, and if not."""

    code: int
    if_so: int
    if_not: int
    value: int


Program = list[Instruction]

# What the accumulator, the one register in use, is loaded from: struct seccomp_data. Both architectures are
# little-endian, so the lower half of a 64-bit argument comes first.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_FAR = 255  # instructions that a conditional jump reaches over

_ALLOW, _KILL_PROCESS, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_SETNS = {"x86_64": 308, "aarch64": 268}
_PR_CAPBSET_DROP = 24
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Fixed numbers of the kernel's interface, which Python does not name on every build.
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _NETLINK_ROUTE = 1, 2, 10, 16, 0
_STREAM, _DATAGRAM, _TYPE_BITS = 1, 2, 0xF
_TCP, _UDP = 6, 17
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_TIOCSTI, _TIOCLINUX, _TIOCSETD, _TIOCCONS = 0x5412, 0x541C, 0x5423, 0x541D
_RLIMIT_CORE = 4
_DEVICE_BIT = 0x2000  # in the mode of character and block devices, and of no other file that mknod makes
_MADV_MERGEABLE = 12
_PERSONALITIES = (0, 0xFFFFFFFF)  # Linux, which it has anyway, and the question which one it has
# PDEATHSIG, DUMPABLE, UNALIGN, KEEPCAPS, FPEMU, FPEXC, TIMING, NAME, SECCOMP, CAPBSET_READ, TSC, SECUREBITS
# (to read), TIMERSLACK, MCE_KILL, CHILD_SUBREAPER, NO_NEW_PRIVS, GET_TID_ADDRESS, THP_DISABLE, CAP_AMBIENT,
# the vector lengths, pointer keys and tagged addresses of arm64, SPECULATION (to read), MDWE, ANON_VMA_NAME,
# and Yama's PTRACER. Not: MM, MPX, SCHED_CORE, SYSCALL_USER_DISPATCH, MEMORY_MERGE (equal pages shared with
# other users' processes tell what is in theirs).
_PRCTL = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 21, 22, 23, 25, 26, 27, 29, 30, 33, 34, 36, 37),
    *(38, 39, 40, 41, 42, 47, 50, 51, 52, 54, 55, 56, 60, 61, 63, 64, 65, 66, 0x53564D41, 0x59616D61),
)


def _is(verdict: int) -> Program:
    return [Instruction(_RETURN, 0, 0, verdict)]


def _fails(number: int) -> Program:
    return _is(_FAIL | number)


def _argument(index: int, high: bool = False) -> Program:
    """Loads 32 bits of it."""
    return [Instruction(_LOAD, 0, 0, _ARGUMENTS + 8 * index + (4 if high else 0))]


def _if(test: int, value: int, then: Program, otherwise: Program) -> Program:
    if len(then) <= _FAR:
        return [Instruction(test, 0, len(then), value), *then, *otherwise]
    over = Instruction(_JUMP, 0, 0, len(then))
    return [Instruction(test, 1, 0, value), over, *then, *otherwise]


def _if_one_of(values: Iterable[int], then: Program, otherwise: Program) -> Program:
    for value in values:
        otherwise = _if(_EQUAL, value, then, otherwise)
    return otherwise


_ALLOWED = _is(_ALLOW)
_DENIED = _fails(errno.EPERM)
_UNKNOWN = _fails(errno.ENOSYS)


def _protocols(known: int) -> Program:
    return [*_argument(2), *_if_one_of((0, known), _ALLOWED, _fails(errno.EPROTONOSUPPORT))]


def _sockets() -> Program:
    """Unix, TCP, UDP, and netlink for what getifaddrs asks; no other protocol, for a module of the kernel is
    loaded for the asking."""
    kind = [*_argument(1), Instruction(_AND, 0, 0, _TYPE_BITS)]
    internet = [
        *kind,
        *_if(_EQUAL, _STREAM, _protocols(_TCP), _if(_EQUAL, _DATAGRAM, _protocols(_UDP), _DENIED)),
    ]
    netlink = [*_argument(2), *_if(_EQUAL, _NETLINK_ROUTE, _ALLOWED, _fails(errno.EPROTONOSUPPORT))]
    none = _fails(errno.EAFNOSUPPORT)
    others = _if(_EQUAL, _AF_UNIX, _ALLOWED, _if(_EQUAL, _AF_NETLINK, netlink, none))
    return [*_argument(0), *_if_one_of((_AF_INET, _AF_INET6), internet, others)]


def _core_limit(resource: int, new: int | None) -> Program:
    """A limit of 1 byte is what keeps the host's core dump program, which runs as root, from being fed this
    process; one of 0 would not. Who sets it wants no dump, and is told that there will be none."""
    keep = _is(_FAIL | 0)
    if new is not None:  # of prlimit64: a null pointer only asks
        given = _if(_EQUAL, 0, [*_argument(new, high=True), *_if(_EQUAL, 0, _ALLOWED, keep)], keep)
        keep = [*_argument(new), *given]
    return [*_argument(resource), *_if(_EQUAL, _RLIMIT_CORE, keep, _ALLOWED)]


def _conditions(of_zygote: bool) -> dict[str, Program]:
    """For calls that depend on their arguments."""
    prctl = (*_PRCTL, _PR_CAPBSET_DROP) if of_zygote else _PRCTL
    return {
        # Its flags can't be looked at, being behind a pointer; C libraries then take clone, whose can.
        "clone3": _UNKNOWN,
        "clone": [*_argument(0), *_if(_ANY_BIT, _NEW_NAMESPACES, _DENIED, _ALLOWED)],
        "socket": _sockets(),
        "socketpair": [*_argument(0), *_if(_EQUAL, _AF_UNIX, _ALLOWED, _fails(errno.EAFNOSUPPORT))],
        "ioctl": [
            *_argument(1),
            *_if_one_of((_TIOCSTI, _TIOCLINUX, _TIOCSETD, _TIOCCONS), _DENIED, _ALLOWED),
        ],
        "prctl": [*_argument(0), *_if_one_of(prctl, _ALLOWED, _fails(errno.EINVAL))],
        "personality": [*_argument(0), *_if_one_of(_PERSONALITIES, _ALLOWED, _DENIED)],
        "mknod": [*_argument(1), *_if(_ANY_BIT, _DEVICE_BIT, _DENIED, _ALLOWED)],
        "mknodat": [*_argument(2), *_if(_ANY_BIT, _DEVICE_BIT, _DENIED, _ALLOWED)],
        "madvise": [*_argument(2), *_if(_EQUAL, _MADV_MERGEABLE, _fails(errno.EINVAL), _ALLOWED)],
        "setrlimit": _core_limit(0, None),
        "prlimit64": _core_limit(1, 2),
    }


def build(machine: str, of_zygote: bool = False) -> Program:
    """The filter for `machine` (as `uname -m` has it). Refused if there is none for it. A zygote's lets its
    children enter the jails that were made for them; each of them then adds the agent's, which does not."""
    if machine not in _AUDIT_ARCH:
        raise Refused(
            f"agents can't be jailed on {machine}: there is no system call filter for it",
            "use x86_64 or aarch64, with a 64-bit Python",
        )
    known = syscalls.numbers(machine)
    if of_zygote:
        known = {**known, "setns": _SETNS[machine]}
    conditions = _conditions(of_zygote)
    newest = max(known.values())
    verdicts = [_DENIED] * (newest + 1)
    for name, number in known.items():
        verdicts[number] = conditions.get(name, _ALLOWED)
    # Where a new verdict begins. Everything above the newest, x32's numbers among them, is unknown.
    starts = [(n, v) for n, v in enumerate(verdicts) if n == 0 or v is not verdicts[n - 1]]
    right_abi = [Instruction(_LOAD, 0, 0, _NUMBER), *_search([*starts, (newest + 1, _UNKNOWN)])]
    architecture = Instruction(_LOAD, 0, 0, _ARCHITECTURE)
    return [architecture, *_if(_EQUAL, _AUDIT_ARCH[machine], right_abi, _is(_KILL_PROCESS))]


def _search(starts: list[tuple[int, Program]]) -> Program:
    """Halves the ranges until one is left: about eight comparisons for any number."""
    if len(starts) == 1:
        return starts[0][1]
    middle = len(starts) // 2
    return _if(_AT_LEAST, starts[middle][0], _search(starts[middle:]), _search(starts[:middle]))


def encode(program: Program) -> bytes:
    """As the kernel takes it."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


@functools.cache
def agent_filter() -> bytes:
    """For this machine. Built once, by the jailer before it makes jails. Refused if there is none."""
    return encode(build(os.uname().machine))


@functools.cache
def zygote_filter() -> bytes:
    return encode(build(os.uname().machine, of_zygote=True))

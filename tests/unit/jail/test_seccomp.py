"""The system call filter, run by an interpreter of classic BPF over calls that must and must not pass."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.jail import agent_process, seccomp, syscalls
from edge_agent.jail.protocol import Limits, Make, Refused

ALLOW, KILL, FAIL = "allow", "kill", "fail"
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003
PROGRAMS = {machine: seccomp.build(machine) for machine in ARCHITECTURES}
Verdict = str | int  # "allow", "kill", or the errno

# What an agent must not do: name, number on x86_64, on aarch64 (None: not there).
DENIED = """
ptrace 101 117         process_vm_readv 310 270  process_vm_writev 311 271  pidfd_getfd 438 438
kcmp 312 272           unshare 272 97            setns 308 268              mount 165 40
umount2 166 39         pivot_root 155 41         chroot 161 51              open_tree 428 428
move_mount 429 429     fsopen 430 430            fsconfig 431 431           fsmount 432 432
fspick 433 433         mount_setattr 442 442     bpf 321 280                perf_event_open 298 241
userfaultfd 323 282    io_uring_setup 425 425    io_uring_enter 426 426     io_uring_register 427 427
keyctl 250 219         add_key 248 217           request_key 249 218        open_by_handle_at 304 265
name_to_handle_at 303 264  kexec_load 246 104    kexec_file_load 320 294    init_module 175 105
finit_module 313 273   delete_module 176 106     reboot 169 142             swapon 167 224
swapoff 168 225        settimeofday 164 170      clock_settime 227 112      adjtimex 159 171
clock_adjtime 305 266  quotactl 179 60           quotactl_fd 443 443        acct 163 89
syslog 103 116         sethostname 170 161       setdomainname 171 162      fanotify_init 300 262
lookup_dcookie 212 18  iopl 172 -                ioperm 173 -               modify_ldt 154 -
vmsplice 278 75        memfd_secret 447 447      process_madvise 440 440    mbind 237 235
statmount 457 457      listmount 458 458         nfsservctl 180 42          vhangup 153 58
uselib 134 -           _sysctl 156 -             sysfs 139 -                ustat 136 -
"""
TABLE = [
    (machine, name, int(number))
    for name, *numbers in re.findall(r"(\w+) (\d+|-) (\d+|-)", DENIED)
    for machine, number in zip(ARCHITECTURES, numbers, strict=True)
    if number != "-"
]


def run(machine: str, number: int, *arguments: int, architecture: int | None = None) -> Verdict:
    """What the filter for `machine` says to a call."""
    padded = (*arguments, *[0] * 6)[:6]
    data = struct.pack(
        "<iIQ6Q",
        number if number < 1 << 31 else number - (1 << 32),
        ARCHITECTURES[machine] if architecture is None else architecture,
        0,
        *(a & 0xFFFFFFFFFFFFFFFF for a in padded),
    )
    returned = _interpret(PROGRAMS[machine], data)
    kind, value = returned & 0xFFFF0000, returned & 0xFFFF
    if kind == 0x00050000:
        return value
    return {0x7FFF0000: ALLOW, 0x80000000: KILL}[kind]


def _interpret(program: seccomp.Program, data: bytes) -> int:
    at, accumulator = 0, 0
    while True:
        code, if_so, if_not, value = program[at]
        at += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x54:
                accumulator &= value
            case 0x05:
                at += value
            case 0x15:
                at += if_so if accumulator == value else if_not
            case 0x35:
                at += if_so if accumulator >= value else if_not
            case 0x45:
                at += if_so if accumulator & value else if_not
            case 0x06:
                return value
            case _:
                raise AssertionError(f"instruction {code:#x} is not known here")


def call(machine: str, name: str, *arguments: int) -> Verdict:
    return run(machine, syscalls.numbers(machine)[name], *arguments)


@pytest.mark.parametrize(("machine", "name", "number"), TABLE)
def test_denied(machine: str, name: str, number: int) -> None:
    assert name not in syscalls.numbers(machine)
    expected = errno.EPERM if number <= 466 else errno.ENOSYS
    assert run(machine, number) == expected


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_what_ordinary_programs_do_is_allowed(machine: str) -> None:
    known = syscalls.numbers(machine)
    judged = ("clone3", "socket", "socketpair", "prctl")
    refused = {name: v for name in known if name not in judged and (v := call(machine, name)) != ALLOW}
    assert refused == {}
    assert len(known) > 230


ARGUMENTS: list[tuple[str, tuple[int, ...], Verdict]] = [
    ("clone", (0x01200011,), ALLOW),  # fork, as the C library makes it
    ("clone", (0x003D0F00,), ALLOW),  # a thread
    *(("clone", (flag | 17,), errno.EPERM) for flag in (1 << 17, *(1 << n for n in range(25, 31)))),
    ("clone", (0xFFFFFFFF_00000011,), ALLOW),  # which the kernel cuts as well
    ("clone3", (), errno.ENOSYS),
    ("socket", (1, 1, 0), ALLOW),
    ("socket", (1, 2 | 0x80800, 0), ALLOW),
    ("socket", (2, 1, 0), ALLOW),
    ("socket", (2, 1 | 0x80000, 6), ALLOW),
    ("socket", (10, 2, 17), ALLOW),
    ("socket", (2, 3, 1), errno.EPERM),  # raw
    ("socket", (2, 3 | 0x80000, 255), errno.EPERM),
    ("socket", (2, 2, 1), errno.EPROTONOSUPPORT),  # ping
    ("socket", (2, 1, 132), errno.EPROTONOSUPPORT),  # SCTP
    ("socket", (2, 1, 262), errno.EPROTONOSUPPORT),  # MPTCP
    ("socket", (10, 5, 132), errno.EPERM),
    ("socket", (16, 3, 0), ALLOW),  # what getifaddrs asks
    *(("socket", (16, 3, protocol), errno.EPROTONOSUPPORT) for protocol in (4, 6, 9, 12, 15, 16, 21)),
    *(
        ("socket", (family, 1, 0), errno.EAFNOSUPPORT)
        for family in (0, 3, 4, 5, 9, 15, 17, 21, 29, 30, 31, 38, 40, 44, 45)
    ),
    ("socket", (0x1_00000002, 1, 0), ALLOW),
    ("socket", (0x1_00000011, 3, 0), errno.EAFNOSUPPORT),
    ("socketpair", (1, 1, 0), ALLOW),
    ("socketpair", (30, 1, 0), errno.EAFNOSUPPORT),
    ("ioctl", (0, 0x5401), ALLOW),
    ("ioctl", (0, 0x5412), errno.EPERM),
    ("ioctl", (0, 0x1_00005412), errno.EPERM),  # the way around filters that compare 64 bits
    ("ioctl", (0, 0x541C), errno.EPERM),
    ("ioctl", (0, 0x5423), errno.EPERM),
    ("prctl", (15,), ALLOW),
    ("prctl", (1, 9), ALLOW),
    ("prctl", (35,), errno.EINVAL),
    ("prctl", (62,), errno.EINVAL),
    ("prctl", (67, 1), errno.EINVAL),
    ("personality", (0xFFFFFFFF,), ALLOW),
    ("personality", (0x0040000,), errno.EPERM),
    ("mknodat", (0, 0, 0o010600), ALLOW),
    ("mknodat", (0, 0, 0o100600), ALLOW),
    ("mknodat", (0, 0, 0o140600), ALLOW),
    ("mknodat", (0, 0, 0o020600), errno.EPERM),
    ("mknodat", (0, 0, 0o060600), errno.EPERM),
    ("madvise", (0, 0, 4), ALLOW),
    ("madvise", (0, 0, 12), errno.EINVAL),
    ("setrlimit", (7,), ALLOW),
    ("setrlimit", (4, 0x1000), 0),  # success that changes nothing
    ("prlimit64", (0, 7, 0x7FFF_00000000), ALLOW),
    ("prlimit64", (0, 4, 0), ALLOW),
    ("prlimit64", (0, 4, 0x1000), 0),
    ("prlimit64", (0, 4, 0x7FFF_00000000), 0),
]


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize(("name", "arguments", "expected"), ARGUMENTS)
def test_by_argument(machine: str, name: str, arguments: tuple[int, ...], expected: Verdict) -> None:
    assert call(machine, name, *arguments) == expected


def test_mknod_of_x86() -> None:
    assert call("x86_64", "mknod", 0, 0o010600) == ALLOW
    assert call("x86_64", "mknod", 0, 0o060600) == errno.EPERM


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_other_numberings_are_no_way_around(machine: str) -> None:
    other = next(a for m, a in ARCHITECTURES.items() if m != machine)
    for architecture in (I386, other, 0):
        for number in (0, 1, 20, 39, 165):
            assert run(machine, number, architecture=architecture) == KILL
    for number in (0x40000000 | 39, 0x40000000 | 521, 0xFFFFFFFF):  # x32's, and -1
        assert run(machine, number) == errno.ENOSYS


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_calls_newer_than_the_list_look_like_an_older_kernel(machine: str) -> None:
    assert {run(machine, n) for n in range(467, 600)} == {errno.ENOSYS}


@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.one_of(st.integers(0, 500), st.integers(0, (1 << 32) - 1)),
    st.lists(st.integers(0, (1 << 64) - 1), max_size=6),
)
def test_every_call_gets_a_verdict_and_nothing_unlisted_passes(
    machine: str, number: int, arguments: list[int]
) -> None:
    if run(machine, number, *arguments) == ALLOW:
        assert number in syscalls.numbers(machine).values()


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_the_kernel_would_take_it(machine: str) -> None:
    """Its rules: at most 4096 instructions, jumps forward and inside, a return at the end."""
    program = PROGRAMS[machine]
    assert len(program) <= 4096
    assert len(seccomp.encode(program)) == 8 * len(program)
    for at, (code, if_so, if_not, value) in enumerate(program):
        skips = {0x05: (value,), 0x20: (0,), 0x54: (0,), 0x06: ()}.get(code, (if_so, if_not))
        assert all(at + 1 + skip < len(program) for skip in skips)
        assert max(if_so, if_not) <= 255
    assert program[-1].code == 0x06


def test_no_number_is_written_down_twice() -> None:
    for machine in ARCHITECTURES:
        values = list(syscalls.numbers(machine).values())
        assert len(values) == len(set(values))


HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers (linux-libc-dev) are not here")
def test_the_numbers_are_those_of_the_headers() -> None:
    headers = {
        name: int(n) for name, n in re.findall(r"^#define __NR_(\w+)\s+(\d+)", HEADER.read_text(), re.M)
    }
    ours = syscalls.numbers("x86_64")
    denied = {name: number for machine, name, number in TABLE if machine == "x86_64"}
    for name, number in {**ours, **denied}.items():
        assert headers.get(name, number) == number, name


def test_a_machine_without_a_filter_is_refused_with_a_reason() -> None:
    with pytest.raises(Refused, match="riscv64"):
        seccomp.build("riscv64")


def test_the_last_steps_can_be_printed_and_after_the_filter_there_is_only_the_program() -> None:
    request = Make("a", "v1", ("/bin/true",), (), Limits(16 << 20, 500, 8, disk_bytes=3 << 20))
    texts = [step.describe() for step in agent_process.last_steps(request)]
    assert "limit files to 3M" in texts[2]
    assert texts[-4:-1] == ["drop all capabilities", "set no_new_privs", "filter system calls"]
    assert texts[-1].startswith("execute /bin/true with HOME ")

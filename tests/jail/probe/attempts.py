"""What hostile code tries, one function each. Standard library alone: this runs inside jails, and in those of
others for comparison.

A hazard returns what it got (a word or two) when the wall is open; it raises OSError, or returns None, when
the wall holds. Each runs in a process of its own (see
`__main__`). None does harm where it succeeds.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable

Attempt = Callable[[], str | None]
HAZARDS: dict[str, Attempt] = {}
X86 = platform.machine() == "x86_64"
# Numbers of system calls, name:x86_64:aarch64.
_TABLE = """
mount:165:40  umount2:166:39  pivot_root:155:41  chroot:161:51  unshare:272:97  setns:308:268
ptrace:101:117  keyctl:250:219  add_key:248:217  init_module:175:105  finit_module:313:273  reboot:169:142
swapon:167:224  acct:163:89  syslog:103:116  quotactl:179:60  personality:135:92  kexec_load:246:104
perf_event_open:298:241  bpf:321:280  userfaultfd:323:282  process_vm_readv:310:270  kcmp:312:272
clone:56:220  name_to_handle_at:303:264  open_by_handle_at:304:265  lookup_dcookie:212:18
clock_settime:227:112  shmget:29:194  fanotify_init:300:262  modify_ldt:154:-  iopl:172:-  mknodat:259:33
prctl:157:167  request_key:249:218  pidfd_getfd:438:438  io_uring_setup:425:425  open_tree:428:428
fsopen:430:430  clone3:435:435  mount_setattr:442:442
"""
NUMBERS = {
    name: int(number)
    for name, *both in (entry.split(":") for entry in _TABLE.split())
    if (number := both[0 if X86 else 1]) != "-"
}
_libc = ctypes.CDLL(None, use_errno=True)
Argument = int | bytes | ctypes.Array[ctypes.c_char] | None


def syscall(name: str, *arguments: Argument) -> int:
    whole = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    ctypes.set_errno(0)
    result: int = _libc.syscall(ctypes.c_long(NUMBERS.get(name, -1)), *whole)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def hazard(name: str) -> Callable[[Attempt], Attempt]:
    def register(attempt: Attempt) -> Attempt:
        HAZARDS[name] = attempt
        return attempt

    return register


def calls(hazard_name: str, name: str, *arguments: Argument, reached: tuple[int, ...] = ()) -> None:
    """A hazard that is one system call. `reached`: errors of the kernel's that come after it has let us in,
    on arguments that are wrong on purpose, so that nothing happens."""

    def attempt() -> str | None:
        try:
            syscall(name, *arguments)
        except OSError as error:
            if error.errno in reached:
                return f"reached: {errno.errorcode[error.errno or 0]}"
            raise
        return "done"

    HAZARDS[hazard_name] = attempt


def writes(hazard_name: str, *paths: str) -> None:
    """A hazard that is opening files for writing: one is enough. Nothing is written."""
    HAZARDS[hazard_name] = lambda: first(paths, lambda p: os.close(os.open(p, os.O_WRONLY)))


def first(paths: tuple[str, ...] | list[str], do: Callable[[str], object]) -> str | None:
    """The first path with which `do` succeeds. The last of the errors if there is none."""
    last = OSError(errno.ENOENT, "none of them is there")
    for path in paths:
        try:
            do(path)
        except OSError as error:
            last = error
        else:
            return path
    raise last


def read(path: str, size: int = 65536) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(size) or b""


def status_lines() -> dict[str, str]:
    lines = read("/proc/self/status").decode().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def planted(name: str) -> str:
    """What whoever started the probe put on the host for it to find."""
    return os.environ.get(f"PROBE_{name}", "")
